"""The arithmetic of a chunk, out of matrix products: arrays are `… C K`, and what stands in front is one batch."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..exact import einsum, matmul
from ..shapes import accumulator
from . import matrix_state


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, x, y, dtype):
    """An einsum of two arrays in the precision `dtype`, summed in at least float32, and its adjoints so too.

    Accelerators would round float32 factors, were they not told.
    """
    precision = lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=accumulator(dtype))


def _product_backward(equation, dtype, operands, d_out):
    (x, y), (left, right, out) = operands, equation.replace("->", ",").split(",")
    d_x = product(f"{out},{right}->{left}", d_out, y, dtype)
    return d_x.astype(x.dtype), product(f"{left},{out}->{right}", x, d_out, dtype).astype(y.dtype)


product.defvjp(lambda equation, x, y, dtype: (product(equation, x, y, dtype), (x, y)), _product_backward)


def decays_of(g, dtype=None) -> Decays:
    """Decays inside blocks that double in size, up to the chunk: to read from a block's start, to write to its end.

    Where two neighbours join, every later reader meets every earlier writer in one matrix product, the reader decayed
    from the border and the writer decayed to it. Decays are only ever multiplied, never divided or subtracted as
    logs, so all factors stay in [0, 1]: no overflow and no cancellation at any strength (GLA, arXiv 2312.06635,
    section 4.3, takes a reference row a sub-block for the same end). They are of the dtype of g, whatever `dtype` they
    decay.
    """
    size = g.shape[-2]
    whole = 1 << (size - 1).bit_length()
    g = _filled(g, whole)
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
    decays = Decays(from_start[..., :size, :], to_end[..., :size, :], total.swapaxes(-1, -2), levels)
    if g.shape[-1] > 1:
        return decays
    one = jnp.ones_like(decays.from_start)
    return decays._replace(pairwise=scores((one,), (one,), decays, one.dtype)[0])


def scores(readers: tuple, writers: tuple, decays: Decays, dtype) -> list:
    """A_ij = q_i · (Π_{j<t≤i} decay_t ⊙ k_j) for j < i, else 0, of every reader q with every writer k in turn."""
    if decays.pairwise is not None:
        return [decays.pairwise * product("...ik,...jk->...ij", q, k, dtype) for q in readers for k in writers]
    size, whole = readers[0].shape[-2], 1 << len(decays.levels)
    readers, writers = (tuple(_filled(x, whole) for x in of) for of in (readers, writers))
    R, W = len(readers), len(writers)
    A = jnp.zeros((*readers[0].shape[:-1], R, 1, W, 1), accumulator(dtype))
    for i, (read, end) in enumerate(decays.levels):
        q = jnp.concatenate([read * _halves(x, 1 << i)[1] for x in readers], axis=-2)
        k = jnp.concatenate([end * _halves(x, 1 << i)[0] for x in writers], axis=-2)
        cross = product("...ik,...jk->...ij", q, k, dtype).reshape(*q.shape[:-2], R, 1 << i, W, 1 << i)
        early = jnp.concatenate([A[..., 0::2, :, :, :, :], jnp.zeros_like(cross)], axis=-1)
        late = jnp.concatenate([cross, A[..., 1::2, :, :, :, :]], axis=-1)
        A = jnp.concatenate([early, late], axis=-3)
    return [A[..., 0, r, :size, w, :size] for r in range(R) for w in range(W)]


def decayed_values(A, v, decays: Decays, dtype):
    """Σ_{j≤i} A_ij (Π_{j<t≤i} decay_t) ⊙ v_j, where the decays are those of the channels of v; j = i is no part of
    `scores`."""
    own = jnp.diagonal(A, axis1=-2, axis2=-1)[..., None]
    if decays.pairwise is not None:
        return product("...ij,...jv->...iv", decays.pairwise * A + diagonal_matrix(own), v, dtype)
    own *= v
    size, whole = v.shape[-2], 1 << len(decays.levels)
    A, v = _filled(_filled(A, whole).swapaxes(-1, -2), whole).swapaxes(-1, -2), _filled(v, whole)
    o = jnp.zeros(v.shape, accumulator(dtype))
    for i, (read, end) in enumerate(decays.levels):
        block = 1 << i
        cross = _on_diagonal(A, 2 * block)[..., block:, :block]
        late = read * product("...ij,...jv->...iv", cross, end * _halves(v, block)[0], dtype)
        o += _join(jnp.zeros_like(late), late)
    return own + o[..., :size, :]


def later(x):
    """Σ_{t≥i} x_t, as a product: cumulative sums are slow on CPU, and with one matrix for the batch x is transposed."""
    size = x.shape[-2]
    which = jnp.broadcast_to(jnp.triu(jnp.ones((size, size), x.dtype)), (*x.shape[:-2], size, size))
    return einsum("...ij,...jk->...ik", which, x)


def advanced(x):
    """x_{i+1} at i, zeros at the end."""
    return matrix_state.advanced(x, x.ndim - 2)


def delayed(x, first=None):
    """x_{i-1} at i, after `first`, or zeros."""
    return matrix_state.delayed(x, x.ndim - 2, first)


def first(x):
    """`… C K` → `… 1 K`."""
    return x[..., :1, :]


def diagonal_matrix(column):
    """`… C 1` → `… C C`."""
    size = column.shape[-2]
    return column * jnp.eye(size, dtype=column.dtype).reshape((1,) * (column.ndim - 2) + (size, size))


def diagonal(q, k):
    """What a token reads of its own writing: q_i · k_i, `… C 1`."""
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
    block = min(8, whole)
    power = -_on_diagonal(L, block)
    one = jnp.broadcast_to(jnp.eye(block, dtype=L.dtype), power.shape)
    joined, reach = power + one, 2
    while reach < block:
        power = matmul(power, power)
        joined, reach = matmul(joined, power + one), 2 * reach
    while block < whole:
        early, late = joined[..., 0::2, :, :], joined[..., 1::2, :, :]
        corner = -matmul(matmul(late, _on_diagonal(L, 2 * block)[..., block:, :block]), early)
        joined = jnp.block([[early, jnp.zeros_like(corner)], [corner, late]])
        block *= 2
    return joined[..., 0, :size, :size]


def _on_diagonal(L, block):
    """The square blocks on the diagonal: `… C C` → `… C/b b b`."""
    starts = range(0, L.shape[-1], block)
    return jnp.stack([L[..., i : i + block, i : i + block] for i in starts], axis=-3)


def _inverse_backward(X, d_X):
    transposed = X.swapaxes(-1, -2)
    return (-jnp.tril(matmul(matmul(transposed, d_X), transposed), -1),)


inverse.defvjp(lambda L: (inverse(L),) * 2, _inverse_backward)


def _halves(x, block):
    """The earlier and the later block of every pair of neighbours: `… C K` → two of `… C/2b b K`."""
    pairs = x.reshape(*x.shape[:-2], -1, 2, block, x.shape[-1])
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _join(early, late):
    return jnp.stack([early, late], axis=-3).reshape(*early.shape[:-3], -1, early.shape[-1])


def _filled(x, size):
    """`… C K` with zeros up to C = size."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])
