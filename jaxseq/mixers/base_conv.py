"""BaseConv: a gate that is linear in the token, on a convolution that no token moves."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ..layers.implicit_filter import ImplicitFilter
from ..layers.long_convolution import check_length, empty_filter_state
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection
from ..layers.short_convolution import ShortConvolution
from ..ops.online_convolution import online_convolution
from ..shapes import Array, Float, Int, typed
from ..sharded import devices


class BaseConv(Mixer):
    """The least gated convolution (arXiv 2312.04927): y = (u W + b_1) ⊙ (h * u + b_2) + u.

    `kernel_size` is the width of h. Where it is None h is as long as `max_length`, an implicit filter of ReLU, and
    h * u + u stands for h * u + b_2: the authors' code adds u twice. Their models have a short one first and a long
    one second. The state is kernel_size − 1 inputs, or 2 P numbers a channel, P the power of two from `max_length`, or
    that of `init_state` where fewer tokens will come, on.
    """

    d_model: int
    kernel_size: int | None = 3
    max_length: int = 1024
    filter_width: int = 16
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        gate = projection(self.d_model, "proj", self, use_bias=True)(x)
        if self.kernel_size is None:
            check_length("BaseConv", x.shape[1] * devices(), self.max_length)
            taps = ImplicitFilter(
                self.d_model, self.max_length, self.filter_width, 1, sine=False, param_dtype=self.param_dtype,
                name="filter",
            )()  # fmt: skip
            convolved, state = online_convolution(x, taps, state, segment_ids)
            convolved = convolved + x
        else:
            short = ShortConvolution(self.kernel_size, True, self.dtype, self.param_dtype, False, name="conv")
            convolved, state = short(x, state, segment_ids)
        return gate * convolved.astype(gate.dtype) + x.astype(gate.dtype), state

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        at_least(self, filter_width=1)
        if self.kernel_size is None:
            return empty_filter_state("BaseConv", batch_size, self.max_length, self.d_model, max_length, dtype)
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size={self.kernel_size}; BaseConv takes 1 or more, or None.")
        return jnp.zeros((batch_size, self.kernel_size - 1, self.d_model), dtype)

    @nn.nowrap
    def writes_in_place(self) -> bool:
        return self.kernel_size is None
