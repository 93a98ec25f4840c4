"""Log-linear attention: a state for the last token, for the last two, for the four before …"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import softplus_decay
from ..layers.gated_norm import GatedRMSNorm
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import convolved, empty_convolutions
from ..ops.log_linear_attention import LogLinearState
from ..shapes import Array, Float, Int, accumulator, typed


class LogLinearAttentionState(NamedTuple):
    runs: LogLinearState
    conv: tuple[Float[Array, "B W-1 _"], ...]  # what the convolution of each projection still sees; empty without


class LogLinearAttention(Mixer):
    """Linear attention with a decay a head and as many states as time has bits (arXiv 2506.04761, section 3).

        o_t = K^-½ Σ_{s ≤ t} exp(Σ_{s<u≤t} g_u) λ_t[ℓ(t, s)] (q_t·k_s) v_s        λ_t = softplus(Λ ⊙ (x_t W_λ))
        g_t = −exp(A_log) softplus(x_t W_a + b_a)        y_t = RMSNorm(o_t ⊙ silu(x_t W_g)) W_o

    ℓ(t, t) = 0, and ℓ(t, s) is 1 + the highest bit in which the places t and s differ; the last of `num_levels` L
    levels also takes what is older. The state is (L − 1) K V numbers a head, whatever the length. Λ is a number a head
    and level, one at the start. Queries, keys and values go through a causal convolution and SiLU.

    The paper puts the levels into Mamba-2 and Gated DeltaNet; this is the former's gate, decay and norm around heads of
    query and key of their own, without its step sizes on values and its skip.
    """

    d_model: int
    num_heads: int = 4
    num_levels: int = 12
    expand_k: float = 1.0
    expand_v: float = 1.0
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
        H, (K, V) = self.num_heads, self._sizes()
        (q, k, v), conv = convolved(self, x, {"q": H * K, "k": H * K, "v": H * V}, state.conv, segment_ids)
        wide = accumulator(x.dtype)
        strength = self.param("level_scales", nn.initializers.ones, (H, self.num_levels), self.param_dtype)
        z = split_heads(projection(H * self.num_levels, "level_proj", self)(x).astype(wide), self.num_levels)
        o, runs = ops.log_linear_attention(
            split_heads(q, K), split_heads(k, K), split_heads(v, V), nn.softplus(strength.astype(wide)[None, None] * z),
            softplus_decay(self, x, H), initial_state=state.runs, segment_ids=segment_ids, chunk_size=self.chunk_size,
            impl=self.impl,
        )  # fmt: skip
        gate = projection(H * V, "gate_proj", self)(x)
        norm = GatedRMSNorm(1, self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        y = projection(self.d_model, "out_proj", self)(norm(o.reshape(gate.shape), gate))
        runs = runs._replace(sums=runs.sums.astype(state.runs.sums.dtype))
        return y, LogLinearAttentionState(runs, conv)

    @nn.nowrap
    def init_state(
        self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32
    ) -> LogLinearAttentionState:
        at_least(self, num_levels=2)
        H, (K, V) = self.num_heads, self._sizes()
        sums = jnp.zeros((batch_size, H, self.num_levels - 1, K, V), accumulator(dtype))
        conv = empty_convolutions(self, batch_size, (H * K, H * K, H * V), dtype)
        return LogLinearAttentionState(LogLinearState(sums, jnp.zeros(batch_size, jnp.int32)), conv)

    @nn.nowrap
    def _sizes(self) -> tuple[int, ...]:
        """Key width and value width per head."""
        return self.head_widths(self.num_heads, expand_k=self.expand_k, expand_v=self.expand_v)
