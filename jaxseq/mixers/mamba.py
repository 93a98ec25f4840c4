"""Mamba: a selective state space."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..exact import matmul
from ..layers.initialisers import step_size_bias, symmetric_uniform
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection
from ..layers.short_convolution import ShortConvolution
from ..shapes import Array, Float, Int, accumulator, typed


class MambaState(NamedTuple):
    ssm: Float[Array, "B D N"]
    conv: Float[Array, "B W-1 D"]


class Mamba(Mixer):
    """The selective state space S6 between a convolution and a gate (arXiv 2312.00752, section 3.4).

        x, z = u W_in;  x ← silu(conv(x));  (r, B, C) = x W_x;  dt = softplus(r W_dt + b_dt)
        h_t = exp(dt_t A) ⊙ h_{t-1} + (dt_t x_t) B_tᵀ        y_t = ((h_t C_t + D ⊙ x_t) ⊙ silu(z_t)) W_out

    A = −exp(A_log) starts at −1 … −N, dt log-uniform in [dt_min, dt_max]. B enters by Euler's rule, as in the
    authors' code. Inner width is `expand` · d_model; `dt_rank` is ⌈d_model/16⌉ when None. W_out starts as the authors'
    does, uniform in ±1/√(inner width · num_layers), where the layers of the model are given.

    `selective` is the authors' ablation: those of "dt", "B" and "C" that are functions of the input. The others are
    parameters: b_dt alone, and a row of B, which starts at 1, and of C, normal, a channel. With () it is S4D-Real.
    """

    d_model: int
    state_size: int = 16
    expand: int = 2
    conv_window: int = 4
    conv_bias: bool = True
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    use_bias: bool = False
    selective: tuple[str, ...] = ("dt", "B", "C")
    num_layers: int | None = None
    chunk_size: int = 64
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        width, N = self.expand * self.d_model, self.state_size
        u, z = jnp.split(projection(2 * width, "in_proj", self, self.use_bias)(x), 2, axis=-1)
        convolution = ShortConvolution(self.conv_window, self.conv_bias, self.dtype, self.param_dtype, name="conv")
        u, conv = convolution(u, state.conv, segment_ids)
        dt, B, C = self._inputs(u)
        initial_A_log = lambda _, shape, dtype: jnp.broadcast_to(
            jnp.log(jnp.arange(1, N + 1, dtype=dtype))[None], shape
        )
        A = -jnp.exp(self.param("A_log", initial_A_log, (width, N), self.param_dtype).astype(dt.dtype))
        D = self.param("D", nn.initializers.ones, (width,), self.param_dtype)
        y, ssm = ops.selective_scan(
            u, dt, A, B, C, D, initial_state=state.ssm, segment_ids=segment_ids,
            chunk_size=self.chunk_size, impl=self.impl,
        )  # fmt: skip
        start = None if self.num_layers is None else symmetric_uniform((width * self.num_layers) ** -0.5)
        y = projection(self.d_model, "out_proj", self, self.use_bias, start)(y * nn.silu(z))
        return y, MambaState(ssm.astype(state.ssm.dtype), conv)

    def _inputs(self, u):
        """dt `B T D`, and B and C: `B T N` where they are functions of u, `D N` where they are not."""
        width, N, wide = u.shape[-1], self.state_size, accumulator(u.dtype)
        rank = math.ceil(self.d_model / 16) if self.dt_rank is None else self.dt_rank
        sizes = {name: size for name, size in dict(dt=rank, B=N, C=N).items() if name in self.selective}
        read = {}
        if sizes:
            parts = jnp.split(projection(sum(sizes.values()), "x_proj", self)(u), np.cumsum([*sizes.values()])[:-1], -1)
            read = dict(zip(sizes, parts, strict=True))
        # The step size, A and the states stay in float32: bfloat16 rounds exp(dt A) to 1.
        dt = jnp.zeros(u.shape, wide)
        if "dt" in read:
            dt_kernel = self.param("dt_kernel", symmetric_uniform(rank**-0.5), (rank, width), self.param_dtype)
            dt = matmul(read["dt"].astype(wide), dt_kernel.astype(wide))
        dt_bias = self.param("dt_bias", step_size_bias(self.dt_min, self.dt_max), (width,), self.param_dtype)
        constant = lambda name, start: self.param(name, start, (width, N), self.param_dtype)
        B = read["B"] if "B" in read else constant("B", nn.initializers.ones)
        C = read["C"] if "C" in read else constant("C", nn.initializers.normal(1.0))
        return nn.softplus(dt + dt_bias.astype(wide)[None, None]), B, C

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> MambaState:
        self._check()
        width = self.expand * self.d_model
        ssm = jnp.zeros((batch_size, width, self.state_size), accumulator(dtype))
        return MambaState(ssm, jnp.zeros((batch_size, self.conv_window - 1, width), dtype))

    @nn.nowrap
    def _check(self) -> None:
        at_least(self, state_size=1, expand=1, conv_window=1, dt_rank=1, num_layers=1)
        if not 0 < self.dt_min < self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} and dt_max={self.dt_max}; Mamba takes 0 < dt_min < dt_max.")
        if not isinstance(self.selective, tuple) or set(self.selective) - {"dt", "B", "C"}:
            raise ValueError(f"selective={self.selective!r}; Mamba takes a tuple of some of 'dt', 'B' and 'C'.")
