"""Mamba-2: a selective state space with one decay a head."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.decays import rate_and_step
from ..layers.gated_norm import GatedRMSNorm
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..layers.short_convolution import ShortConvolution
from ..shapes import Array, Float, Int, accumulator, typed


class Mamba2State(NamedTuple):
    ssm: Float[Array, "B H N P"]
    conv: Float[Array, "B W-1 _"]


class Mamba2(Mixer):
    """The state space dual of linear attention, one decay a head (SSD; arXiv 2405.21060, section 7).

        z, x, B, C, r = u W_in;  x, B, C ← silu(conv(x, B, C));  dt = softplus(r + b_dt)
        S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)ᵀ        y_t = S_tᵀ C_t + D ⊙ x_t
        out = RMSNorm(y ⊙ silu(z)) W_out

    A = −exp(A_log) and dt are numbers a head, A starts uniform in −[1, 16], dt log-uniform in [0.001, 0.1]; the norm
    is per group. `expand` · d_model channels are split in `num_heads` heads, of 64 channels when None; `num_groups`
    sets of B and C each serve a run of heads. dt is kept in `dt_limit`, in decoding too. With `channel_skip` D is per
    channel, not per head.
    """

    d_model: int
    state_size: int = 128
    num_heads: int | None = None
    num_groups: int = 1
    expand: int = 2
    conv_window: int = 4
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    channel_skip: bool = False
    use_bias: bool = False
    norm_eps: float = 1e-5
    chunk_size: int | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        heads, P, N, width = self._sizes()
        groups = self.num_groups * N
        inputs = projection(2 * width + 2 * groups + heads, "in_proj", self, self.use_bias)(x)
        z, u, r = jnp.split(inputs, (width, 2 * width + 2 * groups), axis=-1)
        convolution = ShortConvolution(self.conv_window, self.conv_bias, self.dtype, self.param_dtype, name="conv")
        u, conv = convolution(u, state.conv, segment_ids)
        u, B, C = jnp.split(u, (width, width + groups), axis=-1)
        rate, step = rate_and_step(self, r, heads, slowest=1.0)
        dt = jnp.clip(nn.softplus(step), *self.dt_limit)
        v = split_heads(u, P)
        inputs = (dt * v.astype(dt.dtype)).astype(v.dtype)
        y, ssm = ops.gated_linear_attention(
            split_heads(C, N), split_heads(B, N), inputs, -(rate * dt)[..., 0], scale=1.0,
            initial_state=state.ssm, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        D = self.param("D", nn.initializers.ones, (heads, P) if self.channel_skip else (heads,), self.param_dtype)
        y += D.reshape(1, 1, heads, -1).astype(y.dtype) * v
        norm = GatedRMSNorm(self.num_groups, self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")
        y = projection(self.d_model, "out_proj", self, self.use_bias)(norm(y.reshape(z.shape), z))
        return y, Mamba2State(ssm.astype(state.ssm.dtype), conv)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> Mamba2State:
        heads, P, N, width = self._sizes()
        ssm = jnp.zeros((batch_size, heads, N, P), accumulator(dtype))
        channels = width + 2 * self.num_groups * N
        return Mamba2State(ssm, jnp.zeros((batch_size, self.conv_window - 1, channels), dtype))

    @nn.nowrap
    def _sizes(self) -> tuple[int, int, int, int]:
        """Heads, their channels, the state size, and the channels of all heads."""
        at_least(self, state_size=1, expand=1, conv_window=1, num_groups=1)
        low, high = self.dt_limit
        if not 0 <= low < high:
            raise ValueError(f"dt_limit={self.dt_limit}; Mamba2 takes (low, high) with 0 <= low < high.")
        width = self.expand * self.d_model
        heads = width // 64 if self.num_heads is None else self.num_heads
        if heads < 1 or width % heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide expand·d_model={width}, or by 64 where it is None."
            )
        if heads % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide num_heads={heads}.")
        return heads, width // heads, self.state_size, width
