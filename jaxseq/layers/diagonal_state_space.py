"""One diagonal state space a channel: a global convolution in training and a recurrence in decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..ops.state_space import DISCRETISATIONS
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from .gated_output import GATED_OUTPUTS
from .initialisers import S4D_FREQUENCIES, S4D_INITIALISATIONS, s4d_eigenvalues
from .state_space import (
    POSITIVE,
    StateSpace,
    StateSpaceState,
    as_complex,
    check_choice,
    check_pairs,
    check_steps,
    empty_state_space,
    in_turn,
    pairs,
    parameter,
    positive,
    readouts,
    state_space_layer,
    step_size,
)


class DiagonalStateSpace(StateSpace):
    """S4D without what its layer adds at the end (arXiv 2206.11893, section 3); its fields are those of `S4D`."""

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
    random_real: bool = False
    random_imag: bool = False
    untied_dt: bool = False
    rate: float = 1.0
    bandlimit: float | None = None
    bidirectional: bool = False
    output: str = "identity"
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
        log_A, B, *C = self._discrete(accumulator(x.dtype))
        run = lambda u, direction, **options: ops.diagonal_state_space(
            u, log_A, B, C[direction], impl=self.impl, **options
        )
        kernel = lambda direction, length: ops.diagonal_kernel(log_A, B, C[direction], length)
        return state_space_layer(self, run, kernel, x, state, segment_ids, mask)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> StateSpaceState:
        self._check()
        return empty_state_space(self, batch_size, self.state_size // 2, dtype)

    def _discrete(self, dtype):
        """log Ā, B̄, C, each `D N/2`, and a C for the other direction of time, from the parameters."""
        names = in_turn(self, S4D_INITIALISATIONS, "initialisation")
        H, M, S = self.d_model, self.state_size // 2, len(names)
        A0, B0 = (
            np.stack(values) for values in zip(*(s4d_eigenvalues(n, self.state_size) for n in names), strict=True)
        )

        def real(key, shape, dtype):
            value = jax.random.uniform(key, shape, dtype) if self.random_real else -A0.real
            return positive(value, self.real_map)(key, shape, dtype)

        def imaginary(key, shape, dtype):
            which, drawn = np.array(names)[:, None], {}
            if "random" in names:
                drawn["random"] = jnp.exp(jax.random.normal(key, shape, dtype))
            if self.random_imag:
                n = jax.random.uniform(key, shape, dtype, maxval=M)
                drawn |= {name: f(n, self.state_size) for name, f in S4D_FREQUENCIES.items() if name in names}
            value: Any = -A0.imag  # NumPy's where nothing is drawn: `positive` knows it under `jit`
            for name, numbers in drawn.items():
                value = jnp.where(which == name, numbers, jnp.asarray(value, dtype))
            return positive(value, self.imag_map)(key, shape, dtype)

        param = parameter(self, dtype)
        dt = step_size(self, param, H, M if self.untied_dt else 1, kind=self.dt_map)
        A_real, A_imag = param("A_real", real, S, M), param("A_imag", imaginary, S, M)
        B = as_complex(param("B", pairs(B0), S, M, 2))
        A = jax.lax.complex(-POSITIVE[self.real_map][0](A_real), -POSITIVE[self.imag_map][0](A_imag))
        A, B = (jnp.tile(a, (H // S, 1)) for a in (A, B))
        C = readouts(self, param, H, M)
        if self.bandlimit is not None:
            C = [jnp.where(dt * jnp.abs(A.imag) < jnp.pi * self.bandlimit, c, 0) for c in C]
        return *DISCRETISATIONS[self.discretisation](A, B, dt.astype(A.dtype)), *C

    @nn.nowrap
    def _check(self) -> None:
        check_choice(self, tuple(DISCRETISATIONS), "discretisation")
        check_choice(self, tuple(POSITIVE), "real_map", "imag_map")
        check_choice(self, ("exp", "softplus"), "dt_map")
        names = in_turn(self, S4D_INITIALISATIONS, "initialisation")
        for field in ("random_real", "random_imag"):
            if getattr(self, field) and (fixed := set(names) - {"random", *S4D_FREQUENCIES}):
                drawn = ", ".join(S4D_FREQUENCIES)
                raise ValueError(f"{field}=True, initialisation={min(fixed)!r}; drawn are those of {drawn}, random.")
        if self.imag_map == "sigmoid" and (self.random_imag or "random" in names):
            raise ValueError("imag_map='sigmoid' reaches numbers below 1; imaginary parts that are drawn are larger.")
        if self.bandlimit is not None and not self.bandlimit > 0:
            raise ValueError(f"bandlimit={self.bandlimit}; {type(self).__name__} takes a number above 0, or None.")
        check_pairs(self)
        check_steps(self)
        check_choice(self, GATED_OUTPUTS, "output")
