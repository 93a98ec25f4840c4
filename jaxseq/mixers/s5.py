"""S5: one diagonal state space of all channels."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.gated_output import GATED_OUTPUTS, gated_output
from ..layers.hippo import eigenbasis, hippo
from ..layers.initialisers import drawn_wide, log_uniform
from ..layers.state_space import StateSpace, as_complex, check_choice, check_steps, parameter, zeroed
from ..ops.state_space import DISCRETISATIONS
from ..shapes import Array, Bool, Complex, Float, Int, accumulator, known, promoted, typed
from ..sharded import check_whole

#: How C `directions D N 2` starts, before its rotation by V; the last one is not rotated.
C_STARTS = {
    "trunc_standard_normal": nn.initializers.lecun_normal(batch_axis=(0, 1)),
    "lecun_normal": nn.initializers.lecun_normal(batch_axis=0),
    "complex_normal": nn.initializers.normal(0.5**0.5),
}


class S5State(NamedTuple):
    hidden: Complex[Array, "B N"]


class S5(StateSpace):
    """A multi-input, multi-output diagonal state space, then a gate (arXiv 2208.04933, section 3).

        x' = Λ x + B̃ u,  y = 2 Re(C̃ x) + D ⊙ u        Λ̄, B̄ from Λ, B̃ and a step exp(log_step) a state

    `state_size` N counts conjugate pairs in full, N/2 states are kept; with `conjugate` False all N are, and the
    factor 2 goes. Λ starts as the normal part of HiPPO-LegS of size N / `num_blocks`, once a block; B̃ = V*B and
    C̃ = C V. `C_init` is the authors': rows of C of norm 1 ("trunc_standard_normal"), of norm 1/√d_model
    ("lecun_normal"), or no V, and entries of C̃ of variance 1 ("complex_normal"). `clip` keeps Re Λ at −1e-4 or below;
    `rate` r reads an input sampled at 1/r of the training rate. With `bidirectional` a second scan runs backwards on
    the same inputs: the mixer looks at the whole sequence and has no state. `output` is a gate of
    `layers.gated_output`.

    Samples may come irregularly: an input `intervals` `B T` is the time since the token before, in steps, 0 or more
    (section 6.3). That of a first token says how long its own input lasted. `LanguageModel` and the like hand none on.
    """

    d_model: int
    state_size: int = 64
    num_blocks: int = 1
    conjugate: bool = True
    discretisation: str = "zoh"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    C_init: str = "trunc_standard_normal"
    clip: bool = False
    rate: float = 1.0
    bidirectional: bool = False
    output: str = "half_glu1"
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
        intervals: Float[Array, "B T"] | None = None,
    ):
        self._check()
        state = self.resumed(x, state)
        self.check_mask(mask)
        self._check_intervals(intervals)
        u = zeroed(x, mask).astype(accumulator(x.dtype))
        Lambda, B, C, D, step = self._continuous(u.dtype)
        Lambda, step = Lambda[None, None], step[None, None]
        if intervals is not None:
            step = step * intervals[..., None].astype(step.dtype)
        log_decay, gain = DISCRETISATIONS[self.discretisation](Lambda, jnp.ones_like(Lambda), step)
        if intervals is None:  # once for all of time
            B, gain = gain[0, 0, :, None] * B, None
        N = self._states()
        run = lambda C, **options: ops.mimo_state_space(
            u, jnp.exp(log_decay), B, (2 if self.conjugate else 1) * C, gain=gain, segment_ids=segment_ids,
            impl=self.impl, **options,
        )  # fmt: skip
        if self.bidirectional:
            check_whole("S5(bidirectional=True)", "give every device whole sequences")
            y, after = run(C[:, :N])[0] + run(C[:, N:], reverse=True)[0], None
        else:
            y, hidden = run(C, initial_state=None if state is None else state.hidden)
            after = S5State(hidden if state is None else hidden.astype(state.hidden.dtype))
        return gated_output(self, (y + D * u).astype(x.dtype), self.output), after

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> S5State:
        self._check()
        self.check_causal()
        return S5State(jnp.zeros((batch_size, self._states()), promoted(dtype, jnp.complex64)))

    @nn.nowrap
    def _states(self) -> int:
        return self.state_size // 2 if self.conjugate else self.state_size

    def _continuous(self, dtype):
        """Λ `N`, B̃ `N D`, C̃ `D N`, or twice as wide, D `1 1 D` and the steps `N`, complex, from the parameters."""
        H, directions = self.d_model, 2 if self.bidirectional else 1
        A, _, P = hippo("legs", self.state_size // self.num_blocks)
        eigenvalues, V = eigenbasis(A, P)
        if not self.conjugate:
            eigenvalues, V = np.concatenate([eigenvalues, eigenvalues.conj()]), np.concatenate([V, V.conj()], axis=1)
        eigenvalues, V = np.tile(eigenvalues, self.num_blocks), np.kron(np.eye(self.num_blocks), V)
        lecun = nn.initializers.lecun_normal()
        pairs = lambda M, dtype: jnp.stack([M.real, M.imag], axis=-1).astype(dtype)

        def initial_B(key, shape, dtype):
            drawn = lecun(key, (self.state_size, H), dtype)
            return pairs(
                jax.lax.complex(jnp.asarray(V.real.T, dtype) @ drawn, jnp.asarray(-V.imag.T, dtype) @ drawn), dtype
            )

        def initial_C(key, shape, dtype):
            rotated = self.C_init != "complex_normal"
            size = self.state_size if rotated else len(eigenvalues)
            C = as_complex(C_STARTS[self.C_init](key, (directions, H, size, 2), dtype))
            C = C @ jnp.asarray(V, promoted(dtype, jnp.complex64)) if rotated else C
            return pairs(jnp.concatenate(list(C), axis=-1), dtype)

        param = parameter(self, dtype)
        start = lambda value: lambda _, shape, dtype: jnp.asarray(value, dtype)
        N = len(eigenvalues)
        re, im = param("Lambda_re", start(eigenvalues.real), N), param("Lambda_im", start(eigenvalues.imag), N)
        step = self.rate * jnp.exp(param("log_step", log_uniform(self.dt_min, self.dt_max), N, 1))
        B, C = param("B", drawn_wide(initial_B), N, H, 2), param("C", drawn_wide(initial_C), H, directions * N, 2)
        D = param("D", nn.initializers.normal(1.0), H)
        Lambda = jax.lax.complex(jnp.minimum(re, -1e-4) if self.clip else re, im)
        return Lambda, as_complex(B), as_complex(C), D[None, None], step[:, 0].astype(Lambda.dtype)

    @nn.nowrap
    def _check_intervals(self, intervals) -> None:
        if intervals is not None and self.bidirectional:
            raise ValueError(
                "intervals: S5(bidirectional=True) takes none; what passed before a token is not what follows."
            )
        if (values := known(intervals)) is not None and not (fine := (values >= 0) & np.isfinite(values)).all():
            raise ValueError(f"intervals holds {values[~fine][0]}; S5 takes finite numbers of steps, 0 or more.")

    @nn.nowrap
    def _check(self) -> None:
        check_choice(self, tuple(DISCRETISATIONS), "discretisation")
        check_choice(self, GATED_OUTPUTS, "output")
        check_choice(self, tuple(C_STARTS), "C_init")
        check_steps(self)
        size, blocks = self.state_size, self.num_blocks
        if blocks < 1 or size < 2 * blocks or size % (2 * blocks):
            raise ValueError(f"state_size={size}, num_blocks={blocks}; S5 takes an even number of states a block.")
