"""The linear recurrent unit."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.gated_output import GATED_OUTPUTS, gated_output
from ..layers.mixer import Mixer
from ..layers.state_space import as_complex, check_choice, parameter
from ..shapes import Array, Complex, Float, Int, accumulator, promoted, typed


class LRUState(NamedTuple):
    hidden: Complex[Array, "B N"]


class LRU(Mixer):
    """A stable complex diagonal recurrence with normalised input (arXiv 2303.06349, section 3).

        λ = exp(−exp(ν) + i exp(θ))        x_t = λ ⊙ x_{t-1} + exp(γ) ⊙ (B u_t)        y_t = Re(C x_t) + D ⊙ u_t
        out = a ⊙ σ(b),  (a, b) = GELU(y) W + bias, or another `output` of `layers.gated_output`

    λ starts uniform in the ring of radii `r_min` to `r_max`, its phase uniform in [0, max_phase]; exp(γ) starts at
    √(1 − |λ|²), which gives white noise a state of its own power.
    """

    d_model: int
    state_size: int = 64
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 6.283185307179586
    output: str = "full_glu"
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        H, N, wide = self.d_model, self.state_size, accumulator(x.dtype)
        param = parameter(self, wide)
        nu = param("nu_log", self._initial_nu, N)
        theta = param("theta_log", self._initial_theta, N)
        decay = jnp.exp(jax.lax.complex(-jnp.exp(nu), jnp.exp(theta)))
        gamma = param(
            "gamma_log", lambda _, shape, dtype: (0.5 * jnp.log(-jnp.expm1(-2 * jnp.exp(nu)))).astype(dtype), N
        )
        B = param("B", nn.initializers.normal((2 * H) ** -0.5), N, H, 2) * jnp.exp(gamma)[:, None, None]
        C = param("C", nn.initializers.normal(N**-0.5), H, N, 2)
        D = param("D", nn.initializers.normal(1.0), H)
        u = x.astype(wide)
        y, hidden = ops.mimo_state_space(
            u, decay[None, None], as_complex(B), as_complex(C), initial_state=state.hidden, segment_ids=segment_ids,
            impl=self.impl,
        )  # fmt: skip
        y = gated_output(self, (y + D[None, None] * u).astype(x.dtype), self.output)
        return y, LRUState(hidden.astype(state.hidden.dtype))

    def _initial_nu(self, key, shape, dtype):
        radius = jax.random.uniform(key, shape, dtype, self.r_min**2, self.r_max**2)
        return jnp.log(-0.5 * jnp.log(jnp.clip(radius, 1e-12, 1 - 1e-6)))

    def _initial_theta(self, key, shape, dtype):
        return jnp.log(jax.random.uniform(key, shape, dtype, 1e-12, self.max_phase))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> LRUState:
        check_choice(self, GATED_OUTPUTS, "output")
        if self.state_size < 1:
            raise ValueError(f"state_size={self.state_size}; LRU takes 1 or more.")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(f"r_min={self.r_min} and r_max={self.r_max}; LRU takes 0 <= r_min < r_max <= 1.")
        if not self.max_phase > 0:
            raise ValueError(f"max_phase={self.max_phase}; LRU takes a number above 0.")
        return LRUState(jnp.zeros((batch_size, self.state_size), promoted(dtype, jnp.complex64)))
