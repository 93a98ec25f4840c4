"""HGRN2: the gated recurrent network with a state of outer products."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import bounded_decay
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, accumulator, typed


class HGRN2(Mixer):
    """Gated linear attention whose key is what the decay leaves free (arXiv 2404.07904, section 3).

        a_t = b + (1 − b) σ(x_t W_f)        S_t = diag(a_t) S_{t-1} + (1 − a_t) v_tᵀ
        o_t = K^-½ S_tᵀ silu(x_t W_q)        y_t = RMSNorm(o_t) W_o

    `lower_bound` b is a number or a tuple of one per channel, larger in higher layers of a model so that these remember
    for longer: the authors learn it, as sums over layers of a softmax. The norm is over all heads together; the
    authors' heads are 128 channels wide. `conv_window` puts a causal convolution behind the projections of q, f and v.
    """

    d_model: int
    num_heads: int = 4
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
        widths = dict.fromkeys(("q", "decay", "v"), self.d_model)
        (q, z, v), conv = convolved(self, x, widths, state.conv, segment_ids, silu="never")
        g, k = bounded_decay(z.astype(accumulator(z.dtype)), self.lower_bound)
        q, k, v, g = (split_heads(a, self._width()) for a in (nn.silu(q), k.astype(q.dtype), v, g))
        o, matrix = ops.gated_linear_attention(
            q, k, v, g, initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl
        )
        o = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(o.reshape(x.shape))
        return projection(self.d_model, "out_proj", self)(o), MatrixState(matrix.astype(state.matrix.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        width = self._width()
        return empty_matrix_state(self, batch_size, (self.num_heads, width, width), (self.d_model,) * 3, dtype)

    @nn.nowrap
    def _width(self) -> int:
        """Channels a head, of keys as of values."""
        self.checked_heads(num_heads=self.num_heads)
        return self.d_model // self.num_heads
