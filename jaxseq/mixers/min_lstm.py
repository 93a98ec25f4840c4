"""minLSTM: an LSTM whose gates see the input alone."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer, at_least
from ..layers.positive import positive
from ..layers.projection import fan_in_projection, projection
from ..shapes import Array, Float, Int, accumulator, typed


class MinLSTMState(NamedTuple):
    hidden: Float[Array, "B D"]


class MinLSTM(Mixer):
    """The minimal long short-term memory (arXiv 2410.01201, section 3.2).

        f, i = σ(x W_f + b_f), σ(x W_i + b_i)        f' = f / (f + i)        i' = i / (f + i)
        h_t = f'_t ⊙ h_{t-1} + i'_t ⊙ g(x_t W_h + b_h)        y_t = h_t W_o        g(x) = x + ½ for x ≥ 0, else σ(x)

    Inner width is `expand` · d_model. The paper leaves W_o out where `expand` is 1.
    """

    d_model: int
    expand: int = 1
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        width, wide = self.expand * self.d_model, accumulator(x.dtype)
        forget, enter, candidate = (
            fan_in_projection(width, f"{name}_proj", self, self.d_model)(x).astype(wide)
            for name in ("forget", "input", "candidate")
        )
        # log i − log f: where both gates are shut, f + i is 0 and their ratio is not.
        ratio = jax.nn.log_sigmoid(enter) - jax.nn.log_sigmoid(forget)
        h, hidden = ops.linear_recurrence(
            nn.sigmoid(-ratio), nn.sigmoid(ratio) * positive(candidate), initial_state=state.hidden,
            segment_ids=segment_ids, impl=self.impl,
        )  # fmt: skip
        y = projection(self.d_model, "out_proj", self, kernel_init=symmetric_uniform(width**-0.5))(h.astype(x.dtype))
        return y, MinLSTMState(hidden.astype(state.hidden.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MinLSTMState:
        at_least(self, expand=1)
        return MinLSTMState(jnp.zeros((batch_size, self.expand * self.d_model), accumulator(dtype)))
