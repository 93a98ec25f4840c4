"""The ways to run any monoid over time: from any initial state, forwards or in reverse.

Elements lead with batch and time (`B T …`, every leaf), states with batch (`B …`). Each form returns
`(states "B T …", final_state "B …")`; states[t] is the state after element t, or after elements T−1 … t in reverse.
All are differentiable and equal up to rounding; `sequential` is the definition.
"""

from math import log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .monoid import Monoid


def sequential(monoid: Monoid, elements, initial_state, *, reverse: bool = False) -> tuple[Any, Any]:
    """One `act` a step. O(T) depth, O(1) extra state."""
    check_monoid(monoid, elements, initial_state)

    def step(state, element):
        state = monoid.act(element, state)
        return state, state

    final, states = lax.scan(step, initial_state, _swap(elements), reverse=reverse)
    return _swap(states), final


def parallel(monoid: Monoid, elements, initial_state, *, reverse: bool = False) -> tuple[Any, Any]:
    """`lax.associative_scan` of `combine`, then `act` on the initial state. O(log T) depth; keeps T elements."""
    check_monoid(monoid, elements, initial_state)
    if reverse:
        return _reversed(parallel, monoid, elements, initial_state)
    prefixes = lax.associative_scan(monoid.combine, elements, axis=1)
    states = monoid.act(prefixes, jax.tree.map(lambda s: s[:, None], initial_state))
    return states, jax.tree.map(lambda s: s[:, -1], states)


def chunked(
    monoid: Monoid, elements, initial_state, *, chunk_size: int | None = None, reverse: bool = False
) -> tuple[Any, Any]:
    """Parallel inside chunks, sequential across them; the backward pass keeps one state a chunk and recomputes."""
    length, chunk_size = _sizes(elements, chunk_size)
    if reverse:
        return _reversed(chunked, monoid, elements, initial_state, chunk_size=chunk_size)

    @jax.checkpoint
    def step(state, chunk):
        states, final = parallel(monoid, chunk, state)
        return final, states

    chunks = split_chunks(pad_time(monoid, elements, -length % chunk_size), chunk_size)
    final, states = lax.scan(step, initial_state, chunks)
    return join_chunks(states, length), final


def abreast(
    monoid: Monoid, elements, initial_state, *, chunk_size: int | None = None, reverse: bool = False
) -> tuple[Any, Any]:
    """All chunks side by side, one `combine` and then one `act` a step; sequential across. O(C + T/C) depth."""
    length, chunk_size = _sizes(elements, chunk_size)
    check_monoid(monoid, elements, initial_state)
    if reverse:
        return _reversed(abreast, monoid, elements, initial_state, chunk_size=chunk_size)
    padded = pad_time(monoid, elements, -length % chunk_size)
    rows = jax.tree.map(lambda x: x.reshape(-1, chunk_size, *x.shape[2:]), padded)
    apart = lambda tree, like: jax.tree.map(lambda x, s: x.reshape(s.shape[0], -1, *x.shape[1:]), tree, like)
    identity = monoid.identity(jax.tree.map(lambda x: x[:, 0], rows))
    products, _ = lax.scan(lambda product, e: (monoid.combine(product, e), None), identity, _swap(rows))
    between, _ = sequential(monoid, apart(products, elements), initial_state)
    starts = jax.tree.map(lambda s, b: jnp.concatenate([s[:, None], b[:, :-1]], axis=1), initial_state, between)
    states, finals = sequential(monoid, rows, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), starts))
    states = jax.tree.map(lambda x, s: x.reshape(s.shape[0], -1, *x.shape[2:])[:, :length], states, initial_state)
    return states, jax.tree.map(lambda s: s[:, -1], apart(finals, initial_state))


def _sizes(elements, chunk_size: int | None) -> tuple[int, int]:
    """T, and the length of a chunk: where none is given the power of two nearest √T, so that there are as many chunks.

    So depth, the states kept between chunks and the elements kept inside one all grow as √T.
    """
    length = jax.tree.leaves(elements)[0].shape[1]
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; it takes 1 or more, or None.")
    return length, chunk_size or 1 << round(log2(max(1, length)) / 2)


def pad_time(monoid: Monoid, elements, count: int):
    """Append `count` identity elements: they change no state."""
    if count == 0:
        return elements
    tail = monoid.identity(jax.tree.map(lambda x: jnp.repeat(x[:, :1], count, axis=1), elements))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), elements, tail)


def split_chunks(tree, chunk_size: int):
    """`B T …` → `T/C B C …`, ready for a scan over chunks, the last of which is filled up with zeros."""

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk_size)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], -1, chunk_size, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def join_chunks(tree, length: int):
    """`T/C B C …` → `B T …`: the inverse of `split_chunks` of so many steps."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length], tree)


def flipped(tree):
    return jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)


def check_monoid(monoid: Monoid, elements, initial_state) -> None:
    """Raise where two elements combine to something else than an element, or a state moves to no state.

    Raises:
      TypeError: the message names the function and the shapes and dtypes it was given and returned.
    """
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype), elements)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), initial_state)
    for name, taken, args in (("combine", first, (first, first)), ("act", state, (first, state))):
        result = jax.eval_shape(getattr(monoid, name), *args)
        given, returned = _described(taken), _described(result)
        same_tree = str(jax.tree.structure(taken)) == str(jax.tree.structure(result))
        if given != returned or not same_tree:
            raise TypeError(f"{name} returned {returned} for {given}; a monoid's {name} keeps shapes and dtypes.")


def _described(tree) -> str:
    return ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(tree))


def _reversed(form, monoid, elements, initial_state, **options):
    states, final = form(monoid, flipped(elements), initial_state, **options)
    return flipped(states), final


def _swap(tree):
    return jax.tree.map(lambda x: x.swapaxes(0, 1), tree)


def loop(step, state, tokens):
    """`step(state, token) -> (state, output)` along axis 1 of the tokens, one after the other: `(outputs, state)`."""
    state, outputs = lax.scan(step, state, _swap(tokens))
    return _swap(outputs), state
