"""S4D: one diagonal state space a channel, a global convolution in training and a recurrence in decoding."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.initialisers import S4D_INITIALISATIONS, inverse_softplus, log_uniform, s4d_eigenvalues
from ..layers.mixer import Mixer
from ..ops.state_space import DISCRETISATIONS
from ..shapes import Array, Complex, Float, Int, accumulator, check_width, promoted, typed


class S4DState(NamedTuple):
    ssm: Complex[Array, "B D N/2"]


#: Maps from a free parameter to a positive number, and their inverses.
POSITIVE: dict[str, tuple[Callable, Callable]] = {
    "exp": (jnp.exp, np.log),
    "none": (lambda x: x, lambda x: x),
    "relu": (lambda x: nn.relu(x) + 1e-4, lambda x: x - 1e-4),
    "softplus": (nn.softplus, inverse_softplus),
    "sigmoid": (nn.sigmoid, lambda x: np.log(x / (1 - x))),
}


class S4D(Mixer):
    """A diagonal state space a channel, then GELU and a gated linear map (arXiv 2206.11893).

        x' = A x + B u,  y = 2 Re(C x) + D u        A = −f(A_real) − i g(A_imag),  dt = exp(log_dt)
        out = a ⊙ σ(b),  (a, b) = GELU(y) W + bias

    `state_size` N counts conjugate pairs in full: N/2 complex states are kept. `initialisation` names how A starts,
    or a tuple of names for the copies in turn; `num_copies` sets of (A, B) are shared by the channels, channel h using
    copy h mod num_copies (None: one a channel). `rate` r reads an input sampled at 1/r of the training rate.
    `impl` is a form of `ops.diagonal_state_space`. The imaginary parts are negative, as in the authors' code.
    """

    d_model: int
    state_size: int = 64
    initialisation: str | tuple[str, ...] = "lin"
    discretisation: str = "zoh"
    real_map: str = "exp"
    imag_map: str = "none"
    dt_map: str = "exp"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    num_copies: int | None = None
    untied_dt: bool = False
    rate: float = 1.0
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        check_width(x, self.d_model, "S4D")
        self._check()
        log_A, B, C, D = self._discrete(accumulator(x.dtype))
        initial = None if state is None else state.ssm
        y, ssm = ops.diagonal_state_space(
            x.astype(D.dtype), log_A, B, C, initial_state=initial, segment_ids=segment_ids, impl=self.impl
        )
        y = nn.gelu(y + D * x.astype(D.dtype), approximate=False).astype(x.dtype)
        a, b = jnp.split(
            nn.Dense(2 * self.d_model, dtype=self.dtype, param_dtype=self.param_dtype, name="out_proj")(y), 2, -1
        )
        return a * nn.sigmoid(b), S4DState(ssm if state is None else ssm.astype(state.ssm.dtype))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> S4DState:
        self._check()
        return S4DState(jnp.zeros((batch_size, self.d_model, self.state_size // 2), promoted(dtype, jnp.complex64)))

    def _discrete(self, dtype):
        """log Ā, B̄, C, each `D N/2`, and D `1 1 D`, from the parameters."""
        H, M, S = self.d_model, self.state_size // 2, self.num_copies or self.d_model
        names = (self.initialisation,) if isinstance(self.initialisation, str) else self.initialisation
        rng = np.random.default_rng(0)  # for "random" alone: a module's start is a function of its fields and key
        copies = [s4d_eigenvalues(names[i % len(names)], self.state_size, rng) for i in range(S)]
        A0, B0 = (np.stack(values) for values in zip(*copies, strict=True))
        constant = lambda value: lambda _, shape, dtype: jnp.asarray(value, dtype).reshape(shape)
        positive = lambda value, name: POSITIVE[name][1](np.maximum(value, 1e-4))
        normal = nn.initializers.normal(0.5**0.5)
        initial_dt = log_uniform(self.dt_min, self.dt_max)
        if self.dt_map == "softplus":
            initial_dt = lambda *args: inverse_softplus(jnp.exp(log_uniform(self.dt_min, self.dt_max)(*args)))
        param = lambda name, initialiser, *shape: self.param(name, initialiser, shape, self.param_dtype).astype(dtype)
        log_dt = param("log_dt", initial_dt, H, M if self.untied_dt else 1)
        A_real = param("A_real", constant(positive(-A0.real, self.real_map)), S, M)
        A_imag = param("A_imag", constant(positive(-A0.imag, self.imag_map)), S, M)
        B = param("B", constant(np.stack([B0.real, B0.imag], axis=-1)), S, M, 2)
        C = param("C", normal, H, M, 2)
        D = param("D", nn.initializers.normal(1.0), H)
        A = jax.lax.complex(-POSITIVE[self.real_map][0](A_real), -POSITIVE[self.imag_map][0](A_imag))
        A, B = (jnp.tile(a, (H // S, 1)) for a in (A, jax.lax.complex(B[..., 0], B[..., 1])))
        dt = (self.rate * POSITIVE[self.dt_map][0](log_dt)).astype(A.dtype)
        log_A, B = DISCRETISATIONS[self.discretisation](A, B, dt)
        return log_A, B, jax.lax.complex(C[..., 0], C[..., 1]), D[None, None]

    @nn.nowrap
    def _check(self) -> None:
        choices = {
            "discretisation": tuple(DISCRETISATIONS), "real_map": tuple(POSITIVE), "imag_map": tuple(POSITIVE),
            "dt_map": ("exp", "softplus"),
        }  # fmt: skip
        given = {
            "initialisation": self.initialisation if isinstance(self.initialisation, tuple) else (self.initialisation,)
        }
        given |= {name: (getattr(self, name),) for name in choices}
        choices["initialisation"] = S4D_INITIALISATIONS
        for name, values in given.items():
            for value in values:
                if value not in choices[name]:
                    raise ValueError(f"{name}={value!r} is unknown to S4D; choose one of {', '.join(choices[name])}.")
        if self.state_size < 2 or self.state_size % 2:
            raise ValueError(f"state_size={self.state_size}; S4D takes an even number: states come in conjugate pairs.")
        if self.num_copies is not None:
            self.checked_heads(num_copies=self.num_copies)
        if not 0 < self.dt_min < self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} and dt_max={self.dt_max}; S4D takes 0 < dt_min < dt_max.")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}; S4D takes a positive ratio of sampling intervals.")
