"""Linformer: attention to a fixed number of mixtures of all tokens."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from ..sharded import check_whole

SHARING = ("headwise", "key_value", "none")


class Linformer(Mixer):
    """Softmax attention over `rank` mixtures of the tokens (arXiv 2006.04768, eq. 7): O(T rank), in both directions.

        K̄ = Eᵀ K,  V̄ = Fᵀ V        o = softmax(K^-½ Q K̄ᵀ) V̄        E, F: max_length × rank

    E and F are shared by the heads ("headwise"), and one matrix ("key_value"), or each head has its own ("none");
    they start uniform in ±rank^-½. A shorter sequence uses their first rows. Tokens that `mask` leaves out are in no
    mixture, so padding changes nothing. Every output sees all of the sequence: there is no state, and `__call__` alone.

    Raises:
      ValueError: x is longer than `max_length`, a number is below 1, `sharing` is unknown, or there are segments.
      NotImplementedError: time is split over devices, or a state is asked for.
    """

    d_model: int
    num_heads: int = 4
    rank: int = 128
    max_length: int = 1024
    sharing: str = "headwise"
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
    ):
        self.resumed(x, state)
        check_whole("Linformer", "give every device whole sequences")
        self._check(x.shape[1])
        if segment_ids is not None:
            raise ValueError("segment_ids: Linformer mixes all of a row; give one sequence a row.")
        heads = lambda a: split_heads(a, self.d_model // self.num_heads)
        q, k, v = (heads(projection(self.d_model, f"{name}_proj", self, self.use_bias)(x)) for name in "qkv")
        if mask is not None:
            k, v = (jnp.where(mask[..., None, None], a, 0) for a in (k, v))
        mix = self._mix("key_mix")
        k, v = self._mixed(mix, k), self._mixed(mix if self.sharing == "key_value" else self._mix("value_mix"), v)
        logits = jnp.einsum("bthk,brhk->bhtr", q, k, preferred_element_type=accumulator(q.dtype))
        weights = nn.softmax(logits * q.shape[-1] ** -0.5).astype(v.dtype)
        o = jnp.einsum("bhtr,brhv->bthv", weights, v).reshape(x.shape)
        return projection(self.d_model, "out_proj", self, use_bias=True)(o), None

    def _mix(self, name: str):
        own = (self.num_heads,) if self.sharing == "none" else ()
        shape = (*own, self.max_length, self.rank)
        return self.param(name, symmetric_uniform(self.rank**-0.5), shape, self.param_dtype)

    def _mixed(self, mix, a):
        """`B T H K` → `B rank H K`."""
        mix = mix[..., : a.shape[1], :].astype(a.dtype)
        return jnp.einsum("htr,bthk->brhk" if mix.ndim == 3 else "tr,bthk->brhk", mix, a)

    @nn.nowrap
    def looks_ahead(self) -> str:
        return ""

    @nn.nowrap
    def _check(self, length: int) -> None:
        self.checked_heads(num_heads=self.num_heads)
        at_least(self, rank=1, max_length=1)
        if self.sharing not in SHARING:
            raise ValueError(f"sharing={self.sharing!r}; choose one of {', '.join(SHARING)}.")
        if length > self.max_length:
            raise ValueError(f"x has length {length}; Linformer(max_length={self.max_length}) mixes no more.")
