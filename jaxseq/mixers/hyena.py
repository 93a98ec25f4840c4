"""Hyena: gates and long convolutions in turn."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..layers.implicit_filter import ImplicitFilter
from ..layers.long_convolution import check_length, empty_filter_state
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection
from ..layers.short_convolution import ShortConvolution
from ..ops.online_convolution import ConvolutionState, online_convolution
from ..shapes import Array, Float, Int, typed
from ..sharded import devices


class HyenaState(NamedTuple):
    short: Float[Array, "B W-1 E"]
    long: tuple[ConvolutionState, ...]


class Hyena(Mixer):
    """Products of the input with itself, through long filters between (arXiv 2302.10866, definition 3.1).

        x_0, …, x_{N-1}, v = conv_3(u W_in + b)
        v ← k_n * (x_n ⊙ v) + b_n ⊙ (x_n ⊙ v)        n = 0, …, N − 2
        y = (x_{N-1} ⊙ v) W_out + b

    `order` N of 2 is one filter. Filters are implicit, `ImplicitFilter`, and reach `max_length` tokens back: longer
    inputs are refused, and decoding goes on beyond. The state is 2 P numbers a channel and filter, P the power of two
    from `max_length` on, or from that of `init_state` where fewer tokens will come.
    """

    d_model: int
    max_length: int = 1024
    order: int = 2
    filter_width: int = 64
    bands: int = 1
    frequency: float = 1.0
    conv_window: int = 3
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        check_length("Hyena", x.shape[1] * devices(), self.max_length)
        u = projection((self.order + 1) * self.d_model, "in_proj", self, use_bias=True)(x)
        u, short = ShortConvolution(self.conv_window, True, self.dtype, self.param_dtype, False, name="short")(
            u, state.short, segment_ids
        )
        *gates, v = jnp.split(u, self.order + 1, axis=-1)
        after = []
        for n in range(self.order - 1):
            v = gates[n] * v
            taps = ImplicitFilter(
                self.d_model, self.max_length, self.filter_width, 3, self.bands, True, self.frequency,
                self.param_dtype, name=f"filter_{n}",
            )()  # fmt: skip
            bias = self.param(f"bias_{n}", nn.initializers.normal(1.0), (self.d_model,), self.param_dtype)
            convolved, kept = online_convolution(v, taps, state.long[n], segment_ids)
            v = convolved + bias.astype(v.dtype)[None, None] * v
            after.append(kept)
        y = projection(self.d_model, "out_proj", self, use_bias=True)(gates[-1] * v)
        return y, HyenaState(short, tuple(after))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> HyenaState:
        at_least(self, order=2, conv_window=1, filter_width=1, bands=1)
        empty = lambda: empty_filter_state("Hyena", batch_size, self.max_length, self.d_model, max_length, dtype)
        short = jnp.zeros((batch_size, self.conv_window - 1, (self.order + 1) * self.d_model), dtype)
        return HyenaState(short, tuple(empty() for _ in range(self.order - 1)))

    @nn.nowrap
    def writes_in_place(self) -> bool:
        return True
