"""RetNet's multi-scale retention."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import retention_log_decays
from ..layers.head_readout import head_readout
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer
from ..layers.projection import split_heads
from ..layers.rotary import rotary
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, typed
from ..sharded import devices, first_position


class RetNet(Mixer):
    """Linear attention with a fixed decay per head and rotary positions (arXiv 2307.08621, section 2).

        S_t = γ_h e^{iθ} S_{t-1} + k_t v_tᵀ        o_t = K^-½ S_tᵀ q_t        y_t = (RMSNorm(o_t) ⊙ silu(x_t W_g)) W_o
        γ_h = 1 − 2^(−5−h), h = 0 … H − 1        θ_i = base^(−2i/K)

    e^{iθ} turns pairs of channels. Inside a call queries and keys are turned by their positions instead, and the
    state by all of them at the end, so that it counts no tokens: its keys are turned as the next token, at position 0,
    sees them. The norm is per head with one weight vector for all heads (the paper: a group norm, and divisions that a
    norm undoes). With `num_kv_heads` fewer heads of key and value each serve a run of query heads, each of which keeps
    a state. `conv_window` puts a causal convolution and SiLU on query, key and value. `output_gate` False leaves
    silu(x_t W_g) out.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 2.0
    rotary_base: float = 10000.0
    conv_window: int | None = None
    output_gate: bool = True
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        heads, kv_heads, K, V = self._sizes()
        widths = {"q": heads * K, "k": kv_heads * K, "v": kv_heads * V}
        (q, k, v), conv = convolved(self, x, widths, state.conv, segment_ids, silu="convolved")
        length = x.shape[1]
        positions = first_position(length) + jnp.arange(length, dtype=jnp.int32)
        q, k = (rotary(split_heads(a, K), positions, self.rotary_base) for a in (q, k))
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, split_heads(v, V)))
        o, matrix = ops.gated_linear_attention(
            q, k, v, retention_log_decays(self.num_heads), initial_state=state.matrix, segment_ids=segment_ids,
            chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        matrix = self._turned(matrix, -length * devices())
        return head_readout(self, o, x), MatrixState(matrix.astype(state.matrix.dtype), conv)

    def _turned(self, matrix, by: int):
        """Every key in the matrix turned by so many positions."""
        columns = jnp.moveaxis(matrix, 3, 1)
        return jnp.moveaxis(rotary(columns, jnp.full(columns.shape[1], by, jnp.int32), self.rotary_base), 1, 3)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        heads, kv_heads, K, V = self._sizes()
        return empty_matrix_state(self, batch_size, (heads, K, V), (heads * K, kv_heads * K, kv_heads * V), dtype)

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int, int]:
        """Heads, key-value heads, key width and value width per head."""
        if self.rotary_base <= 0:
            raise ValueError(f"rotary_base={self.rotary_base}; RetNet takes a number above 0.")
        return self.key_value_heads(self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)
