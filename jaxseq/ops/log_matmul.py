"""s_t = s_{t-1} ⊗ M_t: products of a vector with matrices over a semiring, as hidden Markov models have them."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from .. import scan
from ..monoid import MatrixAffine, Segmented, log_sum_exp, matrix_affine, max_plus, segmented
from ..segments import segment_starts
from ..shapes import Array, Float, Int, accumulator, known, typed, zeros_from
from ..sharded import check_whole
from .dispatch import dispatch

SEMIRINGS = {"log_sum_exp": log_sum_exp, "max_plus": max_plus}
Semiring = Literal["log_sum_exp", "max_plus"]


def _run(form, semiring, starts, matrices, state):
    return form(segmented(semiring), Segmented(starts, matrices), state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(form, semiring, starts, matrices, state):
    """A form with the derivative every form shares: one matrix recurrence backwards in time, out of log space.

        W_t[i, j] = ∂s_t[j] / ∂M_t[i, j]        λ_t = ∂L/∂s_t + W_{t+1} λ_{t+1}        ∂L/∂M_t[i, j] = W_t[i, j] λ_t[j]

    The columns of W_t are distributions: p(z_{t-1} | z_t, x_1 … x_t), or which predecessor is the best.
    """
    return _run(form, semiring, starts, matrices, state)


def _solve_forward(form, semiring, starts, matrices, state):
    states, final = _solve(form, semiring, starts, matrices, state)
    return (states, final), (starts, matrices, states, state)


def _solve_backward(form, semiring, residuals, cotangents):
    starts, matrices, states, state = residuals
    d_states, d_final = cotangents
    previous = jnp.concatenate([state[:, None], states[:, :-1]], axis=1)
    previous = jnp.where(starts[..., None], 0, previous)
    weights = jax.grad(lambda M: jnp.sum(semiring.act(M, previous)))(matrices)
    passed = jnp.where(starts[..., None, None], 0, weights)
    # The cotangent of the final state enters as the adjoint's initial state, through no matrix.
    unit = jnp.broadcast_to(jnp.eye(state.shape[-1], dtype=state.dtype), passed[:, :1].shape)
    later = MatrixAffine(jnp.concatenate([passed[:, 1:], unit], axis=1), d_states)
    adjoint, _ = form(matrix_affine, later, d_final, reverse=True)
    d_state = jnp.einsum("bij,bj->bi", passed[:, 0], adjoint[:, 0])
    return None, weights * adjoint[..., None, :], d_state


_solve.defvjp(_solve_forward, _solve_backward)

FORMS = {
    "sequential": partial(_run, scan.sequential),
    "parallel": partial(_solve, scan.parallel),
    "chunked": partial(_solve, scan.abreast),
}


@typed
def log_matmul(
    log_matrices: Float[Array, "B T S S"],
    *,
    initial_state: Float[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = False,
    semiring: Semiring = "log_sum_exp",
    impl: str | None = None,
) -> tuple[Float[Array, "B T S"], Float[Array, "B S"]]:
    """All states of a linear recurrence over a semiring, and the last one.

        s_t[j] = ⊕_i s_{t-1}[i] + M_t[i, j]        (in reverse: s_t[i] = ⊕_j M_t[i, j] + s_{t+1}[j])

    ⊕ is log Σ exp, or max for "max_plus". A row vector meets the matrices in the order of time; in reverse a column
    vector meets the same matrices from the last one back, so that ⊕ s_t + s'_{t+1} is the same number at every t.
    Entries may be −∞ (weight zero): values and gradients stay without NaN. `initial_state` is s_0, zeros (weight one)
    when None; at a change of `segment_ids` the state restarts from zeros. Sums and the final state are kept in at
    least float32. `chunked` multiplies matrices inside all chunks at once. All forms but `sequential` share one
    backward pass (no forward mode).

    Raises:
      ValueError: shapes disagree, T = 0, a NaN where values are known, or `semiring` is none of the two.
      NotImplementedError: `impl` is none of the forms, or time is split over devices.
    """
    check_whole("log_matmul", "run jaxseq.sharded.sharded with jaxseq.monoid.log_sum_exp")
    batch, length, size, _ = log_matrices.shape
    if length == 0 or size == 0:
        raise ValueError(f"log_matrices has shape {log_matrices.shape}; log_matmul takes at least one step and state.")
    if semiring not in SEMIRINGS:
        raise ValueError(f"semiring={semiring!r}; log_matmul takes {' or '.join(map(repr, SEMIRINGS))}.")
    values = known(log_matrices)
    if values is not None and (wrong := np.argwhere(np.isnan(values))).size:
        raise ValueError(f"log_matrices is NaN at {wrong[0].tolist()}; log_matmul takes numbers, and −∞ for no weight.")
    matrices = log_matrices.astype(accumulator(log_matrices.dtype))
    state = zeros_from(matrices, (batch, size), matrices.dtype, plus=initial_state)
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    flip = (lambda x: jnp.flip(x, 1)) if reverse else (lambda x: x)
    matrices = flip(matrices).swapaxes(2, 3) if reverse else matrices
    best = {"cpu": "sequential", "default": "chunked"}
    forms = {name: partial(form, SEMIRINGS[semiring]) for name, form in FORMS.items()}
    states, final = dispatch("log_matmul", impl, forms, best)(segment_starts(flip(ids)), matrices, state)
    return flip(states).astype(log_matrices.dtype), final
