"""Gated linear attention."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.decays import retention_log_decays
from ..layers.head_readout import head_readout
from ..layers.low_rank import low_rank
from ..layers.matrix_state import MatrixState, empty_matrix_state
from ..layers.mixer import Mixer, above_zero, at_least, check_min_log_decay
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved
from ..shapes import Array, Float, Int, accumulator, typed

UNLEARNT = ("fixed", "none")
GATES = ("vector", "scalar", *UNLEARNT)


class GLA(Mixer):
    """Linear attention with a data-dependent decay per key channel (arXiv 2312.06635, section 4).

        log α_t = log σ(x_t W_a1 W_a2 + b_a) / τ
        S_t = diag(α_t) S_{t-1} + k_t v_tᵀ        o_t = K^-½ S_tᵀ q_t        y_t = (RMSNorm(o_t) ⊙ silu(x_t W_r)) W_o

    The norm is per head with one weight vector for all heads, and W_r has no bias, as in the authors' code (the paper
    writes LayerNorm and a bias). With `num_kv_heads` fewer heads of key, value and decay each serve a run of query
    heads, each of which keeps a state. `output_gate` False leaves r out. `conv_window` puts a causal convolution and
    SiLU on query, key and value.

    `gate` is the paper's ablation: this "vector" of decays; "scalar", one log σ(x_t w_a + b_a) / τ a head; "fixed",
    those of RetNet; or "none". Those that are learnt are no log below `min_log_decay`, where it is given.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    gate: str = "vector"
    gate_rank: int = 16
    gate_temperature: float = 16.0
    min_log_decay: float | None = None
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
        q, k, v = split_heads(q, K), split_heads(k, K), split_heads(v, V)
        k, v = (jnp.repeat(a, heads // kv_heads, axis=2) for a in (k, v))
        o, matrix = ops.gated_linear_attention(
            q, k, v, self._log_decay(x), initial_state=state.matrix, segment_ids=segment_ids,
            chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        return head_readout(self, o, x), MatrixState(matrix.astype(state.matrix.dtype), conv)

    def _log_decay(self, x):
        """One of the shapes that the op takes, for every query head."""
        heads, kv_heads, K, _ = self._sizes()
        if self.gate in UNLEARNT:
            return retention_log_decays(heads) if self.gate == "fixed" else None
        if self.gate == "scalar":
            z = projection(kv_heads, "decay_proj", self, use_bias=True)(x)
        else:
            z = split_heads(low_rank("decay", self, self.gate_rank, kv_heads * K, use_bias=True)(x), K)
        g = jax.nn.log_sigmoid(z.astype(accumulator(z.dtype))) / self.gate_temperature
        g = g if self.min_log_decay is None else jnp.maximum(g, self.min_log_decay)
        return jnp.repeat(g, heads // kv_heads, axis=2)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MatrixState:
        heads, kv_heads, K, V = self._sizes()
        return empty_matrix_state(self, batch_size, (heads, K, V), (heads * K, kv_heads * K, kv_heads * V), dtype)

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int, int]:
        """Heads, key-value heads, key width and value width per head."""
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is unknown to GLA; choose one of {', '.join(GATES)}.")
        at_least(self, gate_rank=1)
        above_zero(self, "gate_temperature")
        check_min_log_decay(self)
        if self.min_log_decay is not None and self.gate in UNLEARNT:
            raise ValueError(
                f"min_log_decay={self.min_log_decay} bounds what is learnt; GLA(gate={self.gate!r}) takes None."
            )
        return self.key_value_heads(self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)
