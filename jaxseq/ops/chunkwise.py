"""Matrix states that decay, S_t = diag(exp g_t) S_{t-1} + k vᵀ + …, a chunk of time at once.

An op adds the arithmetic of one `Chunk`, on arrays `… C K` and in the precision of the state. XLA runs it on a batch of
all sequences and heads, where `within` is `within_chunk.py`; a kernel runs it on one chunk of one head, where `within`
is the kernel's own.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.over_time import on_platforms
from pallas_kernels.walk import Sweep, Walk, Walker

from ..shapes import accumulator, zeros_from
from . import within_chunk
from .matrix_state import per_head

#: Tokens in a chunk: on CPU 16 to 64 are as fast, for all ops; see experiments/README.md.
CHUNK = 32


class Chunk(NamedTuple):
    """The arithmetic of a chunk in two parts, with products in `dtype`.

    `prepare(dtype, within, rows, decays)` is all that no state is needed for, by name: rows with their decays, each
    channel for itself, and `pairs` of tokens, sums over channels, so that those of parts of them add up;
    `finish(within, pairs)` makes of the sums what goes by their names then. The rest is
    `through(dtype, within, columns, prepared, total, S) -> (out, state)`. Many processors prepare all chunks
    `beforehand`, where it is arrays `C W`; what is `exact` keeps the precision of S then.
    """

    dtype: jnp.dtype
    prepare: Callable
    through: Callable
    pairs: tuple[str, ...] = ()
    finish: Callable | None = None
    exact: tuple[str, ...] = ()
    beforehand: bool = True

    def prepared(self, within, rows, decays):
        found = self.prepare(self.dtype, within, rows, decays)
        return found | self.finished(within, {name: found[name] for name in self.pairs})

    def finished(self, within, pairs):
        return self.finish(within, pairs) if self.finish else pairs

    def stored(self, dtype):
        """In which dtype what is of this one lies in memory between two kernels: float16 would overflow."""
        return jnp.bfloat16 if self.dtype == jnp.bfloat16 else dtype


class Roles(NamedTuple):
    """Which tokens meet the state along the axis that decays: reading it, reading it before their decay, writing to it.

    What writes is prepared with its decay to the end of the chunk. With `outputs`, what is read lies along that axis.
    `columns` are all that lies along the other one.
    """

    reads: tuple[str, ...] = ()
    early_reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    outputs: bool = False
    columns: tuple[str, ...] = ("v", "o", "d_o")

    def apart(self, tokens):
        """Rows, columns."""
        along = lambda columns: {name: x for name, x in tokens.items() if (name in self.columns) == columns}
        return along(False), along(True)

    def of_logs(self, within, total, d_total, prepared, rows, out=None):
        """The gradient of log decays, `_backward`'s ḡ, from pairs (x, x̄) of what is prepared, of rows, of outputs."""
        of_all = total.shape[-2] == 1  # channels decay alike
        meet = lambda x, d_x: jnp.sum(x * d_x, -1, keepdims=True) if of_all else x * d_x
        along = lambda pairs, names: sum(meet(pairs[0][name], pairs[1][name]) for name in names)
        early = along(rows, self.early_reads)
        moved = along(rows, self.reads) + early - along(rows, self.writes)
        if self.outputs:
            moved += meet(*out)
        written = jnp.sum(along(prepared, self.writes), -2, keepdims=True)
        # What is read early is read before its own decay.
        return (total * d_total).swapaxes(-1, -2) + written + within.later(moved) - early


def in_xla(step, walk: Walk, S, tokens, matrices):
    """A walk of `pallas_kernels.walk` without a kernel, all heads at once.

    Blocks are read and written where they stay: no copy of an array in another order.
    """
    first = next(iter(tokens.values()))
    (batch, heads), length, size = S.shape[:2], first.shape[1], walk.size
    blocks = length // size
    zeros = lambda shape, dtype: zeros_from(first, shape, dtype)

    def own(x):
        """In bfloat16, products with a head that is repeated in the same fusion are wrong on a CPU (jax 0.10, 0.11)."""
        return x if x.shape[2] == heads else lax.optimization_barrier(per_head(x, heads))

    def block(n, state):
        S, outputs, carries = state
        i = walk.place(n, blocks)
        here = {name: lax.dynamic_slice_in_dim(x, i * size, size, 1) for name, x in tokens.items()}
        here = {name: own(x).swapaxes(1, 2) for name, x in here.items()}
        beside = {name: lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for name, x in matrices.items()}
        after, found = step(within_chunk, S, here, beside)
        write = lambda x, new: lax.dynamic_update_slice_in_dim(x, new.swapaxes(1, 2).astype(x.dtype), i * size, 1)
        outputs = {name: write(x, found[name]) for name, x in outputs.items()}
        return after, outputs, None if carries is None else lax.dynamic_update_index_in_dim(carries, S, i, 0)

    outputs = {name: zeros((batch, length, heads, width), dtype) for name, (width, dtype) in walk.outputs.items()}
    carries = zeros((blocks, *S.shape), S.dtype) if walk.keep else None
    return lax.fori_loop(0, blocks, block, (S, outputs, carries))


class Place(NamedTuple):
    """Where chunks are computed: `run(f, *arrays)` is `f(walker, chunk size, *arrays)`, for one platform or several.

    States between chunks are kept for the backward pass, or computed again: their number is the platform's.
    """

    run: Callable
    keeps: bool


def chunks(table: str, form: Callable, single: Callable, length: int, chunk_size: int | None) -> dict[str, Callable]:
    """The forms "chunked" and "pallas" of one `form` that takes a place; the kernel of one token alone is `single`.

    Tiles of the others are in this table.
    """
    size = chunk_size or min(CHUNK, length)
    in_kernels = lambda f, *arrays: on_platforms(f, table, length, chunk_size, *arrays)
    return {
        "chunked": partial(form, place=Place(lambda f, *arrays: f(Walker(in_xla), size, *arrays), keeps=True)),
        "pallas": single if length == 1 else partial(form, place=Place(in_kernels, keeps=False)),
    }


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunkwise(chunk: Chunk, roles: Roles, place: Place, tokens: dict[str, jax.Array], g, S):
    """Read-outs `B T H V` and the final state, of tokens `B T H …` with values "v", log decays `B T H K|1`, a state.

    Tokens may have fewer heads, each for a run of those of the state. The backward pass computes each chunk again, from
    the state before it.
    """
    return place.run(partial(_forward, chunk, roles, False), tokens, g, S)[:2]


def _forward(chunk: Chunk, roles: Roles, keep: bool, walker: Walker, size: int, tokens, g, S):
    """Read-outs, the final state, and the states before each chunk where they are kept."""
    path = Walk(
        size, {"o": (tokens["v"].shape[-1], S.dtype)}, roles.columns, keep=keep, carries_dtype=chunk.stored(S.dtype)
    )
    rows, columns = roles.apart(_filled(size, tokens | {"g": g}))
    if walker.each and chunk.beforehand:
        prepared = walker.each([_sweep(chunk, S.dtype)], size, S.shape[2], rows)
        after, outputs, states = walker.walk(partial(_through, chunk, roles), path, S, columns | prepared, {})
    else:
        after, outputs, states = walker.walk(partial(_whole, chunk, roles), path, S, columns | rows, {})
    return outputs["o"][:, : g.shape[1]], after, states


def _whole(chunk: Chunk, roles: Roles, within, S, here, matrices):
    """A chunk at once."""
    rows, columns = roles.apart(_cast(here, S.dtype))
    decays = within.decays_of(rows.pop("g"), chunk.dtype)
    prepared = chunk.prepared(within, rows, decays)
    o, after = chunk.through(chunk.dtype, within, columns, prepared, decays.total, S)
    return after, {"o": o}


def _parts(chunk: Chunk, dtype, within, here):
    """Of some of the channels; "total" is the decay of all tokens, one row."""
    rows = _cast(here, dtype)
    decays = within.decays_of(rows.pop("g"), chunk.dtype)
    found = chunk.prepare(chunk.dtype, within, rows, decays)
    narrow = {name: x if name in chunk.pairs else x.astype(chunk.stored(dtype)) for name, x in found.items()}
    return narrow | {"total": decays.total.swapaxes(-1, -2)}


def _finish(chunk: Chunk, dtype, within, pairs, known):
    finished = chunk.finished(within, pairs)
    return {name: x if name in chunk.exact else x.astype(chunk.stored(dtype)) for name, x in finished.items()}


def _sweep(chunk: Chunk, dtype) -> Sweep:
    return Sweep(partial(_parts, chunk, dtype), chunk.pairs, partial(_finish, chunk, dtype))


def _through(chunk: Chunk, roles: Roles, within, S, here, _):
    prepared, columns = roles.apart(_cast(here, S.dtype))
    total = prepared.pop("total").swapaxes(-1, -2)
    o, after = chunk.through(chunk.dtype, within, columns, prepared, total, S)
    return after, {"o": o}


def _backward(chunk: Chunk, roles: Roles, walker: Walker, size: int, tokens, g, S, states, d_o, d_S):
    """Chunks are differentiated with their decays standing still; the log decays' gradient follows from the others'.

    With x ⊙ x̄ of whatever meets the state along its keys, and S the state before the chunk, decayed by `total`,

        ḡ_t = Σ_v total ⊙ S ⊙ S̄_after + Σ_writes Σ_j (k_j ⊙ k̄_j, decayed to the end)
              + Σ_{i≥t} (Σ_reads q_i ⊙ q̄_i − Σ_writes k_i ⊙ k̄_i) + Σ_{i>t} Σ_early_reads a_i ⊙ ā_i

    which is a sum from the end of the chunk, without the decays between any two tokens (GLA, arXiv 2312.06635, section
    4.3). Its rounding error is ε times the other gradients, also where strong decays leave a far smaller one.
    """
    moving = tokens | {"g": g}
    rows, columns = roles.apart(_filled(size, moving))
    d_o = _filled(size, {"d_o": d_o})
    each = walker.each if chunk.beforehand else None
    prepared = each([_sweep(chunk, S.dtype)], size, S.shape[2], rows) if each else rows
    if states is None:
        step = partial(_through if each else _whole, chunk, roles)
        alone = Walk(size, {}, roles.columns, keep=True, carries_dtype=chunk.stored(S.dtype))
        states = walker.walk(step, alone, S, columns | prepared, {})[2]
    like = lambda arrays: {name: (x.shape[-1], x.dtype) for name, x in arrays.items()}
    outputs = like(columns | prepared)
    path = Walk(size, outputs, roles.columns, reverse=True, differentiated=True, carries_dtype=chunk.stored(S.dtype))
    step = partial(_through_backward if each else _whole_backward, chunk, roles)
    d_S, d_tokens, _ = walker.walk(step, path, d_S, columns | prepared | d_o, {"S": states})
    if each:
        d_prepared = {f"d_{name}": d_tokens.pop(name) for name in prepared}
        pairs = tuple(f"d_{name}" for name in chunk.pairs)
        d_tokens |= each(_backward_sweeps(chunk, roles, S.dtype), size, S.shape[2], rows | d_prepared, pairs)
    cut = lambda d, x: _together(d[:, : x.shape[1], :, : x.shape[3]], x)
    d_tokens = {name: cut(d_tokens[name], x) for name, x in moving.items()}
    return d_tokens, d_tokens.pop("g"), d_S


def _whole_backward(chunk: Chunk, roles: Roles, within, d_after, here, matrices):
    """Not one after the other as the two below, which compute twice what is prepared: XLA does not see that."""
    here, S = _cast(here, d_after.dtype), matrices["S"].astype(d_after.dtype)
    d_o = here.pop("d_o")
    rows, columns = roles.apart(here)
    decays = within.decays_of(rows.pop("g"), chunk.dtype)
    prepared, pull_rows = jax.vjp(lambda rows: chunk.prepared(within, rows, decays), rows)
    (o, _), pull = jax.vjp(partial(chunk.through, chunk.dtype, within), columns, prepared, decays.total, S)
    d_columns, d_prepared, d_total, d_S = pull((d_o, d_after))
    (d_rows,) = pull_rows(d_prepared)
    d_logs = roles.of_logs(within, decays.total, d_total, (prepared, d_prepared), (rows, d_rows), (o, d_o))
    return d_S, d_columns | d_rows | {"g": d_logs}


def _through_backward(chunk: Chunk, roles: Roles, within, d_after, here, matrices):
    here, S = _cast(here, d_after.dtype), matrices["S"].astype(d_after.dtype)
    d_o = here.pop("d_o")
    prepared, columns = roles.apart(here)
    total = prepared.pop("total").swapaxes(-1, -2)
    pull = jax.vjp(partial(chunk.through, chunk.dtype, within), columns, prepared, total, S)[1]
    d_columns, d_prepared, d_total, d_S = pull((d_o, d_after))
    return d_S, d_columns | d_prepared | {"total": d_total.swapaxes(-1, -2)}


def _backward_sweeps(chunk: Chunk, roles: Roles, dtype) -> list[Sweep]:
    """What is made of pairs is differentiated at their sums over all channels: a sweep for these, one for gradients."""

    def sums(within, here):
        found = _parts(chunk, dtype, within, here)
        return {name: found[name] for name in chunk.pairs}

    def pulled_back(within, sums, known):
        finished, pull = jax.vjp(partial(chunk.finished, within._replace(differentiated=True)), sums)
        (d_sums,) = pull({name: known[f"d_{name}"].astype(x.dtype) for name, x in finished.items()})
        return {f"d_{name}": x for name, x in d_sums.items()}

    last = Sweep(partial(_prepare_backward, chunk, roles, dtype))
    return [Sweep(sums, chunk.pairs, pulled_back), last] if chunk.finish else [last]


def _prepare_backward(chunk: Chunk, roles: Roles, dtype, within, here):
    within = within._replace(differentiated=True)
    d_prepared = {name[2:]: x.astype(dtype) for name, x in here.items() if name.startswith("d_")}
    d_total = d_prepared.pop("total").swapaxes(-1, -2)
    narrow = {name: x for name, x in here.items() if not name.startswith("d_")}
    rows = _cast(narrow, dtype)
    decays = within.decays_of(rows.pop("g"), chunk.dtype)
    prepared, pull = jax.vjp(lambda rows: chunk.prepare(chunk.dtype, within, rows, decays), rows)
    (d_rows,) = pull(d_prepared)
    d_logs = roles.of_logs(within, decays.total, d_total, (prepared, d_prepared), (rows, d_rows))
    return {name: d.astype(narrow[name].dtype) for name, d in (d_rows | {"g": d_logs}).items()}


def _cast(arrays, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), arrays)


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
