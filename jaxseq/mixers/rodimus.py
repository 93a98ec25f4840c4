"""Rodimus' data-dependent tempered selection."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.low_rank import low_rank
from ..layers.mixer import Mixer, at_least
from ..layers.normalised import unit
from ..layers.projection import projection
from ..layers.short_convolution import ShortConvolution
from ..shapes import Array, Float, Int, accumulator, typed


class RodimusState(NamedTuple):
    matrix: Float[Array, "B 1 K V"]
    conv: Float[Array, "B W-1 V"]


class Rodimus(Mixer):
    """One head of linear attention whose write and decay share a tempered gate (arXiv 2410.06577, section 4).

        h = x W_h        c = silu(conv(h))        γ = softplus(c W_γ + b_γ)        τ = σ(c W_τ + b_τ)
        k = (c W_k / ‖·‖) ⊙ γ^τ        v = σ(h W_1 W_2 + b) ⊙ h        S_t = diag(exp(−γ_t τ_t)) S_{t-1} + k_t v_tᵀ
        o_t = K^-½ S_tᵀ (c_t W_q)        y_t = RMSNorm((o_t + w ⊙ c_t) ⊙ silu(x_t W_z)) W_o

    Between the projections there are `expand` · d_model channels, the width of the values; keys have `key_width`.
    """

    d_model: int
    expand: int = 2
    key_width: int = 64
    gate_rank: int = 16
    conv_window: int = 4
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        width, K = self._width(), self.key_width
        h, z = (projection(width, f"{name}_proj", self)(x) for name in ("up", "gate"))
        convolution = ShortConvolution(self.conv_window, True, self.dtype, self.param_dtype, name="conv")
        c, conv = convolution(h, state.conv, segment_ids)
        q, k = projection(K, "q_proj", self)(c), projection(K, "k_proj", self)(c)
        gates = lambda name: projection(K, f"{name}_proj", self, use_bias=True)(c).astype(accumulator(c.dtype))
        z_gamma, tau = gates("decay"), nn.sigmoid(gates("temperature"))
        gamma = nn.softplus(z_gamma)
        k = unit(k.astype(tau.dtype), least=1e-12) * jnp.exp(tau * _log_softplus(z_gamma))
        v = nn.sigmoid(low_rank("value", self, self.gate_rank, width, use_bias=True)(h)) * h
        one_head = lambda a: a[:, :, None]
        o, matrix = ops.gated_linear_attention(
            *map(one_head, (q, k.astype(q.dtype), v, -gamma * tau)), initial_state=state.matrix,
            segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        skip = self.param("skip", nn.initializers.ones, (width,), self.param_dtype).astype(c.dtype)[None, None]
        norm = nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        y = projection(self.d_model, "out_proj", self)(norm((o[:, :, 0] + skip * c) * nn.silu(z)))
        return y, RodimusState(matrix.astype(state.matrix.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> RodimusState:
        matrix = jnp.zeros((batch_size, 1, self.key_width, self._width()), accumulator(dtype))
        return RodimusState(matrix, jnp.zeros((batch_size, self.conv_window - 1, self._width()), dtype))

    @nn.nowrap
    def _width(self) -> int:
        """Channels between the projections."""
        at_least(self, expand=1, key_width=1, gate_rank=1, conv_window=1)
        return self.expand * self.d_model


def _log_softplus(z):
    """log softplus(z), which is z where softplus(z) is about to round to zero."""
    return jnp.where(z < -15, z, jnp.log(nn.softplus(jnp.maximum(z, -15))))
