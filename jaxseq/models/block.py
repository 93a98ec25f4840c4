"""Residual blocks, and the stack of them that every model is built on."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..layers.gated_mlp import GatedMLP
from ..layers.mixer import Mixer, past_padding
from ..shapes import Array, Bool, Float, Int, accumulator, known, typed
from ..sharded import devices, first_position
from .reversible import coupled_scan

#: Norms by name: divided by the root mean square of the channels, or shifted to mean 0 first.
NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}

#: A slot: a callable that takes `d_model` and returns a module. Not a module, because one linen instance placed
#: twice silently shares its parameters.
Slot = Callable[..., nn.Module] | None
#: What layers may sow into, and the rngs that each has keys of its own from.
SOWN = ("losses", "intermediates")
RNGS = ("dropout", "subsample", "features")


class Block(nn.Module):
    """x ← x + dropout(mixer(norm(x))), then x ← x + dropout(mlp(norm(x))). Either slot may be None.

    Without `prenorm` x ← norm(x + dropout(mixer(x))). Where there is an rng "dropout", channels are dropped for all of
    the time at once: a mask a token generalises worse (S4's authors). A mixer that is no `Mixer`, as it looks at the
    whole sequence, is called, and has no state. None sees the end of a row that `mask` leaves out (`past_padding`).

    x may be two streams: then each branch f makes (b, a + f(b)) of (a, b). `handed` is what mixers before this one hand
    on (`Mixer.in_stack`), which comes out with what this one adds.
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
    def __call__(
        self,
        x: Float[Array, "B T D"] | tuple,
        state: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        handed: dict[str, Array] | None = None,
    ):
        normed = lambda x, part: NORMS[self.norm](self.norm_eps, name=f"{part}_norm", **self._dtypes())(x)
        dropout = nn.Dropout(self.dropout, broadcast_dims=(1,), deterministic=not self.has_rng("dropout"))

        def before(x, part):
            read = x[1] if isinstance(x, tuple) else x
            return normed(read, part) if self.prenorm else read

        def added(x, y, part):
            # The residual stream keeps its own dtype: sums over depth are the last place for bfloat16.
            if isinstance(x, tuple):
                return x[1], x[0] + dropout(y).astype(x[0].dtype)
            total = x + dropout(y).astype(x.dtype)
            return total if self.prenorm else normed(total, part).astype(x.dtype)

        if self.mixer is not None:
            mixer = self.mixer(d_model=self.d_model, name="mixer", **self._dtypes())
            y = before(x, "mixer")
            segment_ids, inputs = past_padding(mixer, segment_ids, mask)
            if isinstance(mixer, Mixer):
                start = mixer.start(y, max_length=0) if state is None else state
                y, state, handed = mixer.in_stack(y, start, segment_ids, handed or {}, **inputs)
            else:
                y = mixer(y, segment_ids, **inputs)
            x = added(x, y, "mixer")
        if self.mlp is not None:
            mlp = self.mlp(d_model=self.d_model, name="mlp", **self._dtypes())
            x = added(x, mlp(before(x, "mlp")), "mlp")
        return x, state, handed

    @nn.nowrap
    def _dtypes(self):
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Pattern(nn.Module):
    """One period of the stack: a block for each slot, each with its own state."""

    mixers: tuple[Slot, ...]
    block: dict[str, Any]

    @nn.compact
    def __call__(self, x, states, segment_ids, mask):
        after, handed = [], None
        for i, mixer in enumerate(self.mixers):
            block = Block(mixer=mixer, name=f"block_{i}", **self.block)
            x, state, passed = block(x, states and states[i], segment_ids, mask, handed)
            handed = None if isinstance(x, tuple) else passed  # a branch of two streams is a function of them alone
            after.append(states and state)  # nobody asked for a state where the sequence ends: it is not computed
        return x, tuple(after)


class Stack(nn.Module):
    """Blocks for a tuple of mixer slots, then a norm: `B T D → B T D`, with the states of all mixers.

    `norm` is "rms" or "layer"; without `prenorm` it ends each branch instead, and none follows the last. `dropout` is
    the share of channels that a branch loses where there is an rng "dropout".

    With `states` None the sequence starts and ends in the call: caches have no room for tokens after it, and the states
    returned are None.

    With `lengths` only the first so many tokens of each row count: no mixer lets them see the padding behind, and what
    comes out of that is of no use.

    Depth is a scan over the shortest repeating pattern of `mixers`, so compile time does not grow with it; each
    period is rematerialised in the backward pass unless `remat` is False, saving what `remat_policy` (of
    `jax.checkpoint_policies`) allows. States are one tuple entry a slot of the pattern, with the repeats in front.

    Where steps of a mixer write in place (`Mixer.writes_in_place`) states are one entry a layer instead, without the
    repeats, and a step of one token is no scan: a scan over depth copies states, and a tile of a long convolution is
    small beside its own. Only one that is donated, or goes on in a loop of the same program, is left where it is. The
    price is a step that compiles longer in deep models. Reversible stacks copy.

    With `shared` all repeats of the pattern have the parameters of one (ALBERT, arXiv 1909.11942): each layer of a
    model of one mixer is the same. States stay their own.

    What a mixer hands on (`Mixer.in_stack`: RWKV7 the values of the first layer) later ones of its period take, but for
    those of a `reversible` stack, whose branches see no other.

    With `reversible` there are two streams, x twice at first and their mean at the end, and each branch f makes
    (b, a + f(b)) of (a, b): y₁ = x₁ + mixer(x₂), y₂ = x₂ + mlp(y₁) (Reformer, arXiv 2001.04451, section 3). The
    backward pass makes what went into a branch from what came out, so memory for activations does not grow with depth;
    random masks are drawn again, the same. Streams are at least float32, as what that rounds adds up. `remat` False
    differentiates the same layers and keeps all activations. There is no reversible stack without `prenorm`.
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
    shared: bool = False
    reversible: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(
        self,
        x: Float[Array, "B T D"],
        states: Any = None,
        segment_ids: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}; choose one of {', '.join(NORMS)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; a share of the channels, 0 or more and below 1.")
        if self.reversible and not self.prenorm:
            raise ValueError("prenorm=False: a norm of the sum cannot be undone; reversible=True takes prenorm=True.")
        if self.reversible and self.remat_policy is not None:
            raise ValueError(
                f"remat_policy={self.remat_policy} says what is saved; reversible=True saves nothing: take None."
            )
        names = ("d_model", "mlp", "norm", "norm_eps", "prenorm", "dropout", "dtype", "param_dtype")
        block = {name: getattr(self, name) for name in names}
        places = segment_ids, None if lengths is None else counted_tokens(x.shape[1], lengths)
        apart = states is not None and self._writes_in_place(self._modules())
        self._check_states(states, apart)
        if apart:
            states = self._together(states)
        if self.reversible:
            streams, states = self._coupled(block, x.astype(accumulator(x.dtype)), states, places)
            x = ((streams[0] + streams[1]) / 2).astype(x.dtype)
        else:
            x, states = self._scanned(block, x, states, places, at_once=apart and x.shape[1] == 1)
        if apart:
            states = self._apart(states)
        if self.prenorm:
            x = NORMS[self.norm](self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)
        return x, states

    def _scanned(self, block, x, states, places, at_once: bool = False):
        """All layers; `at_once` as so many copies of one, whose states XLA sees apart and changes in place."""
        pattern, repeats = self._pattern()
        rematerialised = self.remat and not self.reversible and not at_once
        period = nn.remat(Pattern, prevent_cse=False, policy=self.remat_policy) if rematerialised else Pattern
        axes: dict[Any, int] = dict.fromkeys(SOWN, 0) | ({} if self.shared else {"params": 0})
        rngs: dict[Any, bool] = dict.fromkeys(RNGS, True) | {"params": not self.shared}
        scanned = nn.scan(
            period,
            variable_axes=axes,
            variable_broadcast="params" if self.shared else False,
            split_rngs=rngs,
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=repeats,
            unroll=repeats if at_once else 1,
            metadata_params={nn.PARTITION_NAME: None},
        )
        return scanned(mixers=pattern, block=block, name="layers")(x, states, *places)

    def _coupled(self, block, x, states, places):
        """Both streams and the states, by functions of the parameters that `_scanned` makes."""
        if self.is_initializing():
            return self._scanned(block, (x, x), states, places)
        pattern, repeats = self._pattern()
        both = [(i, dict(mixer=mixer, mlp=None)) for i, mixer in enumerate(pattern)]
        both = [half for i, first in both for half in ((i, first), (i, dict(mixer=None, mlp=self.mlp)))]
        halves = [(i, slots) for i, slots in both if any(slots.values())]
        sown_to = [name for name in SOWN if self.is_mutable_collection(name)]
        params = self.variables["params"]["layers"]
        keys = {name: jax.random.split(self.make_rng(name), repeats) for name in RNGS if self.has_rng(name)}

        def branch(number, i, slots):
            half = Block(**block | slots, parent=None)

            def run(b, layer, common):
                (own, states, keys), (shared, places) = layer, common
                variables = {"params": (own if shared is None else shared)[f"block_{i}"]}
                state = states and slots["mixer"] and states[i]
                rngs = {name: jax.random.fold_in(key, number) for name, key in keys.items()}
                ((_, y), state, _), sown = half.apply(
                    variables, (jnp.zeros_like(b), b), state, *places, rngs=rngs, mutable=sown_to
                )
                return y, (states and state, sown)

            return run

        branches = [branch(number, *half) for number, half in enumerate(halves)]
        own, shared = (None, params) if self.shared else (params, None)
        layers, common = (own, states, keys), (shared, places)
        streams, outs = coupled_scan(branches, (x, x), layers, common, repeats, undo=self.remat)
        after: list[Any] = [None] * len(pattern)
        sown: dict[str, Any] = {name: {} for name in sown_to}
        for (i, slots), (state, more) in zip(halves, outs, strict=True):
            after[i] = state if slots["mixer"] else after[i]
            for name, tree in more.items():
                sown[name].setdefault(f"block_{i}", {}).update(tree)
        for name, tree in sown.items():
            if tree:
                self.put_variable(name, "layers", tree)
        return streams, tuple(after)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        pattern, repeats = self._pattern()
        modules = self._modules()
        for slot, module in zip(pattern, modules, strict=True):
            if not (module is None or isinstance(module, Mixer)):
                raise TypeError(f"{slot!r} looks at the whole sequence; give mixers that have a state.")
        empty = lambda m: m and m.init_state(batch_size, max_length=max_length, dtype=dtype)
        if self._writes_in_place(modules):
            return tuple(empty(m) for m in modules * repeats)
        repeat = lambda leaf: jnp.broadcast_to(leaf[None], (repeats, *leaf.shape))
        return tuple(jax.tree.map(repeat, empty(m)) for m in modules)

    @nn.nowrap
    def _check_states(self, states: Any, apart: bool) -> None:
        """Raise where there are too many or too few, or those of another number of layers."""
        if states is None:
            return
        pattern, repeats = self._pattern()
        if len(states) != (due := len(self.mixers) if apart else len(pattern)):
            raise ValueError(f"states has {len(states)} entries; these {len(self.mixers)} mixers take {due}.")
        for i, state in enumerate(() if apart else states):
            for leaf in jax.tree.leaves(state):
                if leaf.shape[:1] != (repeats,):
                    raise ValueError(
                        f"states[{i}] holds an array of shape {leaf.shape}; of these {len(self.mixers)} mixers its "
                        f"first axis is {repeats}: one for each layer."
                    )

    @nn.nowrap
    def _modules(self) -> list:
        """One of each slot of the pattern: parentless, as they are asked for shapes alone."""
        return [slot and slot(d_model=self.d_model, parent=None) for slot in self._pattern()[0]]

    @nn.nowrap
    def _writes_in_place(self, modules: list) -> bool:
        return not self.reversible and any(isinstance(m, Mixer) and m.writes_in_place() for m in modules)

    @nn.nowrap
    def _together(self, states: tuple) -> tuple:
        """States by layer, by slot with the repeats in front."""
        period = len(self._pattern()[0])
        return tuple(jax.tree.map(lambda *each: jnp.stack(each), *states[i::period]) for i in range(period))

    @nn.nowrap
    def _apart(self, states: tuple) -> tuple:
        """The inverse of `_together`."""
        repeats = self._pattern()[1]
        return tuple(jax.tree.map(lambda a, n=n: a[n], state) for n in range(repeats) for state in states)

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


def counted_tokens(length: int, lengths: Int[Array, "B"]) -> Bool[Array, "B T"]:
    """True at the first so many tokens of each row.

    Raises:
      ValueError: one of the lengths is known to be below 0, or above that of the row.
    """
    whole = length * devices()
    for row, count in enumerate(() if (counts := known(lengths)) is None else counts.tolist()):
        if not 0 <= count <= whole:
            raise ValueError(f"lengths[{row}]={count}; a row of {whole} tokens has 0 to {whole} that count.")
    position = first_position(length) + jnp.arange(length, dtype=jnp.int32)
    return position[None] < lengths[:, None]


def _identity(slot: Slot):
    """What makes two slots the same: partials compare by what they hold."""
    return (slot.func, slot.args, slot.keywords) if isinstance(slot, partial) else slot
