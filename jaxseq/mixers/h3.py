"""H3: two state spaces and two products, after linear attention."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..layers.diagonal_state_space import DiagonalStateSpace
from ..layers.mixer import Mixer
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import ShortConvolution
from ..layers.state_space import StateSpaceState
from ..shapes import Array, Complex, Float, Int, accumulator, typed


class H3State(NamedTuple):
    ssm: Complex[Array, "B H P P N"]
    shift: Float[Array, "B W-1 D"]


class H3(Mixer):
    """Queries read what a diagonal state space keeps of the products of shifted keys and values (arXiv 2212.14052).

        y = q ⊙ SSM_diag(SSM_shift(k) ⊗ v)        q, k, v = x W_q, x W_k, x W_v

    SSM_shift, whose matrix shifts its state by one place, is a causal convolution over `shift_size` tokens, one filter
    a channel. SSM_diag is S4D with its skip, one a head of `head_width` channels, shared by all their products.
    """

    d_model: int
    head_width: int = 1
    state_size: int = 64
    shift_size: int = 64
    initialisation: str = "lin"
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        (batch, length, _), P = x.shape, self.head_width
        ssm_before, shift_before = state or (None, self.init_state(batch, dtype=accumulator(x.dtype)).shift)
        q, k, v = (projection(self.d_model, f"{name}_proj", self)(x) for name in "qkv")
        shift = ShortConvolution(self.shift_size, True, self.dtype, self.param_dtype, False, name="shift")
        k, shift_after = shift(k, shift_before, segment_ids)
        q, k, v = (split_heads(a, P) for a in (q, k, v))
        # Each product of a key's and a value's channel is a sequence of its own, in all heads' state spaces.
        products = jnp.einsum("bthi,bthj->bijth", k, v).reshape(batch * P * P, length, -1)
        ids = None if segment_ids is None else jnp.repeat(segment_ids, P * P, axis=0)
        ssm = self._ssm(name="ssm")
        fold = lambda s: StateSpaceState(jnp.moveaxis(s, 1, 3).reshape(batch * P * P, -1, self.state_size // 2))
        kept, after = ssm.prefill(products, None if ssm_before is None else fold(ssm_before), ids)
        y = jnp.einsum("bthi,bijth->bthj", q, kept.reshape(batch, P, P, length, -1))
        y = projection(self.d_model, "out_proj", self)(y.reshape(x.shape).astype(x.dtype))
        return y, H3State(jnp.moveaxis(after.ssm.reshape(batch, P, P, *after.ssm.shape[1:]), 3, 1), shift_after)

    def start(self, x, *, max_length: int | None = None):
        """None, as of a `StateSpace`."""

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> H3State:
        P = self.head_width
        if P < 1 or self.d_model % P:
            raise ValueError(f"head_width={P} does not divide d_model={self.d_model}.")
        if self.shift_size < 1:
            raise ValueError(f"shift_size={self.shift_size}; H3 takes 1 or more.")
        (ssm,) = self._ssm(parent=None).init_state(batch_size * P * P, dtype=dtype)
        ssm = ssm.reshape(batch_size, P, P, *ssm.shape[1:])
        return H3State(jnp.moveaxis(ssm, 3, 1), jnp.zeros((batch_size, self.shift_size - 1, self.d_model), dtype))

    @nn.nowrap
    def _ssm(self, **options) -> DiagonalStateSpace:
        """One channel a head."""
        return DiagonalStateSpace(
            self.d_model // self.head_width, self.state_size, self.initialisation, impl=self.impl, dtype=self.dtype,
            param_dtype=self.param_dtype, **options,
        )  # fmt: skip
