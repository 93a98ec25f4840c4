"""Comba: the delta rule as closed-loop control."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import softplus_decay
from ..layers.head_readout import head_readout
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, accumulator, typed


class Comba(Mixer):
    """A delta rule that erases what the state held before its decay, and corrects its output (arXiv 2506.02475).

        g_t = −exp(A_log) softplus(x_t W_a + b_a)        β_t = σ(x_t W_b)
        S_t = (exp(g_t) I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ        o_t = K^-½ S_tᵀ (q_t − D σ(c) k_t)
        y_t = (RMSNorm(o_t) ⊙ σ(x_t W_g)) W_o

    Queries, keys and values go through a causal convolution and SiLU; keys, and queries once corrected, are then unit
    vectors. D and c, per head, start at `correction` (0.02 for small models, in the authors' code) and at one. The
    decays start as in `GatedDeltaNet`. `num_heads` heads of query and key, D and c each serve a run of the
    `num_value_heads`, as many when None. `output_gate` False leaves σ(x_t W_g) out. The paper erases along σ(c) k; its
    authors' code makes that a unit vector, as here.
    """

    d_model: int
    num_heads: int = 4
    num_value_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    correction: float = 1.0
    conv_window: int | None = 4
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
        H, (heads, K, V) = self.num_heads, self._sizes()
        (q, k, v), conv = convolved(self, x, {"q": H * K, "k": H * K, "v": heads * V}, state.conv, segment_ids)
        q, k, v = split_heads(q, K), split_heads(k, K), split_heads(v, V)
        first = {"D": self.correction, "c": 1.0}
        D, c = (self.param(name, nn.initializers.constant(x), (H,), self.param_dtype) for name, x in first.items())
        q = unit(q - (D * nn.sigmoid(c)).astype(k.dtype)[None, None, :, None] * k)
        q, k = (jnp.repeat(a, heads // H, axis=2) for a in (q, unit(k)))
        beta = nn.sigmoid(projection(heads, "beta_proj", self)(x).astype(accumulator(x.dtype)))
        beta = beta[..., None].astype(v.dtype)
        o, matrix = ops.dplr_recurrence(
            q, k, beta * v, k, -beta * k, softplus_decay(self, x, heads), initial_state=state.matrix,
            segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        return head_readout(self, o, x, nn.sigmoid), MatrixState(matrix.astype(state.matrix.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        H, (heads, K, V) = self.num_heads, self._sizes()
        return empty_matrix_state(self, batch_size, (heads, K, V), (H * K, H * K, heads * V), dtype)

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int]:
        """Value heads, key width and value width per head."""
        return self.value_heads(self.num_heads, self.num_value_heads, self.expand_k, self.expand_v)
