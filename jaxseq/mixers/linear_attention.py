"""Linear attention: a feature map in the place of the softmax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.feature_maps import feature_map, feature_width
from ..layers.mixer import Mixer
from ..layers.normalised import normalised_attention
from ..layers.projection import projection, split_heads
from ..shapes import Array, Float, Int, accumulator, typed


class LinearAttentionState(NamedTuple):
    matrix: Float[Array, "B H F V"]  # with `normalise` one column more: the sum of φ(k)


class LinearAttention(Mixer):
    """Attention with weights φ(q_t)·φ(k_s), so that a matrix holds the past (arXiv 2006.16236, section 3.3).

        S_t = S_{t-1} + φ(k_t) v_tᵀ        z_t = z_{t-1} + φ(k_t)
        o_t = F^-½ S_tᵀ φ(q_t) / (F^-½ z_tᵀ φ(q_t) + ε)        y_t = o_t W_o

    `feature_map` is a name in `layers.feature_maps` or a function from `B T H K` to the `B T H F` of φ; maps with
    parameters have their own for queries and for keys. Without `normalise`, z is left out. With `num_kv_heads` fewer
    heads of key and value each serve a run of query heads, each of which keeps a state. With `norm_eps`, o_t goes
    through an RMSNorm per head with one weight vector for all heads, as in later work.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str | Callable = "elu"
    normalise: bool = True
    expand_k: float = 1.0
    expand_v: float = 1.0
    epsilon: float = 1e-10
    norm_eps: float | None = None
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        heads, kv_heads, K, V = self._sizes()
        split = lambda name, count, width: split_heads(projection(count * width, f"{name}_proj", self)(x), width)
        features = lambda name: feature_map(self.feature_map, self, name=f"{name}_features")
        q, k, v = features("q")(split("q", heads, K)), features("k")(split("k", kv_heads, K)), split("v", kv_heads, V)
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
        options = dict(initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl)
        if self.normalise:
            o, matrix = normalised_attention(q, k, v, epsilon=self.epsilon, **options)
        else:
            o, matrix = ops.gated_linear_attention(q, k, v, **options)
        if self.norm_eps is not None:
            o = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(o)
        y = projection(self.d_model, "out_proj", self)(o.reshape(*x.shape[:2], -1))
        return y, LinearAttentionState(matrix.astype(state.matrix.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LinearAttentionState:
        heads, _, K, V = self._sizes()
        shape = (batch_size, heads, feature_width(self.feature_map, self, K), V + self.normalise)
        return LinearAttentionState(jnp.zeros(shape, accumulator(dtype)))

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int, int]:
        """Heads, key-value heads, key width and value width per head."""
        return self.key_value_heads(self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)
