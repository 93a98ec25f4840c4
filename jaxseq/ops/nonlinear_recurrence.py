"""h_t = cell(h_{t-1}, x_t) of any differentiable cell: step by step, or all at once by Newton iterations.

A trajectory h solves the recurrence where its residual h_t − cell(h_{t-1}, x_t) is zero for all t. The residual's
derivative is block bidiagonal, L = I − J, so a Newton step δ = L⁻¹ residual(h) is an affine scan: δ_t = J_t δ_{t-1} +
residual_t. The gradient of a solution is one more, in reverse. (DEER, arXiv 2309.12252; with the diagonal of J alone
and other steps that overflow less, arXiv 2407.19115.)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import scan
from ..monoid import MatrixAffine, matrix_affine
from ..segments import segment_starts
from ..shapes import Array, Bool, Float, Int, accumulator, typed, zeros_from
from ..sharded import devices, halo, is_split, largest_anywhere, on_last, own, sharded
from .dispatch import dispatch
from .linear_recurrence import linear_recurrence

Cell = Callable[[Any, Any], Any]  # (state "B …", inputs "B …") -> state "B …"
JACOBIANS = ("full", "diagonal")


class Report(NamedTuple):
    """What Newton's iterations did in each block of time; `error` is what they left at most, over the tolerance."""

    iterations: Int[Array, "blocks"]
    converged: Bool[Array, "blocks"]
    error: Float[Array, "blocks"]


class Step(NamedTuple):
    """One of Newton's, over the tolerance: how far it went, and how far is left at the rate at which steps shrink."""

    size: Float[Array, ""]
    left: Float[Array, ""]


class Newton(NamedTuple):
    """How a trajectory is solved for: see `nonlinear_recurrence`."""

    jacobian: str
    damping: float
    tolerance: float | None
    max_iterations: int


@typed
def nonlinear_recurrence(
    cell: Cell,
    xs,
    initial_state,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = "sequential",
    guess=None,
    jacobian: str = "full",
    damping: float = 0.0,
    tolerance: float | None = None,
    max_iterations: int = 100,
    block_size: int | None = None,
    report: bool = False,
):
    """All states of a nonlinear recurrence, and the last one.

        h_t = cell(h_{t-1}, x_t)

    `cell(state, x) -> state` takes states and inputs of one token, trees of arrays `B …`, each sequence by itself, and
    may close over parameters; `xs` is a tree of arrays `B T …`. At a change of `segment_ids` the state restarts from
    zeros. States are kept, and the last one is returned, in at least float32; all of them are returned in the dtypes
    of `initial_state`.

    `sequential` is a loop over time. `parallel` takes Newton steps until the error that is left, foreseen from the
    rate at which they shrink, is at most `tolerance` (1 + |h|). A block of time that has not converged falls back to
    the loop, so that values are never worse than the loop's.

    Args of `parallel`:
      guess: the trajectory to start from, a tree of states `B T …`; where None, the initial state everywhere.
      jacobian: "full", or "diagonal": more steps, each of whose scans takes N numbers of a token and not N². Both take
        N products with the cell's derivative a step, of N numbers of state; gradients take the full one always.
      damping: steps take (1 − damping) J in the place of J, for cells whose J is large where the search begins. Rarely
        worth it: what overflows keeps its place anyway, and a diagonal that does not converge does not with it either.
      tolerance: 16 rounding errors where None.
      max_iterations: steps before a block falls back. After 3/4 of a step a token it does so earlier.
      block_size: tokens that are solved for together, one block after the other: J of C tokens takes C N² numbers a
        sequence. All of time where None, and where time is split over devices. From block to block the rounding of a
        chaotic cell grows, as it does between any two programs, though each block converge.
      report: return a `Report` too; in `sequential`, of no iterations.

    Raises:
      ValueError: T = 0, an option out of range, or arguments whose batch, time or trees disagree.
      TypeError: `cell` returns another tree, other shapes or dtypes than its state.
      NotImplementedError: `impl` is none of the forms.
    """
    length = _checked(xs, jacobian, damping, tolerance, max_iterations, block_size)
    _check_shapes(xs, initial_state, segment_ids, guess)
    dtypes = jax.tree.map(lambda h: h.dtype, initial_state)
    first = jax.tree.leaves(xs)[0]
    initial_state = jax.tree.map(lambda h: zeros_from(first, h.shape, accumulator(h.dtype), plus=h), initial_state)
    _check_cell(cell, xs, initial_state)
    if segment_ids is not None:
        cell, xs = _restarting(cell), (segment_starts(segment_ids), xs)
    xs, initial_state = own((xs, initial_state))
    newton = Newton(jacobian, damping, tolerance, max_iterations)
    size = length if block_size is None or is_split() else min(block_size, length)
    newtons = partial(parallel, newton=newton, guess=guess, size=size)
    forms: dict[str, Callable] = {"sequential": sequential, "parallel": newtons}
    states, final, done = dispatch("nonlinear_recurrence", impl, forms, "sequential")(cell, xs, initial_state)
    states = jax.tree.map(lambda h, dtype: h.astype(dtype), states, dtypes)
    return (states, final, done) if report else (states, final)


def sequential(cell: Cell, xs, state):
    """The definition. Where time is split, the devices run one after the other."""

    def run(state):
        step = lambda h, x: (cell(h, x),) * 2
        return scan.loop(step, state, xs)

    def after(_, start):  # the start of a device is right once all before it are
        _, final = run(start)
        return jax.tree.map(lambda h, first: halo(h[:, None], first[:, None])[:, 0], final, state)

    states, final = run(lax.fori_loop(1, devices(), after, state))
    none = jnp.zeros((1,))
    return states, on_last(final), Report(none.astype(jnp.int32), none == 0, none)


def parallel(cell: Cell, xs, state, newton: Newton, guess, size: int):
    flat, tree = _raveler(state)
    length = _length(xs)
    guess = jax.tree.map(lambda h: jnp.repeat(h[:, None], length, axis=1), state) if guess is None else guess
    guess, xs = jax.tree.map(partial(_padded, size=size), (flat(guess), xs))
    if length % size:
        cell, xs = _ending(cell), (jnp.broadcast_to(jnp.arange(_length(xs)) < length, guess.shape[:2]), xs)
    every = jax.vmap(cell, in_axes=1, out_axes=1)

    def block(start, within):
        xs, guess = within

        def residual(h):
            before = jnp.concatenate([halo(h, start[:, None]), h[:, :-1]], axis=1)
            return h - flat(every(tree(before), xs))

        def solve(residual, guess):
            h, count, error = _iterate(newton, residual, guess)
            step_by_step = lambda: flat(sequential(cell, xs, tree(start))[0])
            # What comes along is of floats: a derivative of integers is none that `custom_root` would take.
            return lax.cond(error <= 1, lambda: h, step_by_step), (count.astype(h.dtype), error)

        h, done = lax.custom_root(residual, guess, solve, _linear_solve, has_aux=True)
        return own(on_last(h[:, -1])), (h, done)

    _, (h, (count, error)) = lax.scan(block, flat(state), scan.split_chunks((xs, guess), size))
    h = scan.join_chunks(h, length)
    return tree(h), tree(on_last(h[:, -1])), Report(count.astype(jnp.int32), error <= 1, error)


def _iterate(newton: Newton, residual: Callable, guess):
    """The last trajectory, the count of Newton steps and the error that is left, 1 being small enough.

    A step is the error before it, if it is exact. Those that are not shrink by a factor θ; behind the last one, of size
    s, an error of s θ / (1 − θ) is left. θ is the mean so far. Of steps by less than J it is the last one too, as what
    shrinks slowly appears when what shrinks fast is gone, and two of them must agree; but in steps of the size of
    rounding there is no θ. What overflows in a step keeps its place, and is met again by the next.
    """
    rounding = 4 * jnp.finfo(guess.dtype).eps
    limit = 4 * rounding if newton.tolerance is None else newton.tolerance
    exact = newton.jacobian == "full" and newton.damping == 0

    def step(carry):
        h, count, _, largest, before = carry
        value, push = jax.linearize(residual, h)
        moved = h - _bidiagonal(newton, push, value)
        finite = jnp.isfinite(moved)
        moved = jnp.where(finite, moved, h)
        size = largest_anywhere(jnp.where(finite, jnp.abs(moved - h) / (limit * (1 + jnp.abs(moved))), jnp.inf))
        largest = jnp.maximum(largest, jnp.where(jnp.isfinite(size), size, 0))
        theta = (size / largest) ** (1 / jnp.maximum(count, 1).astype(size.dtype))
        if not exact:
            theta = jnp.where(size * limit > rounding, jnp.maximum(theta, size / before.size), theta)
        left = jnp.where(theta < 1, size * jnp.maximum(1, theta / (1 - theta)), jnp.inf)
        left = jnp.where((count == 0) | (size == 0), size, left)
        error = left if exact else jnp.maximum(left, before.left)
        return moved, count + 1, error, largest, Step(size, left)

    # Each step makes one token more exact at least: what takes about a step a token has found nothing, and where the
    # cell is chaotic it ends in a trajectory that rounding has turned away from the loop's.
    most = min(newton.max_iterations, 1 + 3 * guess.shape[1] * devices() // 4)
    going = lambda carry: (carry[2] > 1) & (carry[1] < most)
    zero, infinite = (jnp.asarray(x, guess.dtype) for x in (0, jnp.inf))
    start = guess, jnp.int32(0), infinite, zero, Step(infinite, infinite)
    return lax.while_loop(going, step, start)[:3]


def _bidiagonal(newton: Newton, matvec: Callable, b):
    """(I − J)⁻¹ b by a scan, where matvec is I − J, and its blocks J_t are found by what it does to unit vectors."""
    N, keep = b.shape[-1], 1 - newton.damping
    if newton.jacobian == "full":
        return _scanned(MatrixAffine(keep * _blocks(matvec, b), b))
    unit = lambda n: _as(b, jnp.broadcast_to(jax.nn.one_hot(n, N, dtype=b.dtype), b.shape))
    diagonal = lax.map(lambda n: keep * (1 - matvec(unit(n))[..., n]), jnp.arange(N))
    return linear_recurrence(jnp.moveaxis(diagonal, 0, -1), b)[0]


def _blocks(matvec: Callable, b):
    """J_t `B T N N`, of the transposed of such a map J_{t+1}ᵀ."""
    N = b.shape[-1]
    units = _as(b, jnp.broadcast_to(jnp.eye(N, dtype=b.dtype)[:, None, None], (N, *b.shape)))
    return jnp.moveaxis(units - jax.vmap(matvec)(units), 0, -1)


def _as(like, x):
    """x, which differs from device to device where `like` does."""
    return zeros_from(like, x.shape, x.dtype, plus=x)


def _scanned(maps: MatrixAffine, *, reverse: bool = False):
    run = sharded if is_split() else scan.parallel
    return run(matrix_affine, maps, jnp.zeros_like(maps.inputs[:, 0]), reverse=reverse)[0]


def _in_turn(maps: MatrixAffine, *, reverse: bool):
    """The same map after map, device after device: no products of J are made, which overflow where states do not."""
    zero = jnp.zeros_like(maps.inputs[:, 0])
    run = lambda state: scan.sequential(matrix_affine, maps, state, reverse=reverse)
    after = lambda _, state: halo(run(state)[1][:, None], zero[:, None], reverse=reverse)[:, 0]
    return run(lax.fori_loop(1, devices(), after, zero))[0]


def _linear_solve(matvec: Callable, b):
    """(I − J)⁻¹ b for derivatives, exact whatever the steps were; in turn where the scan overflows, as in chaos."""

    def solved(matvec, b, *, reverse: bool):
        maps = MatrixAffine(_blocks(matvec, b), b)
        x = _scanned(maps, reverse=reverse)
        overflown = largest_anywhere(jnp.where(jnp.isfinite(x), 0, 1)) > 0
        return lax.cond(overflown, lambda: _in_turn(maps, reverse=reverse), lambda: x)

    return lax.custom_linear_solve(matvec, b, partial(solved, reverse=False), partial(solved, reverse=True))


def _length(xs) -> int:
    return jax.tree.leaves(xs)[0].shape[1]


def _padded(x, size: int):
    """More of the last token, to whole blocks: any other filling might be nothing that the cell can take."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2), mode="edge")


def _raveler(state) -> tuple[Callable, Callable]:
    """From trees of states `B …` or `B T …` to vectors `… N`, and back."""
    leaves, structure = jax.tree.flatten(state)
    dtype = accumulator(*(x.dtype for x in leaves))
    sizes = [int(np.prod(x.shape[1:])) for x in leaves]

    def flat(tree):
        lead = lambda x, like: x.shape[: x.ndim - like.ndim + 1]
        rows = [x.reshape(*lead(x, y), -1).astype(dtype) for x, y in zip(jax.tree.leaves(tree), leaves, strict=True)]
        return jnp.concatenate(rows, axis=-1)

    def tree(vector):
        parts = jnp.split(vector, np.cumsum(sizes)[:-1], axis=-1)
        shaped = [x.reshape(*x.shape[:-1], *y.shape[1:]).astype(y.dtype) for x, y in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    return flat, tree


def _ending(cell: Cell) -> Cell:
    """Behind the end a state stays: what grew there would fill the gradients of all tokens with NaN."""

    def ending(state, token):
        inside, x = token
        return _where(inside, cell(state, x), state)

    return ending


def _restarting(cell: Cell) -> Cell:
    def restarted(state, token):
        starts, x = token
        return cell(_where(starts, jax.tree.map(jnp.zeros_like, state), state), x)

    return restarted


def _where(which, these, others):
    """Of trees of states: the sequences `which` `B` of these, and the rest of the others."""
    choose = lambda a, b: jnp.where(lax.expand_dims(which, range(1, b.ndim)), a, b)
    return jax.tree.map(choose, these, others)


def _checked(xs, jacobian, damping, tolerance, max_iterations, block_size) -> int:
    length = _length(xs)
    if length == 0:
        raise ValueError("xs has T = 0; nonlinear_recurrence takes at least one step of time.")
    if jacobian not in JACOBIANS:
        raise ValueError(f"jacobian={jacobian!r}; choose {' or '.join(map(repr, JACOBIANS))}.")
    if not 0 <= damping <= 1:
        raise ValueError(f"damping={damping}; nonlinear_recurrence takes 0 to 1.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance={tolerance} must be above 0, or None.")
    for name, value in (("max_iterations", max_iterations), ("block_size", block_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    return length


def _check_shapes(xs, state, segment_ids, guess) -> None:
    if not all(jnp.issubdtype(h.dtype, jnp.floating) for h in jax.tree.leaves(state)):
        dtypes = jax.tree.map(lambda h: h.dtype.name, state)
        raise TypeError(f"initial_state is of {dtypes}; nonlinear_recurrence takes real floating numbers.")
    shape = jax.tree.leaves(xs)[0].shape[:2]
    for name, tree, lead in (
        ("xs", xs, shape),
        ("initial_state", state, shape[:1]),
        ("segment_ids", segment_ids, shape),
    ):
        for x in jax.tree.leaves(tree):
            if x.shape[: len(lead)] != lead:
                raise ValueError(f"{name} has shape {x.shape}, xs {shape} first: it leads with {lead}.")
    if guess is None:
        return
    structures: Any = [jax.tree.structure(tree) for tree in (guess, state)]
    if structures[0] != structures[1]:
        raise ValueError(f"guess is {structures[0]}, initial_state {structures[1]}.")
    for x, h in zip(jax.tree.leaves(guess), jax.tree.leaves(state), strict=True):
        if x.shape != (*shape, *h.shape[1:]):
            raise ValueError(f"guess has shape {x.shape}; it is {(*shape, *h.shape[1:])}, a state for each token.")


def _check_cell(cell: Cell, xs, state) -> None:
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype), xs)
    given = jax.tree.map(lambda h: jax.ShapeDtypeStruct(h.shape, h.dtype), state)
    returned = jax.tree.map(lambda h: jax.ShapeDtypeStruct(h.shape, h.dtype), jax.eval_shape(cell, given, first))
    if given != returned:
        raise TypeError(f"cell returned {returned} for a state {given}; it keeps tree, shapes and dtypes.")
