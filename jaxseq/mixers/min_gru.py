"""minGRU: a GRU whose gates see the input alone."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.initialisers import symmetric_uniform
from ..layers.mixer import Mixer, at_least
from ..layers.positive import positive
from ..layers.projection import fan_in_projection, projection
from ..shapes import Array, Float, Int, accumulator, typed


class MinGRUState(NamedTuple):
    hidden: Float[Array, "B D"]


class MinGRU(Mixer):
    """The minimal gated recurrent unit (arXiv 2410.01201, section 3.1).

        z_t = σ(x_t W_z + b_z)        h̃_t = g(x_t W_h + b_h)        g(x) = x + ½ for x ≥ 0, σ(x) elsewhere
        h_t = (1 − z_t) ⊙ h_{t-1} + z_t ⊙ h̃_t        y_t = h_t W_o

    Inner width is `expand` · d_model. All weights start uniform within ± fan-in^-½, as linear layers of the authors'
    library do. The paper leaves W_o out where `expand` is 1.
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
        gate, candidate = (
            fan_in_projection(width, name, self, self.d_model)(x).astype(wide)
            for name in ("gate_proj", "candidate_proj")
        )
        h, hidden = ops.linear_recurrence(
            nn.sigmoid(-gate), nn.sigmoid(gate) * positive(candidate), initial_state=state.hidden,
            segment_ids=segment_ids, impl=self.impl,
        )  # fmt: skip
        y = projection(self.d_model, "out_proj", self, kernel_init=symmetric_uniform(width**-0.5))(h.astype(x.dtype))
        return y, MinGRUState(hidden.astype(state.hidden.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MinGRUState:
        at_least(self, expand=1)
        return MinGRUState(jnp.zeros((batch_size, self.expand * self.d_model), accumulator(dtype)))
