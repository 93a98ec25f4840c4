"""Kimi delta attention: the delta rule with a decay per key channel."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.decays import rate_and_step
from ..layers.low_rank import low_rank
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer, check_min_log_decay
from ..layers.normalised import unit
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, typed


class KDA(Mixer):
    """Kimi delta attention: the delta rule with a data-dependent decay per key channel (arXiv 2510.26692).

        g_t = −exp(A_log) softplus(x_t W_f1 W_f2 + b_f)        β_t = σ(x_t W_b)
        S_t = (I − β_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ        o_t = K^-½ S_tᵀ q_t
        y_t = (RMSNorm(o_t) ⊙ σ(x_t W_g1 W_g2 + b_g)) W_o

    Queries, keys and values go through a causal convolution and SiLU; queries and keys are unit vectors. A_log is per
    head, exp(A_log) starts uniform in (1, 16), softplus(b_f) log-uniform in [0.001, 0.1]. The low ranks are the value
    width of a head. With `min_log_decay`, −5 say, g_t = min_log_decay · σ(exp(A_log) (x_t W_f1 W_f2 + b_f)) instead.
    `num_heads` heads of query and key each serve a run of the `num_value_heads`, as many when None. β_t is twice that
    with `negative_eigenvalues`, which channel gates do not have.

    With `channel_gates` erasing and writing have gates of their own, per channel, in place of β (Gated DeltaNet-2, as
    in flash-linear-attention): S_t = (I − k_t (σ(x_t W_b) ⊙ k_t)ᵀ) diag(exp g_t) S_{t-1} + k_t (σ(x_t W_w) ⊙ v_t)ᵀ.
    """

    d_model: int
    num_heads: int = 4
    num_value_heads: int | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    min_log_decay: float | None = None
    channel_gates: bool = False
    negative_eigenvalues: bool = False
    conv_window: int | None = 4
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
        widths = {"q": self.num_heads * K, "k": self.num_heads * K, "v": heads * V}
        (q, k, v), conv = convolved(self, x, widths, state.conv, segment_ids)
        q, k, v = unit(split_heads(q, K)), unit(split_heads(k, K)), split_heads(v, V)
        g = self._log_decay(x, heads, K, V)
        gates = lambda name, count: nn.sigmoid(projection(count, f"{name}_proj", self)(x).astype(g.dtype))
        options = dict(initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl)
        if self.channel_gates:
            q, k = (jnp.repeat(a, heads // self.num_heads, axis=2) for a in (q, k))
            erase = split_heads(gates("beta", heads * K), K) * jnp.exp(g)  # what is erased was decayed before
            v *= split_heads(gates("write", heads * V), V).astype(v.dtype)
            o, matrix = ops.dplr_recurrence(q, k, v, erase.astype(k.dtype) * k, -k, g, **options)
        else:
            beta = (1 + self.negative_eigenvalues) * gates("beta", heads)
            o, matrix = ops.delta_rule(q, k, v, beta, g, **options)
        o = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(o)
        o = o.reshape(*x.shape[:2], -1) * nn.sigmoid(low_rank("gate", self, V, heads * V, use_bias=True)(x))
        return projection(self.d_model, "out_proj", self)(o), MatrixState(matrix.astype(state.matrix.dtype), conv)

    def _log_decay(self, x, heads, K, V):
        rate, step = rate_and_step(self, low_rank("decay", self, V, heads * K)(x), heads, slowest=1.0)
        return (
            -rate * jax.nn.softplus(step)
            if self.min_log_decay is None
            else self.min_log_decay * nn.sigmoid(rate * step)
        )

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        heads, K, V = self._sizes()
        return empty_matrix_state(
            self, batch_size, (heads, K, V), (self.num_heads * K, self.num_heads * K, heads * V), dtype
        )

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int]:
        """Value heads, key width and value width per head."""
        check_min_log_decay(self)
        if self.channel_gates and self.negative_eigenvalues:
            raise ValueError("negative_eigenvalues=True doubles β; KDA(channel_gates=True) has none: take False.")
        return self.value_heads(self.num_heads, self.num_value_heads, self.expand_k, self.expand_v)
