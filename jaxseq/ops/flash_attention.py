"""Softmax attention in a kernel: a fold of the softmax monoid over blocks of keys, and its adjoint from the row sums.

p_ij = exp(s_ij − L_i),  L_i = log Σ_j exp s_ij        o_i = Σ_j p_ij v_j
s̄_ij = p_ij (ō_i · v_j − ō_i · o_i)                    (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2)
"""

from functools import partial
from math import log
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.over_pairs import Fold, Span, over_pairs
from pallas_kernels.within_chunk import matrix_width

from ..shapes import accumulator, promoted

#: A logit that no key has: finite, so that where no key was met the difference of two is no NaN.
NONE = -1e30
#: More blocks than there are.
ALL = 2**24


class Sight(NamedTuple):
    """Which keys a query sees: those at most `behind` positions behind it and `ahead` ahead of it, None is any.

    Query 0 stands at position `offset` of the `keys`; a logit is capped where there is a `softcap`. Ids of `segments`
    hide more, in any block.
    """

    offset: int
    keys: int
    behind: int | None
    ahead: int | None
    softcap: float | None
    segments: bool

    def keys_met(self, i, size: int):
        """Spans of blocks of keys that block i of queries meets; where one is clear every query sees every key."""
        return self._spans(self.offset + i * size, self.behind, self.ahead, size, self.keys // size)

    def queries_met(self, j, size: int):
        """The same of queries and block j of keys. Queries that only fill a block up have no cotangent."""
        clear = jnp.where((j + 1) * size <= self.keys, jnp.int32(ALL), 0)
        return self._spans(j * size - self.offset, self.ahead, self.behind, size, clear)

    def _spans(self, start, before: int | None, after: int | None, size: int, most_clear):
        """From the block of `start - before` to that of the last position and `after`; a size is a power of two."""
        block = lambda position: position >> (size.bit_length() - 1)
        last = start + size - 1
        begin = 0 if before is None else block(jnp.maximum(start - before, 0))
        end = ALL if after is None else block(last + after) + 1
        if self.segments:
            return [Span(begin, end, False)]
        clear = begin if before is None else jnp.clip(block(last - before + size - 1), begin, end)
        over = most_clear if after is None else jnp.minimum(most_clear, block(start + after + 1))
        over = jnp.clip(over, clear, end)
        edge = [] if before is None else [Span(begin, clear, False)]
        return [*edge, Span(clear, over, True), Span(over, end, False)]

    def logits(self, within, first, second, i, j, clear: bool, dtype):
        """Logits `C C` of a block of queries and a block of keys, and which of them count: all, where it is clear."""
        s = within.product("ik,jk->ij", first["q"], second["k"], dtype)
        if self.softcap is not None:
            s = self.softcap * jnp.tanh(s / self.softcap)
        if clear:
            return s, None
        row, column = (lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
        key = j * s.shape[1] + column
        lag = self.offset + i * s.shape[0] + row - key
        seen = key < self.keys
        seen &= True if self.behind is None else lag <= self.behind
        seen &= True if self.ahead is None else -lag <= self.ahead
        return s, seen & (first["ids"] == second["ids"]) if self.segments else seen

    def weights(self, within, first, second, i, j, clear: bool, dtype):
        """p and ds/d(q·k) of a block, from the sums of the rows that are known."""
        s, seen = self.logits(within, first, second, i, j, clear, dtype)
        slope = 1 if self.softcap is None else 1 - (s / self.softcap) ** 2
        return _where(seen, _exp(_where(seen, s - first["L"], 0)), 0), slope


def _where(seen, x, other):
    return x if seen is None else jnp.where(seen, x, other)


def _exp(x):
    """In one instruction of a GPU, where `exp` takes eight."""
    return jnp.exp2(x * (1 / log(2)))


def flash_attention(sight: Sight, q, k, v, segments):
    """Read-outs `B T H V` of scaled queries `B T H K`, keys `B S G K`, values `B S G V`; ids `B T`, `B S`, or None."""
    ids = None if segments is None else tuple(x[:, :, None, None] for x in segments)
    return _attend(sight, q, k, v, ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(sight, q, k, v, ids):
    return _forward(sight, q, k, v, ids)[0]


def _sides(ids, first, second):
    return (first, second) if ids is None else (first | {"ids": ids[0]}, second | {"ids": ids[1]})


def _forward(sight, q, k, v, ids):
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    wide, width = accumulator(dtype), v.shape[-1]

    def start(size):
        return jnp.full((size, 1), NONE, wide), jnp.zeros((size, 1), wide), jnp.zeros((size, matrix_width(width)), wide)

    def step(within, carry, first, second, i, j, clear):
        most, total, sums = carry
        s, seen = sight.logits(within, first, second, i, j, clear, dtype)
        above = jnp.maximum(most, jnp.max(_where(seen, s, NONE), axis=1, keepdims=True))
        p, less = _where(seen, _exp(s - above), 0), _exp(most - above)
        added = within.product("ij,jv->iv", p, second["v"], dtype)
        return above, less * total + jnp.sum(p, axis=1, keepdims=True), less * sums + added

    def finish(carry):
        most, total, sums = carry
        some = jnp.where(total == 0, 1, total)
        return {"o": sums / some, "L": most + jnp.log(some)}

    fold = Fold(start, step, finish, {"o": (matrix_width(width), wide), "L": (1, wide)}, sight.keys_met)
    found = over_pairs(fold, *_sides(ids, {"q": _wide(q)}, {"k": _wide(k), "v": _wide(v)}))
    o = found["o"][..., :width]
    return o, (q, k, v, ids, o, found["L"])


def _backward(sight, residuals, d_o):
    q, k, v, ids, o, L = residuals
    dtype = promoted(q.dtype, k.dtype, v.dtype)
    wide = accumulator(dtype)
    K, V, groups = q.shape[-1], v.shape[-1], k.shape[2]
    delta = jnp.sum(o * d_o, axis=-1, keepdims=True)
    queries = {"q": _wide(q), "d_o": _wide(d_o.astype(dtype)), "L": L, "delta": delta}
    keys = {"k": _wide(k), "v": _wide(v)}
    zeros = lambda size, width: jnp.zeros((size, matrix_width(width)), wide)

    def pulled(within, first, second, i, j, clear):
        p, slope = sight.weights(within, first, second, i, j, clear, dtype)
        return p, p * (within.product("iv,jv->ij", first["d_o"], second["v"], dtype) - first["delta"]) * slope

    def to_queries(within, carry, first, second, i, j, clear):
        _, d_s = pulled(within, first, second, i, j, clear)
        return carry + within.product("ij,jk->ik", d_s, second["k"], dtype)

    def to_keys(within, carry, second, first, j, i, clear):
        # Here a block of keys comes first: what has one channel lies the other way.
        turned = lambda of: {name: x.T if 1 in x.shape else x for name, x in of.items()}
        first, second = turned(first), turned(second)
        p, d_s = pulled(within, first, second, i, j, clear)
        d_k, d_v = carry
        d_k += within.product("ij,ik->jk", d_s, first["q"], dtype)
        return d_k, d_v + within.product("ij,iv->jv", p, first["d_o"], dtype)

    first, second = _sides(ids, queries, keys)
    of_queries = Fold(
        lambda size: zeros(size, K), to_queries, lambda d_q: {"q": d_q}, {"q": (matrix_width(K), wide)}, sight.keys_met
    )
    of_keys = Fold(
        lambda size: (zeros(size, K), zeros(size, V)),
        to_keys,
        lambda carry: dict(zip("kv", carry, strict=True)),
        {"k": (matrix_width(K), wide), "v": (matrix_width(V), wide)},
        sight.queries_met,
    )
    d_q = over_pairs(of_queries, first, second)["q"][..., :K]
    found = over_pairs(of_keys, second, first)
    # A key head has a part from each of the query heads that it serves.
    together = lambda x, width: x[..., :width].reshape(*x.shape[:2], groups, -1, width).sum(3)
    d_k, d_v = together(found["k"], K), together(found["v"], V)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _wide(x):
    return jnp.pad(x, ((0, 0),) * 3 + ((0, matrix_width(x.shape[-1]) - x.shape[-1]),))
