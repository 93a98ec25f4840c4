"""The hierarchically gated recurrent network."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import bounded_decay
from ..layers.mixer import Mixer
from ..layers.projection import projection
from ..layers.short_convolution import convolved, empty_convolutions
from ..shapes import Array, Float, Int, accumulator, typed


class HGRNState(NamedTuple):
    hidden: Float[Array, "B D"]
    conv: tuple[Float[Array, "B W-1 D"], ...]


class HGRN(Mixer):
    """A gated recurrence without recurrent weights, its forget gates bounded below (arXiv 2311.04823, section 3).

        a_t = b + (1 − b) σ(x_t W_f)        h_t = a_t ⊙ h_{t-1} + (1 − a_t) ⊙ silu(x_t W_i)
        y_t = (RMSNorm(h_t) ⊙ silu(x_t W_g)) W_o

    `lower_bound` b is a number or a tuple of one per channel, larger in higher layers of a model so that these remember
    for longer: the authors learn it, as sums over layers of a softmax. Real, as in the authors' later code; the paper's
    h turns by a learned phase. `conv_window` puts a causal convolution behind W_f and W_i.
    """

    d_model: int
    lower_bound: float | tuple[float, ...] = 0.0
    conv_window: int | None = None
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        widths = {"decay": self.d_model, "input": self.d_model}
        (z, i), conv = convolved(self, x, widths, state.conv, segment_ids, silu="never")
        g, complement = bounded_decay(z.astype(accumulator(z.dtype)), self.lower_bound)
        h, hidden = ops.linear_recurrence(
            jnp.exp(g), complement * nn.silu(i).astype(g.dtype), initial_state=state.hidden, segment_ids=segment_ids,
            chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        norm = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        o = norm(h) * nn.silu(projection(self.d_model, "gate_proj", self)(x))
        return projection(self.d_model, "out_proj", self)(o), HGRNState(hidden.astype(state.hidden.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> HGRNState:
        conv = empty_convolutions(self, batch_size, (self.d_model, self.d_model), dtype)
        return HGRNState(jnp.zeros((batch_size, self.d_model), accumulator(dtype)), conv)
