"""The arithmetic of one chunk in a kernel: arrays are `C K`, and everything is a product of matrices, a mask or a sum.

Kernels know no cumulative sum and no slice of a value, and a part of eight rows costs as much as a whole tile. So where
XLA would halve a chunk again and again, all is done at full size under masks of zeros and ones.
"""

from collections.abc import Callable
from functools import partial
from math import log
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

#: The log decay of a restart: e to this is zero, and zero times it is no NaN, as it would be with −∞.
NOTHING_LEFT = -1e4


def matrix_width(width: int) -> int:
    """The next width that a GPU's product of matrices takes: a power of two, 16 at least."""
    return max(16, 1 << (width - 1).bit_length())


class Decays(NamedTuple):
    """Decays inside a chunk: from its start to what reads the state, from what writes to its end, of all tokens.

    `logs` are those of each token, to the base 2. Where all channels decay alike, `pairwise` is the decay from writer j
    to reader i, and zero from j = i on.
    """

    from_start: jax.Array
    to_end: jax.Array
    total: jax.Array
    logs: jax.Array
    pairwise: jax.Array | None = None


class WithinChunk(NamedTuple):
    """Products, decays and inverses; `exact` is how this back end multiplies float32 without rounding it first.

    Where the arithmetic is `differentiated`, products and inverses come with their adjoints; Triton takes no function
    that has one and is not.
    """

    exact: lax.Precision | lax.DotAlgorithmPreset
    differentiated: bool = False

    def product(self, equation: str, x, y, dtype):
        """An einsum of two matrices in the precision `dtype`, summed in at least float32, and its adjoints so too."""
        return self._form(_product)(equation.replace("...", ""), dtype, self.exact, x, y)

    def decays_of(self, g, dtype) -> Decays:
        """Every decay is 2 to a sum of log decays, never to a difference: no overflow, no cancellation.

        They decay what is of this dtype.
        """
        g = jnp.maximum(g, NOTHING_LEFT) * (1 / log(2))
        i, j = _rows_and_columns(g.shape[0])
        sums = partial(_sums, self.exact, _parts(dtype))
        from_start, to_end = (jnp.exp2(sums(which, g)) for which in (j <= i, j > i))
        decays = Decays(from_start, to_end, jnp.exp2(jnp.sum(g, axis=0, keepdims=True).T), g)
        if g.shape[1] > 1:
            return decays
        between = sums(j <= i, jnp.where(i > j, g, 0))
        return decays._replace(pairwise=jnp.where(j < i, jnp.exp2(jnp.where(j < i, between, 0)), 0))

    def scores(self, readers: tuple, writers: tuple, decays: Decays, dtype) -> list:
        """A_ij = q_i · (Π_{j<t≤i} decay_t ⊙ k_j) for j < i, else 0, of every reader q with every writer k in turn."""
        if decays.pairwise is None:
            return list(self._form(_scores)(dtype, self.exact, readers, writers, decays.logs))
        return [decays.pairwise * self.product("ik,jk->ij", q, k, dtype) for q in readers for k in writers]

    def decayed_values(self, A, v, decays: Decays, dtype):
        """Σ_{j≤i} A_ij (Π_{j<t≤i} decay_t) ⊙ v_j, where the decays are those of the channels of v; j = i is no part of
        `scores`."""
        i, j = _rows_and_columns(A.shape[0])
        if decays.pairwise is not None:
            return self.product("ij,jv->iv", jnp.where(i == j, A, decays.pairwise * A), v, dtype)
        own = jnp.sum(jnp.where(i == j, A, 0), axis=1, keepdims=True)
        return own * v + self._form(_decayed_values)(dtype, self.exact, A, v, decays.logs)

    def inverse(self, L):
        """(I + L)⁻¹ of strictly lower triangular L `C C`: inverses of neighbouring blocks join to one of both,

        [[A, 0], [B, D]]⁻¹ = X − X [[0, 0], [B, 0]] X        where X = diag(A⁻¹, D⁻¹).
        """
        return self._form(_inverse)(self.exact, L)

    def sums(self, which, x):
        """Σ_j x_j over those j of each row i that `which` `C C` says, of x `C K`."""
        return self._form(_sums)(self.exact, 3, which, x)

    def later(self, x):
        """Σ_{t≥i} x_t, which is not differentiated."""
        i, t = _rows_and_columns(x.shape[0])
        return _sums(self.exact, 3, t >= i, x)

    def diagonal(self, q, k):
        """What a token reads of its own writing: q_i · k_i, `C 1`."""
        return jnp.sum(q * k, axis=1, keepdims=True)

    def advanced(self, x):
        """x_{i+1} at i, zeros at the end."""
        i, j = _rows_and_columns(x.shape[0])
        return self.sums(j == i + 1, x)

    def delayed(self, x, first=None):
        """x_{i-1} at i, after `first`, or zeros."""
        i, j = _rows_and_columns(x.shape[0])
        moved = self.sums(i == j + 1, x)
        return moved if first is None else moved + jnp.where(_row_numbers(x) == 0, first, 0)

    def first(self, x):
        """`C K` → `1 K`."""
        return jnp.sum(jnp.where(_row_numbers(x) == 0, x, 0), axis=0, keepdims=True)

    def diagonal_matrix(self, column):
        """`C 1` → `C C`."""
        i, j = _rows_and_columns(column.shape[0])
        return jnp.where(i == j, column, 0)

    def _form(self, function: Callable) -> Callable:
        return ADJOINTS[function] if self.differentiated else function


def _rows_and_columns(size):
    return (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def _row_numbers(x):
    return lax.broadcasted_iota(jnp.int32, x.shape, 0)


def _parts(dtype) -> int:
    """What one rounds to bfloat16 afterwards is decayed by 16 bits."""
    return 3 if jnp.finfo(dtype).bits >= 32 else 2


def _sums(exact, parts: int, which, x):
    """A float32 is the sum of three bfloat16, whose products with zeros and ones are exact: three products of bfloat16
    in half the registers, where `exact` takes three of tf32, or six of bfloat16. Two `parts` of it are 16 bits."""
    if x.shape[1] == 1:
        return jnp.sum(jnp.where(which, x.T, 0), axis=1, keepdims=True)
    if x.dtype != jnp.float32:
        return jnp.dot(which.astype(x.dtype), x, precision=exact, preferred_element_type=x.dtype)
    ones = which.astype(jnp.bfloat16)
    total = lambda part: jnp.dot(ones, part.astype(jnp.bfloat16), preferred_element_type=x.dtype)
    sums = jnp.zeros_like(x)
    for _ in range(parts - 1):
        sums, x = sums + total(_first_bits(x)), x - _first_bits(x)
    return sums + total(x)


def _sums_backward(exact, parts: int, which, d_sums):
    """The cut into parts has no gradient of its own."""
    return None, _sums(exact, parts, which.T, d_sums)


def _first_bits(x):
    """What bfloat16 holds of a float32, cut and not rounded: compilers take a rounding and back for nothing."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _product(equation, dtype, exact, x, y):
    wide = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
    precision = exact if dtype == wide else None
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=wide)


def _product_backward(equation, dtype, exact, operands, d_out):
    (x, y), (left, right, out) = operands, equation.replace("->", ",").split(",")

    def adjoint(of, letters, other):
        """In the order that leaves no transpose of the result."""
        if of[0] in out:
            return _product(f"{out},{letters}->{of}", dtype, exact, d_out, other)
        return _product(f"{letters},{out}->{of}", dtype, exact, other, d_out)

    return adjoint(left, right, y).astype(x.dtype), adjoint(right, left, x).astype(y.dtype)


# ---- pairs of tokens and the decays between them --------------------------------------------------------------------
#
# Reader and writer in the two halves of a block meet at its middle, the reader decayed from there and the writer to
# there, for blocks that double in size up to the chunk: each pair meets once. The sizes are a loop, as the decays of
# all of them at once would not fit into registers, and so are their adjoints, which compute the decays again.


def _borders(exact, parts: int, g, n):
    """Decays to or from the middle of each token's block of 2ⁿ⁺¹, and which pairs that middle divides."""
    i, j = _rows_and_columns(g.shape[0])
    half, late = i >> n, (i >> n) % 2 == 1
    between = (half == j >> n) & ((j <= i) == late)
    # With 0·n in g a compiler cannot take its parts out of the loop, where they would be in registers all the time
    # (sm_90a: 2.3 kB of spills a thread, 0.6 so).
    g = g + 0 * jnp.asarray(n).astype(g.dtype)
    return jnp.exp2(_sums(exact, parts, between, g)), (half == (j >> n) + 1) & late


def _over_borders(exact, dtype, g, start, add):
    """The sum over block sizes of what `add(decays, divided)` gives, which decays what is of this dtype."""
    sizes = (g.shape[0] - 1).bit_length()
    body = lambda n, totals: jax.tree.map(jnp.add, totals, add(*_borders(exact, _parts(dtype), g, n)))
    return lax.fori_loop(0, sizes, body, start)


def _scores(dtype, exact, readers, writers, g):
    zero = jnp.zeros((g.shape[0], g.shape[0]), g.dtype)

    def add(decay, divided):
        dot = lambda q, k: _product("ik,jk->ij", dtype, exact, q * decay, k * decay)
        return tuple(jnp.where(divided, dot(q, k), 0) for q in readers for k in writers)

    return _over_borders(exact, dtype, g, (zero,) * (len(readers) * len(writers)), add)


def _scores_backward(dtype, exact, operands, d_scores):
    readers, writers, g = operands
    # Triton has one type for a loop's carry: adjoints are summed in that of the decays.
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, g.dtype), (readers, writers))
    of_reader = [d_scores[r * len(writers) : (r + 1) * len(writers)] for r in range(len(readers))]

    def add(decay, divided):
        A = [[jnp.where(divided, d, 0) for d in row] for row in of_reader]
        d_reader = lambda row: sum(
            _product("ij,jk->ik", dtype, exact, d, k * decay) for d, k in zip(row, writers, strict=True)
        )
        d_writer = lambda column: sum(
            _product("ij,ik->jk", dtype, exact, d, q * decay) for d, q in zip(column, readers, strict=True)
        )
        d_readers = tuple(decay * d_reader(row) for row in A)
        return d_readers, tuple(decay * d_writer(column) for column in zip(*A, strict=True))

    d_readers, d_writers = _over_borders(exact, dtype, g, start, add)
    return d_readers, d_writers, jnp.zeros_like(g)


def _decayed_values(dtype, exact, A, v, g):
    def add(decay, divided):
        return decay * _product("ij,jv->iv", dtype, exact, jnp.where(divided, A, 0), decay * v)

    return _over_borders(exact, dtype, g, jnp.zeros(v.shape, g.dtype), add)


def _decayed_values_backward(dtype, exact, operands, d_out):
    A, v, g = operands

    def add(decay, divided):
        d = decay * d_out
        d_A = jnp.where(divided, _product("iv,jv->ij", dtype, exact, d, decay * v), 0)
        return d_A, decay * _product("ij,iv->jv", dtype, exact, jnp.where(divided, A, 0), d)

    start = jnp.zeros(A.shape, g.dtype), jnp.zeros(v.shape, g.dtype)
    return *_over_borders(exact, dtype, g, start, add), jnp.zeros_like(g)


def _inverse(exact, L):
    i, j = _rows_and_columns(L.shape[0])
    times = partial(jnp.dot, precision=exact, preferred_element_type=L.dtype)

    def join(n, X):
        corner = (i >> (n + 1) == j >> (n + 1)) & (i >> n != j >> n)
        return X - times(times(X, jnp.where(corner, L, 0)), X)

    return lax.fori_loop(0, (L.shape[0] - 1).bit_length(), join, (i == j).astype(L.dtype))


def _inverse_backward(exact, X, d_X):
    i, j = _rows_and_columns(X.shape[0])
    times = partial(jnp.einsum, precision=exact, preferred_element_type=X.dtype)
    inner = times("ji,jk->ik", X, d_X)
    return (jnp.where(j < i, -times("ik,jk->ij", inner, X), 0),)


def _with_adjoint(
    function: Callable, backward: Callable, options: int, kept: Callable = lambda out, operands: operands
):
    """`options` arguments come first; `kept(out, operands)` is what the backward pass is given."""
    differentiable = jax.custom_vjp(function, nondiff_argnums=tuple(range(options)))

    def forward(*args):
        out = function(*args)
        return out, kept(out, args[options:])

    differentiable.defvjp(forward, backward)
    return differentiable


#: Decays stand still where a chunk is differentiated: their own adjoint follows from the others.
ADJOINTS = {
    _sums: _with_adjoint(_sums, _sums_backward, 2, lambda out, operands: operands[0]),
    _product: _with_adjoint(_product, _product_backward, 3),
    _scores: _with_adjoint(_scores, _scores_backward, 2),
    _decayed_values: _with_adjoint(_decayed_values, _decayed_values_backward, 2),
    _inverse: _with_adjoint(_inverse, _inverse_backward, 1, lambda X, _: X),
}
