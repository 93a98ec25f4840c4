"""Based: linear attention with the Taylor series of the exponential."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..layers.feature_maps import taylor
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import normalised_attention
from ..layers.projection import projection, split_heads
from ..shapes import Array, Float, Int, accumulator, typed


class BasedState(NamedTuple):
    matrix: Float[Array, "B H F V+1"]  # the last column is the sum of φ(k)


class Based(Mixer):
    """Softmax attention to second order, with keys so narrow that its state is small (arXiv 2402.18668, section 4).

        s_tj = q_t·k_j / √K        w_tj = 1 + s_tj + s_tj²/2 = φ(q_t)·φ(k_j)
        o_t = Σ_{j≤t} w_tj v_j / (Σ_{j≤t} w_tj + ε)        y_t = o_t W_o

    `feature_width` is K; φ has 1 + K + K(K+1)/2 features. The authors' models alternate this mixer with short
    convolutions and with attention in a window of 64 tokens.
    """

    d_model: int
    num_heads: int = 4
    feature_width: int = 16
    expand_v: float = 1.0
    epsilon: float = 1e-6
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
        o, matrix = normalised_attention(
            taylor(heads("q", K)), taylor(heads("k", K)), heads("v", V), epsilon=self.epsilon, scale=1.0,
            initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        y = projection(self.d_model, "out_proj", self)(o.reshape(*x.shape[:2], -1))
        return y, BasedState(matrix.astype(state.matrix.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> BasedState:
        K, V = self._sizes()
        features = 1 + K + K * (K + 1) // 2
        return BasedState(jnp.zeros((batch_size, self.num_heads, features, V + 1), accumulator(dtype)))

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        at_least(self, feature_width=1)
        return self.feature_width, *self.head_widths(self.num_heads, expand_v=self.expand_v)
