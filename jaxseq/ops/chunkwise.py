"""Matrix states that decay, S_t = diag(exp g_t) S_{t-1} + k vᵀ + …, a chunk of time at once.

What an op adds is the arithmetic of one chunk, out of the products here: `chunk(tokens, decays, S) -> (out, state)`.
Inside a chunk arrays are `B H C …`, heads before time, so that all products are batched ones, in the precision of S.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import accumulator, zeros_from

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


class Decays(NamedTuple):
    """Decays inside a chunk: from its start to what reads the state, from what writes to its end, of all tokens.

    `levels` hold those of readers and writers, pair by pair of blocks that double in size. Where all channels decay
    alike, `pairwise` is the decay from writer j to reader i, and zero from j = i on.
    """

    from_start: jax.Array
    to_end: jax.Array
    total: jax.Array
    levels: list[tuple[jax.Array, jax.Array]]
    pairwise: jax.Array | None = None


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
        out, after = chunk(here, _decays(_read(g, i, size, g.dtype)), S)
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
    4.3). Its rounding error is that of q ⊙ q̄, also where strong decays leave a far smaller gradient.
    """
    tokens, g, states = residuals
    d_o, d_S = cotangents

    def step(i, carry):
        i = states.shape[0] - 1 - i
        d_after, d_tokens, d_g = carry
        here = jax.tree.map(lambda x: _read(x, i, size, d_after.dtype), tokens)
        S, decays = lax.dynamic_index_in_dim(states, i, 0, keepdims=False), _decays(_read(g, i, size, g.dtype))
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


# ---- inside a chunk -------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, x, y, dtype):
    """An einsum of two arrays in the precision `dtype`, summed in at least float32, and its adjoints so too."""
    return jnp.einsum(equation, x.astype(dtype), y.astype(dtype), preferred_element_type=accumulator(dtype))


def _product_backward(equation, dtype, operands, d_out):
    (x, y), (left, right, out) = operands, equation.replace("->", ",").split(",")
    d_x = product(f"{out},{right}->{left}", d_out, y, dtype)
    return d_x, product(f"{left},{out}->{right}", x, d_out, dtype)


product.defvjp(lambda equation, x, y, dtype: (product(equation, x, y, dtype), (x, y)), _product_backward)


def _decays(g) -> Decays:
    """Decays inside blocks that double in size, up to the chunk: to read from a block's start, to write to its end.

    Where two neighbours join, every later reader meets every earlier writer in one matrix product, the reader decayed
    from the border and the writer decayed to it. Decays are only ever multiplied, never divided or subtracted as
    logs, so all factors stay in [0, 1]: no overflow and no cancellation at any strength (GLA, arXiv 2312.06635,
    section 4.3, takes a reference row a sub-block for the same end).
    """
    size = g.shape[2]
    whole = 1 << (size - 1).bit_length()
    g = jnp.pad(g, ((0, 0), (0, 0), (0, whole - size), (0, 0)))
    total = from_start = jnp.exp(g)
    to_end, levels, block = jnp.ones_like(total), [], 1
    while block < whole:
        (read_early, read_late), (end_early, end_late) = _halves(from_start, block), _halves(to_end, block)
        total_early, total_late = _halves(total, 1)
        levels.append((read_late, end_early))
        from_start = _join(read_early, read_late * total_early)
        to_end = _join(end_early * total_late, end_late)
        total = (total_early * total_late)[..., 0, :]
        block *= 2
    decays = Decays(from_start[:, :, :size], to_end[:, :, :size], total.swapaxes(-1, -2), levels)
    if g.shape[-1] > 1:
        return decays
    one = jnp.ones_like(decays.from_start)
    return decays._replace(pairwise=scores((one,), (one,), decays, one.dtype)[0])


def scores(readers: tuple, writers: tuple, decays: Decays, dtype) -> list:
    """A_ij = q_i · (Π_{j<t≤i} decay_t ⊙ k_j) for j < i, else 0, of every reader q with every writer k in turn."""
    if decays.pairwise is not None:
        return [decays.pairwise * product("bhik,bhjk->bhij", q, k, dtype) for q in readers for k in writers]
    size, whole = readers[0].shape[2], 1 << len(decays.levels)
    fill = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, whole - size), (0, 0)))
    readers, writers = (tuple(map(fill, x)) for x in (readers, writers))
    R, W = len(readers), len(writers)
    A = jnp.zeros((*readers[0].shape[:3], R, 1, W, 1), accumulator(dtype))
    for i, (read, end) in enumerate(decays.levels):
        q = jnp.concatenate([read * _halves(x, 1 << i)[1] for x in readers], axis=3)
        k = jnp.concatenate([end * _halves(x, 1 << i)[0] for x in writers], axis=3)
        cross = product("bhnik,bhnjk->bhnij", q, k, dtype).reshape(*q.shape[:3], R, 1 << i, W, 1 << i)
        early = jnp.concatenate([A[:, :, 0::2], jnp.zeros_like(cross)], axis=6)
        A = jnp.concatenate([early, jnp.concatenate([cross, A[:, :, 1::2]], axis=6)], axis=4)
    return [A[:, :, 0, r, :size, w, :size] for r in range(R) for w in range(W)]


def decayed_values(A, v, decays: Decays, dtype):
    """Σ_{j<i} A_ij (Π_{j<t≤i} decay_t) ⊙ v_j, where the decays are those of the channels of v."""
    size, whole = v.shape[2], 1 << len(decays.levels)
    A = jnp.pad(A, ((0, 0), (0, 0), (0, whole - size), (0, whole - size)))
    v = jnp.pad(v, ((0, 0), (0, 0), (0, whole - size), (0, 0)))
    o = jnp.zeros(v.shape, accumulator(dtype))
    for i, (read, end) in enumerate(decays.levels):
        block = 1 << i
        cross = _on_diagonal(A, 2 * block)[..., block:, :block]
        late = read * product("bhnij,bhnjv->bhniv", cross, end * _halves(v, block)[0], dtype)
        o += _join(jnp.zeros_like(late), late)
    return o[:, :, :size]


def diagonal(q, k):
    """What a token reads of its own writing: q_i · k_i, `B H C 1`."""
    return jnp.sum(q * k, axis=-1, keepdims=True)


@jax.custom_vjp
def inverse(L):
    """(I + L)⁻¹ of strictly lower triangular L `… C C`, by halves, out of matrix products alone.

    Blocks of up to 8 are a product of powers that ends by itself. Two neighbours join as

        [[A, 0], [B, D]]⁻¹ = [[A⁻¹, 0], [−D⁻¹ B A⁻¹, D⁻¹]]

    The product of powers alone overflows at 64 where keys repeat; a solver of LAPACK's is slower.
    """
    *batch, size, _ = L.shape
    whole = 1 << (size - 1).bit_length()
    L = jnp.pad(L, [(0, 0)] * len(batch) + [(0, whole - size)] * 2)
    times = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    block = min(8, whole)
    power = -_on_diagonal(L, block)
    one = jnp.broadcast_to(jnp.eye(block, dtype=L.dtype), power.shape)
    joined, reach = power + one, 2
    while reach < block:
        power = times(power, power)
        joined, reach = times(joined, power + one), 2 * reach
    while block < whole:
        early, late = joined[..., 0::2, :, :], joined[..., 1::2, :, :]
        corner = -times(times(late, _on_diagonal(L, 2 * block)[..., block:, :block]), early)
        joined = jnp.block([[early, jnp.zeros_like(corner)], [corner, late]])
        block *= 2
    return joined[..., 0, :size, :size]


def _on_diagonal(L, block):
    """The square blocks on the diagonal: `… C C` → `… C/b b b`."""
    starts = range(0, L.shape[-1], block)
    return jnp.stack([L[..., i : i + block, i : i + block] for i in starts], axis=-3)


def _inverse_backward(X, d_X):
    times = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    transposed = X.swapaxes(-1, -2)
    return (-jnp.tril(times(times(transposed, d_X), transposed), -1),)


inverse.defvjp(lambda L: (inverse(L),) * 2, _inverse_backward)


def _halves(x, block):
    """The earlier and the later block of every pair of neighbours: `B H C K` → two of `B H C/2b b K`."""
    pairs = x.reshape(*x.shape[:2], -1, 2, block, x.shape[-1])
    return pairs[:, :, :, 0], pairs[:, :, :, 1]


def _join(early, late):
    return jnp.stack([early, late], axis=3).reshape(*early.shape[:2], -1, early.shape[-1])
