"""Residual blocks, and the stack of them that every model is built on."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.gated_mlp import GatedMLP
from ..layers.mixer import Mixer
from ..shapes import Array, Float, Int, typed

#: Norms by name: divided by the root mean square of the channels, or shifted to mean 0 first.
NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}

#: A slot: a callable that takes `d_model` and returns a module. Not a module, because one linen instance placed
#: twice silently shares its parameters.
Slot = Callable[..., nn.Module] | None


class Block(nn.Module):
    """x ← x + dropout(mixer(norm(x))), then x ← x + dropout(mlp(norm(x))). Either slot may be None.

    Without `prenorm` x ← norm(x + dropout(mixer(x))). Where there is an rng "dropout", channels are dropped for all of
    the time at once: a mask a token generalises worse (S4's authors). A mixer that is no `Mixer`, as it looks at the
    whole sequence, is called, and has no state.
    """

    d_model: int
    mixer: Slot
    mlp: Slot
    norm: str
    norm_eps: float
    prenorm: bool
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        normed = lambda x, part: NORMS[self.norm](self.norm_eps, name=f"{part}_norm", **self._dtypes())(x)
        before = lambda x, part: normed(x, part) if self.prenorm else x
        dropout = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not self.has_rng("dropout"))

        def added(x, y, part):
            # The residual stream keeps its own dtype: sums over depth are the last place for bfloat16.
            total = x + dropout(y).astype(x.dtype)
            return total if self.prenorm else normed(total, part).astype(x.dtype)

        if self.mixer is not None:
            mixer = self.mixer(d_model=self.d_model, name="mixer", **self._dtypes())
            y = before(x, "mixer")
            if isinstance(mixer, Mixer):
                y, state = mixer.prefill(y, mixer.start(y, max_length=0) if state is None else state, segment_ids)
            else:
                y = mixer(y, segment_ids)
            x = added(x, y, "mixer")
        if self.mlp is not None:
            mlp = self.mlp(d_model=self.d_model, name="mlp", **self._dtypes())
            x = added(x, mlp(before(x, "mlp")), "mlp")
        return x, state

    @nn.nowrap
    def _dtypes(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Pattern(nn.Module):
    """One period of the stack: a block for each slot, each with its own state."""

    mixers: tuple[Slot, ...]
    block: dict[str, Any]

    @nn.compact
    def __call__(self, x, states, segment_ids):
        after = []
        for i, mixer in enumerate(self.mixers):
            x, state = Block(mixer=mixer, name=f"block_{i}", **self.block)(x, states and states[i], segment_ids)
            after.append(states and state)  # nobody asked for a state where the sequence ends: it is not computed
        return x, tuple(after)


class Stack(nn.Module):
    """Blocks for a tuple of mixer slots, then a norm: `B T D → B T D`, with the states of all mixers.

    `norm` is "rms" or "layer"; without `prenorm` it ends each branch instead, and none follows the last. `dropout` is
    the share of channels that a branch loses where there is an rng "dropout".

    With `states` None the sequence starts and ends in the call: caches have no room for tokens after it, and the states
    returned are None.

    Depth is a scan over the shortest repeating pattern of `mixers`, so compile time does not grow with it; each
    period is rematerialised in the backward pass unless `remat` is False, saving what `remat_policy` (of
    `jax.checkpoint_policies`) allows. States are one tuple entry a slot of the pattern, with the repeats in front.
    """

    d_model: int
    mixers: tuple[Slot, ...]
    mlp: Slot = GatedMLP
    norm: str = "rms"
    norm_eps: float = 1e-6
    prenorm: bool = True
    dropout: float = 0.0
    remat: bool = True
    remat_policy: Callable | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self, x: Float[Array, "B T D"], states: Any = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}; choose one of {', '.join(NORMS)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; a share of the channels, 0 or more and below 1.")
        pattern, repeats = self._pattern()
        period = nn.remat(Pattern, prevent_cse=False, policy=self.remat_policy) if self.remat else Pattern
        scanned = nn.scan(
            period,
            variable_axes={"params": 0, "losses": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True, "subsample": True, "features": True},
            in_axes=(0, nn.broadcast),
            length=repeats,
            metadata_params={nn.PARTITION_NAME: None},
        )
        names = ("d_model", "mlp", "norm", "norm_eps", "prenorm", "dropout", "dtype", "param_dtype")
        block = {name: getattr(self, name) for name in names}
        x, states = scanned(mixers=pattern, block=block, name="layers")(x, states, segment_ids)
        if self.prenorm:
            x = NORMS[self.norm](self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)
        return x, states

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        pattern, repeats = self._pattern()
        repeat = lambda leaf: jnp.broadcast_to(leaf[None], (repeats, *leaf.shape))
        # Parentless: these modules are asked for their shapes alone.
        modules = [slot and slot(d_model=self.d_model, parent=None) for slot in pattern]
        for slot, module in zip(pattern, modules, strict=True):
            if not (module is None or isinstance(module, Mixer)):
                raise TypeError(f"{slot!r} looks at the whole sequence; give mixers that have a state.")
        states = (m and m.init_state(batch_size, max_length=max_length, dtype=dtype) for m in modules)
        return tuple(jax.tree.map(repeat, state) for state in states)

    @nn.nowrap
    def _pattern(self) -> tuple[tuple[Slot, ...], int]:
        """The shortest tuple whose repetition is `mixers`, and how often it repeats."""
        depth = len(self.mixers)
        if depth == 0:
            raise ValueError("mixers=() is empty; a model takes at least one slot.")
        for slot in (*self.mixers, self.mlp):
            if isinstance(slot, nn.Module) or not (slot is None or callable(slot)):
                raise TypeError(
                    f"{slot!r} is no slot; give a callable that takes d_model, as partial(GLA, num_heads=4)."
                )
        identity = [_identity(slot) for slot in self.mixers]
        periods = (p for p in range(1, depth + 1) if depth % p == 0 and identity == identity[:p] * (depth // p))
        period = next(periods)
        return self.mixers[:period], depth // period


def _identity(slot: Slot):
    """What makes two slots the same: partials compare by what they hold."""
    return (slot.func, slot.args, slot.keywords) if isinstance(slot, partial) else slot
