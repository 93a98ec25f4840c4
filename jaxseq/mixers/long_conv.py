"""Long convolutions with a filter of free taps."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.implicit_filter import ExplicitFilter
from ..layers.long_convolution import check_length, empty_filter_state
from ..layers.mixer import Mixer
from ..layers.projection import projection
from ..ops.online_convolution import ConvolutionState, online_convolution
from ..shapes import Array, Float, Int, typed
from ..sharded import devices


class LongConv(Mixer):
    """y = GELU(k * x + D ⊙ x) W + b, with a tap of k for each lag up to `max_length` (arXiv 2302.06646).

    With `squash` λ taps lose λ of their size, those below it are zero: the paper's way to smooth kernels. The state is
    2 P numbers a channel with P the power of two from `max_length` on, or from that of `init_state` where fewer tokens
    will come.
    """

    d_model: int
    max_length: int = 1024
    squash: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        check_length("LongConv", x.shape[1] * devices(), self.max_length)
        taps = ExplicitFilter(self.d_model, self.max_length, self.squash, self.param_dtype, name="filter")()
        convolved, state = online_convolution(x, taps, state, segment_ids)
        skip = self.param("D", nn.initializers.normal(1.0), (self.d_model,), self.param_dtype)
        y = nn.gelu(convolved + skip.astype(x.dtype)[None, None] * x)
        return projection(self.d_model, "out_proj", self, use_bias=True)(y), state

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> ConvolutionState:
        if self.squash < 0:
            raise ValueError(f"squash={self.squash}; LongConv takes 0 or more.")
        return empty_filter_state("LongConv", batch_size, self.max_length, self.d_model, max_length, dtype)

    @nn.nowrap
    def writes_in_place(self) -> bool:
        return True
