"""Gated DeltaNet: the delta rule with a decay per head."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import softplus_decay
from ..layers.head_readout import head_readout
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, accumulator, typed


class GatedDeltaNet(Mixer):
    """The delta rule with a data-dependent decay per head (arXiv 2412.06464, section 3).

        g_t = −exp(A_log) softplus(x_t W_a + b_a)        β_t = σ(x_t W_b)
        S_t = (I − β_t k_t k_tᵀ) exp(g_t) S_{t-1} + β_t k_t v_tᵀ        o_t = K^-½ S_tᵀ q_t
        y_t = (RMSNorm(o_t) ⊙ silu(x_t W_g)) W_o

    Queries, keys and values go through a causal convolution and SiLU; queries and keys are unit vectors. exp(A_log)
    starts uniform in (0, 16), softplus(b_a) log-uniform in [0.001, 0.1]. `num_heads` heads of query and key each
    serve a run of the `num_value_heads`, as many when None. β_t is twice that with `negative_eigenvalues`, and
    without `forget_gate` g_t is zero. With `num_householders` more than 1 a token has as many keys, values and β, one
    correction each, after one decay (Gated DeltaProduct, arXiv 2502.10297, whose authors double β; DeltaProduct
    without the decay). `output_gate` False leaves silu(x_t W_g) out.
    """

    d_model: int
    num_heads: int = 4
    num_value_heads: int | None = None
    expand_k: float = 0.75
    expand_v: float = 1.5
    conv_window: int | None = 4
    negative_eigenvalues: bool = False
    forget_gate: bool = True
    num_householders: int = 1
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
        heads, K, V = self._sizes()
        n = self.num_householders
        widths = {"q": self.num_heads * K, "k": n * self.num_heads * K, "v": n * heads * V}
        (q, k, v), conv = convolved(self, x, widths, state.conv, segment_ids)
        each = lambda x, *rest: x.reshape(*x.shape[:2], n, -1, *rest)
        q, k, v = unit(split_heads(q, K)), unit(each(k, K)), each(v, V)
        beta = nn.sigmoid(projection(n * heads, "beta_proj", self)(x).astype(accumulator(x.dtype)))
        decay = softplus_decay(self, x, heads) if self.forget_gate else None
        o, matrix = ops.delta_product(
            q, k, v, each(2 * beta if self.negative_eigenvalues else beta), decay,
            initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        return head_readout(self, o, x), MatrixState(matrix.astype(state.matrix.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        heads, K, V = self._sizes()
        n = self.num_householders
        return empty_matrix_state(
            self, batch_size, (heads, K, V), (self.num_heads * K, n * self.num_heads * K, n * heads * V), dtype
        )

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int]:
        """Value heads, key width and value width per head."""
        at_least(self, num_householders=1)
        return self.value_heads(self.num_heads, self.num_value_heads, self.expand_k, self.expand_v)
