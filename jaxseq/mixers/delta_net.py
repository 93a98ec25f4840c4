"""DeltaNet: keys overwrite the values they find."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.head_readout import head_readout
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, accumulator, typed


class DeltaNet(Mixer):
    """Linear attention by the delta rule (arXiv 2406.06484, section 3.3).

        S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ        o_t = K^-½ S_tᵀ q_t        y_t = RMSNorm(o_t) W_o

    Queries, keys and values go through a causal convolution and SiLU, queries and keys are unit vectors, and
    β_t = σ(x_t W_b), twice that with `negative_eigenvalues` (arXiv 2411.12537). The norm is per head with one weight
    vector for all heads; with `output_gate` silu(x_t W_g) multiplies what it gives.
    """

    d_model: int
    num_heads: int = 4
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_window: int | None = 4
    negative_eigenvalues: bool = False
    output_gate: bool = False
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        K, V = self._sizes()
        widths = {"q": self.num_heads * K, "k": self.num_heads * K, "v": self.num_heads * V}
        (q, k, v), conv = convolved(self, x, widths, state.conv, segment_ids)
        q, k, v = unit(split_heads(q, K)), unit(split_heads(k, K)), split_heads(v, V)
        beta = nn.sigmoid(projection(self.num_heads, "beta_proj", self)(x).astype(accumulator(x.dtype)))
        beta = 2 * beta if self.negative_eigenvalues else beta
        o, matrix = ops.delta_rule(
            q, k, v, beta, initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size,
            impl=self.impl,
        )  # fmt: skip
        y = head_readout(self, o, x)
        return y, MatrixState(matrix.astype(state.matrix.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        K, V = self._sizes()
        H = self.num_heads
        return empty_matrix_state(self, batch_size, (H, K, V), (H * K, H * K, H * V), dtype)

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
