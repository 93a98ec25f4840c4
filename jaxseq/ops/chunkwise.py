"""Matrix states that decay, S_t = diag(exp g_t) S_{t-1} + k vᵀ + …, a chunk of time at once.

What an op adds is the arithmetic of one chunk, out of the products in `within_chunk.py`: `chunk(tokens, decays, S) ->
(out, state)`. There arrays are `B H C …`, heads before time, so that all products are batched ones, in the precision of
S.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import zeros_from
from .within_chunk import decays_of

#: Tokens in a chunk: on CPU 16 to 64 are as fast, for all ops; see experiments/README.md.
CHUNK = 32


class Roles(NamedTuple):
    """Which tokens meet the state along the axis that decays: reading it, reading it before their decay, writing to it.

    With `outputs`, what is read lies along that axis.
    """

    reads: tuple[str, ...] = ()
    early_reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    outputs: bool = False


def chunkwise(chunk: Callable, roles: Roles, chunk_size: int, tokens: dict[str, jax.Array], g, S):
    """Read-outs `B T H V` and the final state, of tokens `B T H …` with values "v", log decays `B T H K|1`, a state.

    Tokens of zeros change no state: they fill the last chunk. The backward pass keeps one state a chunk and computes
    each chunk again.
    """
    length = g.shape[1]
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -length % chunk_size)) + ((0, 0),) * (x.ndim - 2))
    o, S = _run(chunk, roles, chunk_size, jax.tree.map(pad, tokens), pad(g), S)
    return o[:, :length], S


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(chunk, roles, size, tokens, g, S):
    return _forward(chunk, roles, size, tokens, g, S)[0]


def _forward(chunk, roles, size, tokens, g, S):
    """Chunks are read and written where they stay: no copy of an array in another order."""
    chunks, v = g.shape[1] // size, tokens["v"]

    def step(i, carry):
        S, o, states = carry
        here = jax.tree.map(lambda x: _read(x, i, size, S.dtype), tokens)
        out, after = chunk(here, decays_of(_read(g, i, size, g.dtype)), S)
        return after, _write(o, out, i), lax.dynamic_update_index_in_dim(states, S, i, 0)

    o, states = zeros_from(v, v.shape, S.dtype), zeros_from(v, (chunks, *S.shape), S.dtype)
    after, o, states = lax.fori_loop(0, chunks, step, (S, o, states))
    return (o, after), (tokens, g, states)


def _backward(chunk, roles, size, residuals, cotangents):
    """Chunks are differentiated with their decays standing still; the log decays' gradient follows from the others'.

    With S̄ the adjoint of S, and x ⊙ x̄ of whatever meets the state along its keys,

        ḡ_t = Σ_v S_t ⊙ S̄_t − Σ_writes k_t ⊙ k̄_t + Σ_reads a_t ⊙ ā_t        (reads of diag(exp g_t) S_{t-1})
        Σ_v S_{t-1} ⊙ S̄_{t-1} = q_{t-1} ⊙ q̄_{t-1} + ḡ_t + Σ_early_reads a_t ⊙ ā_t

    which is a sum from the end of the chunk, without the decays between any two tokens (GLA, arXiv 2312.06635, section
    4.3). Its rounding error is ε times the other gradients, also where strong decays leave a far smaller one.
    """
    tokens, g, states = residuals
    d_o, d_S = cotangents

    def step(i, carry):
        i = states.shape[0] - 1 - i
        d_after, d_tokens, d_g = carry
        here = jax.tree.map(lambda x: _read(x, i, size, d_after.dtype), tokens)
        S, decays = lax.dynamic_index_in_dim(states, i, 0, keepdims=False), decays_of(_read(g, i, size, g.dtype))
        (o, after), pull_back = jax.vjp(lambda tokens, S: chunk(tokens, decays, S), here, S)
        d_out = _read(d_o, i, size, d_after.dtype)
        d_here, d_S = pull_back((d_out, d_after))
        along = lambda names: sum(here[name] * d_here[name] for name in names)
        moved = along(roles.reads) - along(roles.writes) + (o * d_out if roles.outputs else 0)
        if roles.early_reads:
            moved += jnp.pad(along(roles.early_reads)[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))
        d_total = jnp.sum(after * d_after, -1)[:, :, None]
        if g.shape[-1] == 1:
            moved, d_total = (jnp.sum(x, -1, keepdims=True) for x in (moved, d_total))
        # A batched product: cumulative sums leave the fast path on CPU, and one matrix for all would transpose `moved`.
        later = jnp.broadcast_to(jnp.triu(jnp.ones((size, size), moved.dtype)), (*moved.shape[:2], size, size))
        d_decay = d_total + jnp.einsum("bhij,bhjk->bhik", later, moved)
        return d_S, jax.tree.map(lambda d, x: _write(d, x, i), d_tokens, d_here), _write(d_g, d_decay, i)

    like = lambda x: zeros_from(tokens["v"], x.shape, x.dtype)
    d_S, d_tokens, d_g = lax.fori_loop(0, states.shape[0], step, (d_S, jax.tree.map(like, tokens), like(g)))
    return d_tokens, d_g, d_S


_run.defvjp(_forward, _backward)


def _read(x, i, size, dtype):
    """Chunk i of `B T H …` as `B H C …`."""
    return lax.dynamic_slice_in_dim(x, i * size, size, 1).swapaxes(1, 2).astype(dtype)


def _write(x, chunk, i):
    chunk = chunk.swapaxes(1, 2).astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(x, chunk, i * chunk.shape[1], 1)
