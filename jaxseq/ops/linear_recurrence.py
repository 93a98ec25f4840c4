"""h_t = decay_t ⊙ h_{t-1} + inputs_t, elementwise, real or complex."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .. import scan
from ..monoid import Affine, affine
from ..segments import segment_starts
from ..shapes import Array, Inexact, Int, accumulator, promoted, typed, zeros_from
from ..sharded import across_devices, own
from .dispatch import dispatch
from .tokenwise import Inputs, tokenwise


def sequential(decay, inputs, initial_state, reverse):
    return scan.sequential(affine, Affine(decay, inputs), initial_state, reverse=reverse)


def parallel(decay, inputs, initial_state, reverse):
    """The first input takes the initial state in: prefixes then start from zero, and need no decays of their own."""
    first = -1 if reverse else 0
    inputs = inputs.at[:, first].add(decay[:, first] * initial_state)
    states = lax.associative_scan(affine.combine, Affine(decay, inputs), axis=1, reverse=reverse).inputs
    return states, states[:, -1 - first]


def blocked(decay, inputs, initial_state, reverse, size):
    """`parallel` on one block of time after the other: each reads its slices and writes its states where they stay."""
    length = inputs.shape[1]

    def step(i, carry):
        state, states = carry
        start, following = (jnp.minimum(n * size, length - size) for n in (i, i + 1))  # the last block is a whole one
        place = length - size - start if reverse else start
        a, x = (lax.dynamic_slice_in_dim(array, place, size, 1) for array in (decay, inputs))
        block, _ = parallel(a, x, state, reverse)
        passed = following - start
        state = lax.dynamic_index_in_dim(block, size - passed if reverse else passed - 1, 1, keepdims=False)
        return state, lax.dynamic_update_slice_in_dim(states, block, place, 1)

    _, states = lax.fori_loop(0, -(-length // size), step, (initial_state, jnp.zeros_like(inputs)))
    return states, states[:, 0 if reverse else -1]


def in_kernel(decay, inputs, initial_state, reverse):
    """Complex numbers are pairs of planes, which is all that a kernel knows."""
    channels = lambda x: x.reshape(*x.shape[:1], *x.shape[1 : x.ndim - inputs.ndim + 2], -1)
    split = lambda name, x: {name: x.real, f"{name}_imag": x.imag} if jnp.iscomplexobj(x) else {name: x}
    planes = lambda name, x: split(name, channels(x))
    state = {name: h[:, None] for name, h in planes("h", initial_state).items()}
    rows = planes("decay", decay) | planes("inputs", inputs)
    final, states = tokenwise(_token, tuple(state), Inputs(state, rows, {}, {}, {}), {"decay": 1}, reverse)
    whole = lambda of, like: (jax.lax.complex(*of.values()) if len(of) > 1 else of["h"]).reshape(like.shape)
    return whole(states, inputs), whole(final, initial_state)


def _token(h, _, row):
    a, x, h = ((of[name], of.get(f"{name}_imag")) for name, of in (("decay", row), ("inputs", row), ("h", h)))
    if x[1] is None:
        after = {"h": a[0] * h[0] + x[0]}
    else:
        after = {"h": a[0] * h[0] - a[1] * h[1] + x[0], "h_imag": a[0] * h[1] + a[1] * h[0] + x[1]}
    return after, after


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _solve(form, reverse, decay, inputs, initial_state):
    """A form with the derivative every form shares: the adjoint is the same recurrence in the other direction.

        λ_t = ∂L/∂h_t + decay_{t+1} λ_{t+1}        ∂L/∂inputs_t = λ_t        ∂L/∂decay_t = λ_t h_{t-1}

    Differentiating a loop that writes in place would copy the whole buffer at every step.
    """
    return form(decay, inputs, initial_state, reverse)


def _solve_forward(form, reverse, decay, inputs, initial_state):
    states, final = _solve(form, reverse, decay, inputs, initial_state)
    return (states, final), (decay, states, initial_state)


def _solve_backward(form, reverse, residuals, cotangents):
    decay, states, initial_state = residuals
    d_states, d_final = cotangents
    first, last = (-1, 0) if reverse else (0, -1)
    # The cotangent of the final state enters as the adjoint's initial state, undecayed.
    next_decay = _shift(decay, jnp.ones_like(decay[:, last]), earlier=not reverse)
    adjoint, _ = _solve(form, not reverse, next_decay, d_states, d_final)
    previous = _shift(states, initial_state, earlier=reverse)
    return adjoint * previous, adjoint, decay[:, first] * adjoint[:, first]


def _shift(array, edge, *, earlier):
    """Move by one step in time, with `edge` where nothing is left."""
    edge = edge[:, None]
    return jnp.concatenate([array[:, 1:], edge] if earlier else [edge, array[:, :-1]], axis=1)


_solve.defvjp(_solve_forward, _solve_backward)


@typed
def linear_recurrence(
    decay: Inexact[Array, "..."],
    inputs: Inexact[Array, "B T ..."],
    *,
    initial_state: Inexact[Array, "B ..."] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    impl: str | None = None,
) -> tuple[Inexact[Array, "B T ..."], Inexact[Array, "B ..."]]:
    """All states of an elementwise linear recurrence, and the last one.

        h_t = decay_t ⊙ h_{t-1} + inputs_t        (in reverse: h_t = decay_t ⊙ h_{t+1} + inputs_t)

    `decay` broadcasts against `inputs`. `initial_state` is h_0, zeros when None. At a change of `segment_ids` the
    state restarts from zero. States have the promoted dtype of the inputs; sums and the final state are kept in at
    least float32. `parallel`, `chunked` and `in_place` share
    one backward pass, the reversed recurrence (no forward mode).
    `in_place` passes over memory once, a step at a time; `chunked` a block of `chunk_size` steps at a time.

    Raises:
      ValueError: shapes disagree, T = 0, or chunk_size < 1.
      NotImplementedError: `impl` is none of the forms.
    """
    if inputs.shape[1] == 0:
        raise ValueError(f"inputs has shape {inputs.shape}; linear_recurrence takes at least one step of time.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; linear_recurrence takes 1 or more.")
    shared = decay.shape != inputs.shape
    try:
        decay = jnp.broadcast_to(decay, inputs.shape)
    except ValueError:
        raise ValueError(f"decay of shape {decay.shape} does not broadcast against inputs {inputs.shape}.") from None
    dtype = promoted(decay.dtype, inputs.dtype)
    decay, inputs = (x.astype(accumulator(dtype)) for x in (decay, inputs))
    if shared:  # what all sequences share has to vary over the axes of a mesh as they do
        decay = zeros_from(inputs, decay.shape, decay.dtype, plus=decay)
    if segment_ids is not None:
        starts = segment_starts(segment_ids, reverse=reverse)
        decay = jnp.where(lax.expand_dims(starts, range(2, decay.ndim)), 0, decay)
    if initial_state is not None and initial_state.shape != inputs[:, 0].shape:
        raise ValueError(
            f"initial_state has shape {initial_state.shape}; inputs {inputs.shape} take {inputs[:, 0].shape}."
        )
    state = zeros_from(inputs, inputs[:, 0].shape, inputs.dtype, plus=initial_state)
    decay, inputs, state = own((decay, inputs, state))
    run = partial(recurrence(impl, reverse, chunk_size), decay, inputs)
    total = lambda: Affine(jnp.prod(decay, axis=1), run(jnp.zeros_like(state))[1])
    states, final = across_devices(affine, total, run, state, reverse=reverse)
    return states.astype(dtype), final


def recurrence(impl: str | None = None, reverse: bool = False, chunk_size: int | None = None):
    """`(decay, inputs, initial_state) -> (states, final_state)` on time that is whole, as inside other ops."""

    def run(decay, inputs, initial_state):
        length = inputs.shape[1]
        # Eight blocks: a block needs an eighth of the memory of `parallel`, and is wide enough for many processors.
        size = min(length, chunk_size or max(128, -(-length // 8)))
        forms = {
            "sequential": partial(sequential, reverse=reverse),
            "parallel": partial(_solve, parallel, reverse),
            "chunked": partial(_solve, partial(blocked, size=size), reverse),
            "in_place": partial(_solve, partial(blocked, size=1), reverse),
            "pallas": partial(in_kernel, reverse=reverse),
        }
        form = dispatch("linear_recurrence", impl, forms, {"cpu": "in_place", "default": "chunked"})
        return form(decay, inputs, initial_state)

    return run
