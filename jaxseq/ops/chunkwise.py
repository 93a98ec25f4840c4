"""Matrix states that decay, S_t = diag(exp g_t) S_{t-1} + k vᵀ + …, a chunk of time at once.

An op adds the arithmetic of one chunk, `chunk(within, tokens, decays, S) -> (out, state)`, on arrays `… C K` and in the
precision of S. XLA runs it on a batch of all sequences and heads, where `within` is `within_chunk.py`; a kernel runs it
on one chunk of one head, where `within` is the kernel's own.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.over_time import Walk, on_platforms

from ..shapes import accumulator, zeros_from
from . import within_chunk
from .matrix_state import per_head

#: Tokens in a chunk: on CPU 16 to 64 are as fast, for all ops; see experiments/README.md.
CHUNK = 32


class Roles(NamedTuple):
    """Which tokens meet the state along the axis that decays: reading it, reading it before their decay, writing to it.

    With `outputs`, what is read lies along that axis. `columns` are all that lies along the other one.
    """

    reads: tuple[str, ...] = ()
    early_reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    outputs: bool = False
    columns: tuple[str, ...] = ("v", "o", "d_o")


def in_xla(step, walk: Walk, S, tokens, matrices):
    """`pallas_kernels.over_time` without a kernel, all heads at once.

    Blocks are read and written where they stay: no copy of an array in another order.
    """
    first = next(iter(tokens.values()))
    (batch, heads), length, size = S.shape[:2], first.shape[1], walk.size
    blocks = length // size
    zeros = lambda shape, dtype: zeros_from(first, shape, dtype)

    def block(n, state):
        S, outputs, carries = state
        i = walk.place(n, blocks)
        here = {name: lax.dynamic_slice_in_dim(x, i * size, size, 1) for name, x in tokens.items()}
        here = {name: per_head(x, heads).swapaxes(1, 2) for name, x in here.items()}
        beside = {name: lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for name, x in matrices.items()}
        after, found = step(within_chunk, S, here, beside)
        write = lambda x, new: lax.dynamic_update_slice_in_dim(x, new.swapaxes(1, 2).astype(x.dtype), i * size, 1)
        outputs = {name: write(x, found[name]) for name, x in outputs.items()}
        return after, outputs, None if carries is None else lax.dynamic_update_index_in_dim(carries, S, i, 0)

    outputs = {name: zeros((batch, length, heads, width), dtype) for name, (width, dtype) in walk.outputs.items()}
    carries = zeros((blocks, *S.shape), S.dtype) if walk.keep else None
    return lax.fori_loop(0, blocks, block, (S, outputs, carries))


class Place(NamedTuple):
    """Where chunks are computed: `run(f, *arrays)` is `f(walk, chunk size, *arrays)`, for one platform or several.

    States between chunks are kept for the backward pass, or computed again: their number is the platform's.
    """

    run: Callable
    keeps: bool


def chunks(form: Callable, single: Callable, length: int, chunk_size: int | None) -> dict[str, Callable]:
    """The forms "chunked" and "pallas" of one `form` that takes a place; the kernel of one token alone is `single`."""
    size = chunk_size or min(CHUNK, length)
    in_kernels = lambda f, *arrays: on_platforms(f, length, chunk_size, *arrays)
    return {
        "chunked": partial(form, place=Place(lambda f, *arrays: f(in_xla, size, *arrays), keeps=True)),
        "pallas": single if length == 1 else partial(form, place=Place(in_kernels, keeps=False)),
    }


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunkwise(chunk: Callable, roles: Roles, place: Place, tokens: dict[str, jax.Array], g, S):
    """Read-outs `B T H V` and the final state, of tokens `B T H …` with values "v", log decays `B T H K|1`, a state.

    Tokens may have fewer heads, each for a run of those of the state. The backward pass computes each chunk again, from
    the state before it.
    """
    return place.run(partial(_forward, chunk, roles, False), tokens, g, S)[:2]


def _forward(chunk, roles, keep: bool, walk: Callable, size: int, tokens, g, S):
    """Read-outs, the final state, and the states before each chunk where they are kept."""
    path = Walk(size, {"o": (tokens["v"].shape[-1], S.dtype)}, roles.columns, keep=keep)
    after, outputs, states = walk(partial(_step, chunk), path, S, _filled(size, tokens | {"g": g}), {})
    return outputs["o"][:, : g.shape[1]], after, states


def _step(chunk, within, S, here, _):
    here = here.copy()
    decays = within.decays_of(here.pop("g"))
    out, after = chunk(within, {name: x.astype(S.dtype) for name, x in here.items()}, decays, S)
    return after, {"o": out}


def _backward(chunk, roles, walk: Callable, size: int, tokens, g, S, states, d_o, d_S):
    """Chunks are differentiated with their decays standing still; the log decays' gradient follows from the others'.

    With S̄ the adjoint of S, and x ⊙ x̄ of whatever meets the state along its keys,

        ḡ_t = Σ_v S_t ⊙ S̄_t − Σ_writes k_t ⊙ k̄_t + Σ_reads a_t ⊙ ā_t        (reads of diag(exp g_t) S_{t-1})
        Σ_v S_{t-1} ⊙ S̄_{t-1} = q_{t-1} ⊙ q̄_{t-1} + ḡ_t + Σ_early_reads a_t ⊙ ā_t

    which is a sum from the end of the chunk, without the decays between any two tokens (GLA, arXiv 2312.06635, section
    4.3). Its rounding error is ε times the other gradients, also where strong decays leave a far smaller one.
    """
    if states is None:
        alone = Walk(size, {}, roles.columns, keep=True)
        states = walk(partial(_step, chunk), alone, S, _filled(size, tokens | {"g": g}), {})[2]

    def step(within, d_after, here, beside):
        here = here.copy()
        d_out, logs = here.pop("d_o"), here.pop("g")
        decays = within.decays_of(logs)
        here = {name: x.astype(d_after.dtype) for name, x in here.items()}
        (o, after), pull_back = jax.vjp(lambda tokens, S: chunk(within, tokens, decays, S), here, beside["S"])
        d_here, d_S = pull_back((d_out, d_after))
        along = lambda names: sum(here[name] * d_here[name] for name in names)
        moved = along(roles.reads) - along(roles.writes) + (o * d_out if roles.outputs else 0)
        if roles.early_reads:
            moved += within.advanced(along(roles.early_reads))  # read before the decay: after that of the one before
        d_total = jnp.sum(after * d_after, -1, keepdims=True).swapaxes(-1, -2)
        if logs.shape[-1] == 1:
            moved, d_total = (jnp.sum(x, -1, keepdims=True) for x in (moved, d_total))
        return d_S, d_here | {"g": d_total + within.later(moved)}

    outputs = {name: (x.shape[-1], x.dtype) for name, x in (tokens | {"g": g}).items()}
    path = Walk(size, outputs, roles.columns, reverse=True, differentiates=True)
    d_S, d_tokens, _ = walk(step, path, d_S, _filled(size, tokens | {"g": g, "d_o": d_o}), {"S": states})
    d_tokens = {name: _together(d[:, : g.shape[1]], (tokens | {"g": g})[name]) for name, d in d_tokens.items()}
    return d_tokens, d_tokens.pop("g"), d_S


def _together(d, x):
    """The gradient of x, whose heads each have a part from every value head they serve."""
    if d.shape[2] == x.shape[2]:
        return d
    parts = d.reshape(*x.shape[:3], -1, d.shape[3]).astype(accumulator(d.dtype))
    return jnp.sum(parts, axis=3).astype(d.dtype)


def _filled(size: int, tokens: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Up to whole chunks, with zeros: such tokens change no state."""
    fill = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), (0, 0), (0, 0)))
    return {name: fill(x) for name, x in tokens.items()}


def _kept(chunk, roles, place, tokens, g, S):
    o, after, states = place.run(partial(_forward, chunk, roles, place.keeps), tokens, g, S)
    return (o, after), (tokens, g, S, states)


def _pulled_back(chunk, roles, place, residuals, cotangents):
    return place.run(partial(_backward, chunk, roles), *residuals, *cotangents)


chunkwise.defvjp(_kept, _pulled_back)
