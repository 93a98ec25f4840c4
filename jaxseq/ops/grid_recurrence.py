"""Chimera's two states on a grid of time steps and variates, each fed by both, elementwise (arXiv 2406.04320).

    h1(t,v) = a1 h1(t−1,v) + a2 h2(t−1,v) + u1        h2(t,v) = a3 h1(t,v−1) + a4 h2(t,v−1) + u2

A state is a sum over all lattice paths that lead to its cell. No elementwise operator composes them, and the block
product of two cells, which is associative, follows one path alone: so there is no scan over both axes at once.
"""

import math
import os
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..segments import segment_starts
from ..shapes import Array, Float, Int, accumulator, promoted, typed, zeros_from
from ..sharded import check_whole
from .dispatch import dispatch
from .linear_recurrence import recurrence

# The forms take a1 … a4, u1, u2 `B T V N`, where a2 or a3 may be None, and return h1, h2, zero outside the grid.


def sequential(a1, a2, a3, a4, u1, u2):
    """The definition: for every time step, for every variate."""
    operands = jax.tree.map(lambda x: x.transpose(1, 2, 0, 3), (a1, a2, a3, a4, u1, u2))
    outside = zeros_from(u1, operands[-1].shape[1:], u1.dtype)

    def cell(left, at):
        (above1, above2), (a1, a2, a3, a4, u1, u2) = at
        here = _sum(u1, (a1, above1), (a2, above2)), _sum(u2, (a3, left[0]), (a4, left[1]))
        return here, here

    def column(above, at):
        _, here = lax.scan(cell, (outside[0], outside[0]), (above, at))
        return here, here

    _, states = lax.scan(column, (outside, outside), operands)
    return jax.tree.map(lambda h: h.transpose(2, 0, 1, 3), states)


def columns(a1, a2, a3, a4, u1, u2, reverse=False):
    """A loop over time: h1 of a step is elementwise, then h2 is a scan over the variates."""
    length, along = u1.shape[1], recurrence(reverse=reverse)

    def step(i, carry):
        (above1, above2), states = carry
        t = length - 1 - i if reverse else i
        at = partial(lax.dynamic_index_in_dim, index=t, axis=1, keepdims=False)
        a1_t, a2_t, a3_t, a4_t, u1_t, u2_t = jax.tree.map(at, (a1, a2, a3, a4, u1, u2))
        h1 = _sum(u1_t, (a1_t, above1), (a2_t, above2))
        h2, _ = along(a4_t, _sum(u2_t, (a3_t, _previous(h1, 1, reverse))), outside[:, 0])
        # Written where it stays: a scan that leads with time would copy every operand first.
        written = [lax.dynamic_update_index_in_dim(s, h, t, 1) for s, h in zip(states, (h1, h2), strict=True)]
        return (h1, h2), tuple(written)

    states = zeros_from(u1, u1.shape, u1.dtype)
    outside = states[:, 0]
    return lax.fori_loop(0, length, step, ((outside, outside), (states, states)))[1]


def wavefront(a1, a2, a3, a4, u1, u2, reverse=False):
    """A loop over the T + V − 1 diagonals t + v = d, whose min(T, V) cells need those of d − 1 alone."""
    batch, length, variates, size = u1.shape
    if variates > length:
        return _transposed(wavefront)(a1, a2, a3, a4, u1, u2, reverse)
    diagonals = length + variates - 1

    def shear(x):  # to `T+V−1 V B N`: rows one longer than they are read move by one more at each variate
        x = _padded(x.transpose(2, 1, 0, 3), 1, variates).reshape(-1, batch, size)
        return x[: variates * diagonals].reshape(variates, diagonals, batch, size).swapaxes(0, 1)

    def unshear(x):
        x = _padded(x.swapaxes(0, 1).reshape(-1, batch, size), 0, variates)
        return x.reshape(variates, -1, batch, size)[:, :length].transpose(2, 1, 0, 3)

    def step(before, at):
        a1, a2, a3, a4, u1, u2 = at
        left1, left2 = (_previous(h, 0, reverse) for h in before)
        here = _sum(u1, (a1, before[0]), (a2, before[1])), _sum(u2, (a3, left1), (a4, left2))
        return here, here

    outside = zeros_from(u1, (variates, batch, size), u1.dtype)
    operands = jax.tree.map(shear, (a1, a2, a3, a4, u1, u2))
    return jax.tree.map(unshear, lax.scan(step, (outside, outside), operands, reverse=reverse)[1])


def triangular(a1, a2, a3, a4, u1, u2, reverse=False):
    """Without a2, a scan over time gives h1 and then one over the variates h2; without a3 the other way round."""
    if a2 is not None:
        return _transposed(triangular)(a1, a2, a3, a4, u1, u2, reverse)
    h1 = _over_time(a1, u1, reverse)
    return h1, _over_variates(a4, _sum(u2, (a3, _previous(h1, 2, reverse))), reverse)


def coupling_sweeps(a1, a2, a3, a4, u1, u2, reverse=False, count=None):
    """Scans over time and over variates in turn, until neither moves the other.

    A sweep adds the paths that change once more from h2 to h1; with min(T, V + 1) sweeps none is left.
    """
    length, variates = u1.shape[1:3]
    most = min(length, variates + 1) if count is None else count

    def sweep(carry):
        done, _, _, h2 = carry
        h1 = _over_time(a1, _sum(u1, (a2, _previous(h2, 1, reverse))), reverse)
        new = _over_variates(a4, _sum(u2, (a3, _previous(h1, 2, reverse))), reverse)
        return done + 1, jnp.any(new != h2), h1, new

    h = zeros_from(u1, u1.shape, u1.dtype)
    return lax.while_loop(lambda c: (c[0] < most) & c[1], sweep, (0, jnp.any(h == 0), h, h))[2:]


def _over_variates(decay, inputs, reverse):
    return _over_time(decay.swapaxes(1, 2), inputs.swapaxes(1, 2), reverse).swapaxes(1, 2)


def _over_time(decay, inputs, reverse):
    return recurrence(reverse=reverse)(decay, inputs, jnp.zeros_like(inputs[:, 0]))[0]


def _sum(u, *products):
    for a, h in products:
        u = u if a is None else u + a * h
    return u


def _previous(x, axis, reverse=False):
    """What the cell before has along an axis, or in reverse the cell after; zero outside."""
    return None if x is None else _padded(x, axis, *((1, -1) if reverse else (-1, 1)))


def _padded(x, axis, after, before=0):
    """Zeros appended and prepended; a negative number takes away."""
    return lax.pad(x, x.dtype.type(0), [(before, after, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])


def _flip(tree, axes):
    return jax.tree.map(lambda x: jnp.flip(x, axes), tree)


def _transposed(form):
    """Time and variates change places, and with them the two states."""

    def run(a1, a2, a3, a4, u1, u2, reverse):
        swap = lambda tree: jax.tree.map(lambda x: x.swapaxes(1, 2), tree)
        h2, h1 = swap(form(*swap((a4, a3, a2, a1, u2, u1)), reverse))
        return h1, h2

    return run


@partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def _solve(form, a1, a2, a3, a4, u1, u2, reverse=False):
    """A form with the derivative every form shares: the adjoint is the same recurrence in the other direction.

        λ1(t,v) = ∂L/∂h1 + a1(t+1,v) λ1(t+1,v) + a3(t,v+1) λ2(t,v+1)        ∂L/∂u1 = λ1
        λ2(t,v) = ∂L/∂h2 + a2(t+1,v) λ1(t+1,v) + a4(t,v+1) λ2(t,v+1)        ∂L/∂u2 = λ2

    in the unknowns p1(t,v) = λ1(t+1,v) and p2(t,v) = λ2(t,v+1), where a2 and a3 have changed places.
    """
    return form(a1, a2, a3, a4, u1, u2, reverse)


def _solve_forward(form, a1, a2, a3, a4, u1, u2, reverse):
    states = _solve(form, a1, a2, a3, a4, u1, u2, reverse)
    return states, (a1, a2, a3, a4, *states)


def _solve_backward(form, reverse, residuals, cotangents):
    a1, a2, a3, a4, h1, h2 = residuals
    d1, d2 = cotangents
    down, right = (partial(_previous, axis=axis, reverse=not reverse) for axis in (1, 2))
    a1, a2, a3, a4 = down(a1), down(a2), right(a3), right(a4)
    p1, p2 = _solve(form, down(a1), down(a3), right(a2), right(a4), down(d1), right(d2), not reverse)
    l1, l2 = _sum(d1, (a1, p1), (a3, p2)), _sum(d2, (a2, p1), (a4, p2))
    of = lambda a, l, h, axis: None if a is None else l * _previous(h, axis, reverse)
    return of(a1, l1, h1, 1), of(a2, l1, h2, 1), of(a3, l2, h1, 2), of(a4, l2, h2, 2), l1, l2


_solve.defvjp(_solve_forward, _solve_backward)


FORMS: dict[str, Callable] = {
    "sequential": sequential,
    "columns": partial(_solve, columns),
    "wavefront": partial(_solve, wavefront),
    "triangular": partial(_solve, triangular),
    "sweeps": partial(_solve, coupling_sweeps),
}


@typed
def grid_recurrence(
    a1: Float[Array, "..."],
    a2: Float[Array, "..."] | None,
    a3: Float[Array, "..."] | None,
    a4: Float[Array, "..."],
    u1: Float[Array, "B T V N"],
    u2: Float[Array, "B T V N"],
    *,
    initial_state: tuple[Float[Array, "B V N"], Float[Array, "B V N"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = False,
    reverse_variates: bool = False,
    sweeps: int | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T V N"], Float[Array, "B T V N"]]:
    """Both states of a two-dimensional recurrence over T time steps and V variates (Chimera, arXiv 2406.04320).

        h1(t,v) = a1 h1(t−1,v) + a2 h2(t−1,v) + u1        h2(t,v) = a3 h1(t,v−1) + a4 h2(t,v−1) + u2

    Outside the grid they are zero. The coefficients broadcast against the inputs; None for a2 or a3 is no coupling.
    They are bounded wherever |a1| + |a2| < 1 and |a3| + |a4| < 1, as `contractive` makes them; decays below 1 alone
    are not enough. `initial_state` is h1 and h2 of the step before the first, so a grid can be fed in parts along
    time; at a change of `segment_ids` time restarts from zero. `reverse` runs time backwards, `reverse_variates` the
    variates. States have the promoted dtype of the inputs, sums at least float32.

    `columns` is a loop over time, `wavefront` over diagonals; `triangular`, two scans, wants a2 or a3 to be None.
    `sweeps` repeats two scans until nothing moves, min(T, V + 1) times at most, or `sweeps` times at most in each pass:
    what is then missing, `coupling_residual` says. All but `sequential` share one backward pass (no forward mode).

    Raises:
      ValueError: shapes disagree, T or V = 0, sweeps < 1 or for another form, more states than memory, or NaN or
        infinity where values are known.
      NotImplementedError: `impl` is none of the forms, or is "triangular" with both couplings; time is split over
        devices.
    """
    boundary = dict(
        initial_state=initial_state, segment_ids=segment_ids, reverse=reverse, reverse_variates=reverse_variates
    )
    operands, dtype, axes = _prepared(a1, a2, a3, a4, u1, u2, **boundary)
    if sweeps is not None and (sweeps < 1 or impl != "sweeps"):
        raise ValueError(f"sweeps={sweeps} with impl={impl!r}; impl='sweeps' takes None, or 1 sweep or more.")
    check_whole("grid_recurrence", "split the batch")  # the total of many steps is a matrix over all variates
    uncoupled = a2 is None or a3 is None
    if impl == "triangular" and not uncoupled:
        others = ", ".join(repr(name) for name in FORMS if name != impl)
        raise NotImplementedError(f"impl='triangular' takes a2=None or a3=None; with both choose None, {others}.")
    forms = FORMS if sweeps is None else FORMS | {"sweeps": partial(_solve, partial(coupling_sweeps, count=sweeps))}
    # A processor: one pass over memory. Else the fewest steps that wait for one another, 2 log V of them in a scan.
    length, variates = u1.shape[1:3]
    fewest = "columns" if 2 * length * variates.bit_length() < length + variates else "wavefront"
    best = "triangular" if uncoupled else {"cpu": "columns", "default": fewest}
    h1, h2 = _flip(dispatch("grid_recurrence", impl, forms, best)(*operands), axes)
    return h1.astype(dtype), h2.astype(dtype)


@typed
def coupling_residual(
    h1: Float[Array, "B T V N"], h2: Float[Array, "B T V N"], *operands, **boundary
) -> Float[Array, ""]:
    """The largest error of any cell in either equation, given states and what `grid_recurrence` was given for them.

    Rounding where the states are exact; after too few sweeps, the last sweep's change of h2 as h1 would see it.
    """
    (a1, a2, a3, a4, u1, u2), _, axes = _prepared(*operands, **boundary)
    h1, h2 = _flip((h1.astype(u1.dtype), h2.astype(u1.dtype)), axes)
    e1 = _sum(u1 - h1, (a1, _previous(h1, 1)), (a2, _previous(h2, 1)))
    e2 = _sum(u2 - h2, (a3, _previous(h1, 2)), (a4, _previous(h2, 2)))
    return jnp.maximum(jnp.abs(e1).max(), jnp.abs(e2).max())


@typed
def contractive(
    z1: Float[Array, "..."], z2: Float[Array, "..."], z3: Float[Array, "..."], z4: Float[Array, "..."], rho: float = 0.9
):
    """Coefficients a1 … a4 from any real numbers, under which no state outgrows max |u| / (min(1 − a) (1 − rho)).

        a1 = exp(−softplus z1)   a2 = (1 − a1) rho tanh z2   a3 = (1 − a4) rho tanh z3   a4 = exp(−softplus z4)

    Then |a1| + |a2| < 1 and |a3| + |a4| < 1 in every cell: each step contracts the largest state, whatever the inputs.

    Raises:
      ValueError: rho is not in [0, 1).
    """
    if not 0 <= rho < 1:
        raise ValueError(f"rho={rho}; contractive takes 0 <= rho < 1.")
    # exp(−softplus z) = σ(−z), and 1 − a = σ(z) keeps its digits where a is near 1.
    couplings = (jax.nn.sigmoid(z1) * rho * jnp.tanh(z2), jax.nn.sigmoid(z4) * rho * jnp.tanh(z3))
    return jax.nn.sigmoid(-z1), *couplings, jax.nn.sigmoid(-z4)


def _prepared(
    a1, a2, a3, a4, u1, u2, initial_state=None, segment_ids=None, reverse=False, reverse_variates=False
) -> tuple[tuple, jnp.dtype, tuple[int, ...]]:
    """Checked, full-size operands of a run forwards from zero; the dtype of its states; the axes that were flipped."""
    named = dict(a1=a1, a2=a2, a3=a3, a4=a4, u1=u1, u2=u2)
    _check(named, initial_state)
    operands = tuple(x if x is None else _broadcast(name, x, u1.shape) for name, x in named.items())
    dtype = promoted(*(x.dtype for x in jax.tree.leaves(operands)))
    axes = (1,) * reverse + (2,) * reverse_variates
    # Coefficients that all devices share vary from here on: the backward pass sums their gradients outside it.
    ready = lambda x: jnp.flip(zeros_from(u1, u1.shape, accumulator(dtype), plus=x), axes)
    a1, a2, a3, a4, u1, u2 = jax.tree.map(ready, operands)
    if segment_ids is not None:
        starts = segment_starts(jnp.flip(segment_ids, 1) if reverse else segment_ids)[:, :, None, None]
        a1, a2 = jax.tree.map(lambda a: jnp.where(starts, 0, a), (a1, a2))
    if initial_state is not None:  # is what it adds to the first step
        first1, first2 = jax.tree.map(lambda a: a[:, :1], (a1, a2))
        s1, s2 = (jnp.flip(s[:, None].astype(u1.dtype), axes) for s in initial_state)
        u1 = jnp.concatenate([_sum(u1[:, :1], (first1, s1), (first2, s2)), u1[:, 1:]], axis=1)
    return (a1, a2, a3, a4, u1, u2), dtype, axes


def _check(operands, initial_state) -> None:
    shape, dtype = operands["u1"].shape, operands["u1"].dtype
    if 0 in shape:
        raise ValueError(f"u1 has shape {shape}; grid_recurrence takes one or more of each of B, T, V and N.")
    arrays = 2 + sum(x is not None for x in operands.values())
    needed, memory = arrays * math.prod(shape) * accumulator(dtype).itemsize, _memory()
    if needed > memory:
        raise ValueError(
            f"States, coefficients and inputs of shape {shape} take {needed / 2**30:.3g} GiB of the "
            f"{memory / 2**30:.3g} GiB there are; feed the grid in parts along time, each from the initial_state that "
            "the one before leaves, or split the batch."
        )
    before = () if initial_state is None else tuple(initial_state)
    column, found = (shape[0], *shape[2:]), [jnp.shape(s) for s in before]
    if found not in ([], [column, column]):
        raise ValueError(f"initial_state has shapes {found}; u1 of shape {shape} takes two of {column}.")
    for name, x in (operands | {f"initial_state[{i}]": s for i, s in enumerate(before)}).items():
        if x is None or isinstance(x, jax.core.Tracer):
            continue
        with jax.ensure_compile_time_eval():  # a constant of a jitted function is still known
            bad = ~jnp.isfinite(x)
            if bad.any():
                where = tuple(map(int, jnp.argwhere(bad)[0]))
                raise ValueError(f"{name} is {x[where]} at {where}; grid_recurrence takes finite numbers.")


def _broadcast(name, x, shape):
    try:
        return jnp.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{name} of shape {x.shape} does not broadcast against u1 {shape}.") from None


def _memory() -> int:
    """Bytes that all devices have together, or the machine where they do not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return jax.process_count() * (sum(limits) if all(limits) else machine)
