"""ReBased: linear attention with a quadratic whose place is learned."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..layers.feature_maps import quadratic
from ..layers.mixer import Mixer
from ..layers.normalised import normalised_attention
from ..layers.projection import projection, split_heads
from ..shapes import Array, Float, Int, accumulator, typed


class ReBasedState(NamedTuple):
    matrix: Float[Array, "B H F V+1"]  # the last column is the sum of φ(k)


class ReBased(Mixer):
    """Based with weights that reach zero (arXiv 2402.10644, section 4).

        q_t = γ ⊙ LayerNorm(x_t W_q) + β        k_t = γ ⊙ LayerNorm(x_t W_k) + β
        w_tj = (q_t·k_j)² / K = φ(q_t)·φ(k_j)
        o_t = Σ_{j≤t} w_tj v_j / (Σ_{j≤t} w_tj + ε)        y_t = o_t W_o

    `feature_width` is K; φ has K(K+1)/2 features. The norm is per head; queries, keys and heads share γ and β.
    Where all weights so far are near zero, ε bounds how much their rounding matters.
    """

    d_model: int
    num_heads: int = 4
    feature_width: int = 16
    expand_v: float = 1.0
    epsilon: float = 1e-5
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
        heads = lambda name, width: split_heads(projection(self.num_heads * width, f"{name}_proj", self)(x), width)
        norm = nn.LayerNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        o, matrix = normalised_attention(
            quadratic(norm(heads("q", K))), quadratic(norm(heads("k", K))), heads("v", V), epsilon=self.epsilon,
            scale=1 / K, initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size,
            impl=self.impl,
        )  # fmt: skip
        y = projection(self.d_model, "out_proj", self)(o.reshape(*x.shape[:2], -1))
        return y, ReBasedState(matrix.astype(state.matrix.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> ReBasedState:
        K, V = self._sizes()
        return ReBasedState(jnp.zeros((batch_size, self.num_heads, K * (K + 1) // 2, V + 1), accumulator(dtype)))

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        if self.feature_width < 2:
            raise ValueError(f"feature_width={self.feature_width}; ReBased takes 2 or more: a norm of 1 is constant.")
        return self.feature_width, *self.head_widths(self.num_heads, expand_v=self.expand_v)
