"""S4: one state space a channel, its matrix diagonal plus low rank."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.gated_output import GATED_OUTPUTS
from ..layers.hippo import MEASURES
from ..layers.initialisers import diagonal_plus_low_rank
from ..layers.state_space import (
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
from ..shapes import Array, Bool, Float, Int, accumulator, typed


class S4(StateSpace):
    """The structured state space in HiPPO's basis, then GELU and a gated linear map (arXiv 2111.00396).

        x' = (Λ − P P*) x + B u,  y = 2 Re(C x) + D u        Λ = −exp(A_real) − i A_imag,  dt = exp(log_dt)
        out = a ⊙ σ(b),  (a, b) = GELU(y) W + bias

    Discretised by the bilinear rule: a convolution in training, a recurrence through the discretised step in decoding.
    `state_size` N counts conjugate pairs in full. `measure` is the HiPPO matrix that Λ, P and B start from: "legs",
    "legt" (of rank 2), "lagt" or "fout", or a tuple of them for the copies in turn; `num_copies` sets of Λ, P and B are
    shared by the channels, channel h using copy h mod num_copies (None: one a channel). `rate`, `bidirectional` and
    `output` are as in S4D, `impl` is a form of `ops.dplr_state_space`. P is parametrised as itself;
    where copies are of ranks 1 and 2 the second row of the former is zero, and stays so: so is its gradient.
    """

    d_model: int
    state_size: int = 64
    measure: str | tuple[str, ...] = "legs"
    dt_min: float = 1e-3
    dt_max: float = 0.1
    num_copies: int | None = None
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
        Lambda, P, B, dt, *C = self._continuous(accumulator(x.dtype))
        run = lambda u, direction, **options: ops.dplr_state_space(
            u, Lambda, P, B, C[direction], dt, impl=self.impl, **options
        )
        kernel = lambda direction, length: ops.dplr_kernel(Lambda, P, B, C[direction], dt, length)
        return state_space_layer(self, run, kernel, x, state, segment_ids, mask)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> StateSpaceState:
        self._check()
        return empty_state_space(self, batch_size, self.state_size // 2, dtype)

    def _continuous(self, dtype):
        """Λ, P, B, dt, C, and a C for the other direction of time, from the parameters."""
        starts = [diagonal_plus_low_rank(name, self.state_size) for name in in_turn(self, MEASURES, "measure")]
        H, M, S, R = self.d_model, self.state_size // 2, len(starts), max(len(P) for _, P, _ in starts)
        padded = [(A, np.pad(P, ((0, R - len(P)), (0, 0))), B) for A, P, B in starts]
        A0, P0, B0 = map(np.stack, zip(*padded, strict=True))
        param = parameter(self, dtype)
        A_real = param("A_real", positive(-A0.real, "exp"), S, M)
        A_imag = param("A_imag", positive(-A0.imag, "none"), S, M)
        P = as_complex(param("P", pairs(P0), S, R, M, 2))
        B = as_complex(param("B", pairs(B0), S, M, 2))
        each = lambda x: jnp.tile(x, (H // S, *(1,) * (x.ndim - 1)))
        dt = step_size(self, param, H)
        return *map(each, (jax.lax.complex(-jnp.exp(A_real), -A_imag), P, B)), dt, *readouts(self, param, H, M)

    @nn.nowrap
    def _check(self) -> None:
        in_turn(self, MEASURES, "measure")
        check_pairs(self)
        check_steps(self)
        check_choice(self, GATED_OUTPUTS, "output")
