"""The recurrent block of Griffin and Hawk."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.block_linear import BlockLinear
from ..layers.initialisers import inverse_softplus
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection
from ..layers.short_convolution import ShortConvolution
from ..ops.convolution import taps
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from

#: How much stronger than sp(Λ) the decay of an open gate is: c of the paper.
SHARPNESS = 8.0
#: The slope of the input's multiplier near a decay of 1, where √ has none that is finite.
LARGEST_SLOPE = 1000.0


class RGLRUState(NamedTuple):
    hidden: Float[Array, "B D"]
    conv: Float[Array, "B W-1 D"]
    seen: Int[Array, "B 1"]  # 0 before the first token of a sequence, then 1


class RGLRU(Mixer):
    """The real-gated linear recurrent unit between a convolution and a gate (arXiv 2402.19427, section 2.4).

        x = conv(u W_x);  r = σ(x W_r + b_r);  i = σ(x W_i + b_i);  log a = −8 r ⊙ softplus(Λ)
        h_t = a_t ⊙ h_{t-1} + √(1 − a_t²) ⊙ (i_t ⊙ x_t)        y_t = (gelu(u_t W_y) ⊙ h_t) W_out

    W_r and W_i are block-diagonal, one block a head; the other projections and the convolution have biases. The first
    token of a sequence enters without the factor √(1 − a²), as there is nothing to balance. At r = 1, a starts
    uniform in [decay_min, decay_max], and weights normal with variance 1 / fan-in. `width` is 4/3 d_model, rounded up
    to a multiple of `num_heads`, when None.
    """

    d_model: int
    num_heads: int = 16
    width: int | None = None
    conv_window: int = 4
    decay_min: float = 0.9
    decay_max: float = 0.999
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        width = self._width()
        start = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        project = partial(projection, module=self, use_bias=True, kernel_init=start)
        gate = nn.gelu(project(width, "gate_proj")(x))
        convolution = ShortConvolution(self.conv_window, True, self.dtype, self.param_dtype, False, name="conv")
        u, conv = convolution(project(width, "in_proj")(x), state.conv, segment_ids)
        wide = accumulator(u.dtype)
        gates = lambda name: nn.sigmoid(
            BlockLinear(self.num_heads, True, self.dtype, self.param_dtype, name=name)(u).astype(wide)
        )
        Lambda = self.param("Lambda", self._initial_Lambda, (width,), self.param_dtype).astype(wide)
        log_a = -SHARPNESS * gates("decay_gate") * nn.softplus(Lambda)[None, None]
        once = zeros_from(x, x.shape[:2], jnp.int32) + 1
        (before, _), seen = taps(once, zeros_from(x, state.seen.shape, jnp.int32, plus=state.seen), segment_ids)
        multiplier = jnp.where(before[..., None] == 0, 1, _root(-jnp.expm1(2 * log_a)))
        inputs = multiplier * gates("input_gate") * u.astype(wide)
        h, hidden = ops.linear_recurrence(
            jnp.exp(log_a), inputs, initial_state=state.hidden, segment_ids=segment_ids, impl=self.impl
        )
        y = project(self.d_model, "out_proj")(gate * h.astype(gate.dtype))
        return y, RGLRUState(hidden.astype(state.hidden.dtype), conv, seen)

    def _initial_Lambda(self, key, shape, dtype):
        decay = jax.random.uniform(key, shape, dtype, self.decay_min, self.decay_max)
        return inverse_softplus(-jnp.log(decay) / SHARPNESS)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> RGLRUState:
        at_least(self, conv_window=1)
        if not 0 < self.decay_min < self.decay_max < 1:
            raise ValueError(
                f"decay_min={self.decay_min} and decay_max={self.decay_max}; RGLRU takes 0 < decay_min < decay_max < 1."
            )
        width = self._width()
        hidden = jnp.zeros((batch_size, width), accumulator(dtype))
        conv = jnp.zeros((batch_size, self.conv_window - 1, width), dtype)
        return RGLRUState(hidden, conv, jnp.zeros((batch_size, 1), jnp.int32))

    @nn.nowrap
    def _width(self) -> int:
        """Channels of the recurrence."""
        at_least(self, num_heads=1)
        if self.width is None:
            return -(-4 * self.d_model // (3 * self.num_heads)) * self.num_heads
        if self.width < 1 or self.width % self.num_heads:
            raise ValueError(f"width={self.width} is no multiple of num_heads={self.num_heads}.")
        return self.width


@jax.custom_jvp
def _root(x):
    """√x, its slope no more than `LARGEST_SLOPE`: at a decay of 1 the input's multiplier would have an infinite one."""
    return jnp.sqrt(x)


@_root.defjvp
def _root_slope(primals, tangents):
    y = _root(*primals)
    return y, tangents[0] * (0.5 / jnp.maximum(y, 0.5 / LARGEST_SLOPE))
