"""DSS: diagonal state spaces without conjugate pairs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.gated_output import GATED_OUTPUTS
from ..layers.hippo import eigenbasis, hippo
from ..layers.state_space import (
    StateSpace,
    StateSpaceState,
    check_choice,
    check_steps,
    empty_state_space,
    parameter,
    readouts,
    state_space_layer,
    step_size,
)
from ..shapes import Array, Bool, Float, Int, accumulator, typed

VERSIONS = ("softmax", "exp", "exp_no_scale", "clip")


class DSS(StateSpace):
    """A diagonal state space a channel, Λ shared by all channels, then GELU and a gated linear map (arXiv 2203.14343).

        K_l = Re Σ_n (w_n / Λ_n) softmax_l(l z_n)        or        K_l = Re Σ_n w_n (exp(z_n) − 1) / Λ_n exp(l z_n)
        z = dt_re Re Λ + i dt_im Im Λ,  y = K ∗ u + D u,  out = a ⊙ σ(b),  (a, b) = GELU(y) W + bias

    `version` "softmax" normalises over the first `length` lags, those of the training sequences, and leaves the sign of
    Re Λ free; "exp" has Re Λ = −exp(A_real), "exp_no_scale" also drops the factor, "clip" keeps Re Λ at 1e-4 or below.
    `state_size` N complex states are kept. Λ starts as the upper half of the spectrum of HiPPO-LegS of size 2 N. dt is
    one number a channel, or with `separate_dt` two that start alike. `rate`, `bidirectional` and `output` are as in
    S4D, `impl` is a form of `ops.diagonal_state_space`. Where Re Λ is positive the forms hold while Re z · length stays
    under 80.
    """

    d_model: int
    state_size: int = 64
    version: str = "exp"
    length: int | None = None
    separate_dt: bool = True
    dt_min: float = 1e-3
    dt_max: float = 0.1
    rate: float = 1.0
    bidirectional: bool = False
    output: str = "full_glu"
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
    ):
        self._check()
        state = self.resumed(x, state)
        log_A, B, *w = self._discrete(accumulator(x.dtype))
        C = [a / 2 for a in w]  # the op adds the conjugate of each state
        run = lambda u, direction, **options: ops.diagonal_state_space(
            u, log_A, B, C[direction], impl=self.impl, **options
        )
        kernel = lambda direction, length: ops.diagonal_kernel(log_A, B, C[direction], length)
        return state_space_layer(self, run, kernel, x, state, segment_ids, mask)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> StateSpaceState:
        self._check()
        return empty_state_space(self, batch_size, self.state_size, dtype)

    def _discrete(self, dtype):
        """z, B̄ and w, each `D N`, and a w for the other direction of time, from the parameters."""
        A, _, P = hippo("legs", 2 * self.state_size)
        start = eigenbasis(A, P)[0].conj()
        param, of = parameter(self, dtype), lambda value: lambda _, shape, dtype: jnp.asarray(value, dtype)
        exp = self.version.startswith("exp")
        A_real = param("A_real", of(jnp.log(-start.real) if exp else start.real), self.state_size)
        A_imag = param("A_imag", of(start.imag), self.state_size)
        real = -jnp.exp(A_real) if exp else jnp.minimum(A_real, 1e-4) if self.version == "clip" else A_real
        dt = step_size(self, param, self.d_model, 1, copies=2 if self.separate_dt else 1)
        z = jax.lax.complex(dt[:, :1] * real[None], dt[:, -1:] * A_imag[None])
        Lambda = jax.lax.complex(real, A_imag)[None]
        if self.version == "exp_no_scale":
            B = jnp.ones_like(z)
        elif self.version == "softmax":
            # Of exp(l z), or of exp((l − length + 1) z) where that grows with l: no power is above one.
            grows = z.real > 0
            length = self.length or 1
            last = jnp.where(grows, jnp.exp((1 - length) * z), 1)
            falling = jnp.where(grows, -z, z)
            B = last * jnp.expm1(falling) * _reciprocal(Lambda * jnp.expm1(length * falling))
        else:
            B = jnp.expm1(z) * _reciprocal(Lambda)
        return z, B, *readouts(self, param, self.d_model, self.state_size, variance=2.0)

    @nn.nowrap
    def _check(self) -> None:
        check_choice(self, VERSIONS, "version")
        check_steps(self)
        check_choice(self, GATED_OUTPUTS, "output")
        if self.state_size < 1:
            raise ValueError(f"state_size={self.state_size}; DSS takes 1 or more.")
        if self.version == "softmax" and (self.length is None or self.length < 1):
            raise ValueError(f"length={self.length}; DSS(version='softmax') takes that of the training sequences.")


def _reciprocal(x: Array) -> Array:
    """1/x, finite near zero as in the authors' code."""
    return x.conj() / (x.real**2 + x.imag**2 + 1e-7).astype(x.dtype)
