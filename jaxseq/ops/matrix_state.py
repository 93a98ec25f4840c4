"""What the ops with a matrix state `B H K V` share: their arguments in one form, and all tokens as one element."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..monoid import MatrixMap
from ..segments import segment_starts
from ..shapes import accumulator, check_log_decay, zeros_from
from ..sharded import own


class Prepared(NamedTuple):
    """Queries, scaled, and keys, with as many heads as they came with; and of every value head the log decays
    `B T H K|1` and a state of at least float32.
    """

    q: jax.Array
    k: jax.Array
    g: jax.Array
    S: jax.Array


def arguments(op, query, key, value, log_decay, scale, initial_state, segment_ids, chunk_size) -> Prepared:
    """A change of segment is a decay of zero, without any special case."""
    check_inputs(op, query, key, value, log_decay, chunk_size)
    (batch, _, heads, V), (groups, K) = value.shape, key.shape[2:]
    dtype = accumulator(value.dtype)
    g = _per_channel(log_decay, value, groups, dtype)
    if segment_ids is not None:
        g = jnp.where(segment_starts(segment_ids)[:, :, None, None], -jnp.inf, g)
    q = query * jnp.asarray(K**-0.5 if scale is None else scale, query.dtype)
    S = zeros_from(value, (batch, heads, K, V), dtype, plus=initial_state)
    return Prepared(*own((q, key, zeros_from(value, g.shape, dtype, plus=g), S)))


def check_inputs(op: str, query, key, value, log_decay, chunk_size: int | None) -> None:
    """Raise on what shapes alone do not tell."""
    if value.shape[1] == 0:
        raise ValueError(f"query has shape {query.shape}; {op} takes at least one step of time.")
    if value.shape[2] % key.shape[2]:
        raise ValueError(f"key has {key.shape[2]} heads, which do not divide the {value.shape[2]} of value.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; {op} takes 1 or more.")
    check_log_decay(log_decay, op)


def per_head(x, heads: int):
    """Each of the heads `B T G …` for a run of consecutive value heads: `B T H …`."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _per_channel(log_decay, value, groups, dtype):
    batch, length, heads, _ = value.shape
    if log_decay is None:
        return jnp.zeros((batch, length, heads, 1), dtype)
    g = log_decay.astype(dtype)
    if g.ndim == 1:
        return jnp.broadcast_to(g[None, None, :, None], (batch, length, heads, 1))
    g = g if g.ndim == 4 else g[..., None]
    if g.shape[2] not in (heads, groups):
        raise ValueError(f"log_decay has {g.shape[2]} heads; value has {heads} and key has {groups}.")
    return per_head(g, heads)


def best(length: int) -> tuple[dict[str, str], str]:
    """The form for each platform, and the one where a gradient is taken, as `dispatch` takes them.

    A processor with few lanes loops fastest over time, but would have to keep every state for the gradient.
    """
    return {"cpu": "sequential", "default": "chunked" if length > 1 else "sequential"}, "chunked"


def in_accumulator(form, S):
    """The form on tokens of every value head, in the precision of the state."""
    wide = lambda x: per_head(x, S.shape[1]).astype(S.dtype)
    return lambda *tokens_and_state: form(*map(wide, tokens_and_state[:-1]), tokens_and_state[-1].astype(S.dtype))


def total_map(run, v, S) -> MatrixMap:
    """All tokens as one element, from one `run(v, S)`: of values and, in columns beside them, of the unit state."""
    K, V = S.shape[-2:]
    unit = jnp.broadcast_to(jnp.eye(K, dtype=S.dtype), (*S.shape[:-1], K))
    columns = jnp.concatenate([v, jnp.zeros((*v.shape[:-1], K), v.dtype)], axis=-1)
    _, final = run(columns, jnp.concatenate([jnp.zeros_like(S), unit], axis=-1))
    return MatrixMap(final[..., V:], final[..., :V])


def advanced(x, axis: int):
    """x_{i+1} at i: a token's read before its decay is a read after the token before it."""
    return jnp.concatenate([lax.slice_in_dim(x, 1, None, axis=axis), _edge(x, axis)], axis)


def delayed(x, axis: int, first=None):
    """x_{i-1} at i, after `first`, or zeros: what `advanced` reads found, back at the tokens they are of."""
    return jnp.concatenate([_edge(x, axis) if first is None else first, lax.slice_in_dim(x, 0, -1, axis=axis)], axis)


def _edge(x, axis):
    return jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis))


def unless_restart(x, g):
    """x, but zero where g is −∞ in all channels: such a token reads nothing before its decay."""
    return jnp.where(jnp.all(jnp.isneginf(g), axis=-1, keepdims=True), 0, x)
