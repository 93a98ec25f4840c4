"""LightNet's linear attention."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.low_rank import low_rank
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..ops.rescaled import rescaled
from ..shapes import Array, Float, Int, accumulator, typed


class LightNetState(NamedTuple):
    matrix: Float[Array, "B H K V"]
    log_sum: Float[Array, "B 1 _"]


class LightNet(Mixer):
    """Linear attention whose keys are a softmax over all times so far (arXiv 2405.21022, section 4).

        z_t = log Σ_{s≤t} exp(x_s W_k)        k_t = exp(x_t W_k − z_t)
        S_t = diag(exp(z_{t-1} − z_t)) S_{t-1} + k_t v_tᵀ        o_t = K^-½ S_tᵀ silu(x_t W_q)
        y_t = (RMSNorm(o_t) ⊙ silu(x_t W_g1 W_g2)) W_o

    The norm is over all heads together; the gate is of rank `gate_rank`.
    """

    d_model: int
    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    gate_rank: int = 128
    norm_eps: float = 1e-6
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        K, V = self._sizes()
        widths = {"q": K, "k": K, "v": V}
        q, k, v = (projection(self.num_heads * width, f"{name}_proj", self)(x) for name, width in widths.items())
        k = k.astype(accumulator(k.dtype))
        k, g, _, log_sum = rescaled(None, k, state.log_sum, segment_ids)
        q, k, v, g = (split_heads(a, w) for a, w in ((nn.silu(q), K), (k.astype(q.dtype), K), (v, V), (g, K)))
        o, matrix = ops.gated_linear_attention(
            q, k, v, g, initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl
        )
        norm = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        gate = low_rank("gate", self, self.gate_rank, o.shape[2] * V)(x)
        y = projection(self.d_model, "out_proj", self)(norm(o.reshape(*x.shape[:2], -1)) * nn.silu(gate))
        return y, LightNetState(matrix.astype(state.matrix.dtype), log_sum)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LightNetState:
        K, V = self._sizes()
        matrix = jnp.zeros((batch_size, self.num_heads, K, V), accumulator(dtype))
        return LightNetState(matrix, jnp.full((batch_size, 1, self.num_heads * K), -jnp.inf, accumulator(dtype)))

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        at_least(self, gate_rank=1)
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
