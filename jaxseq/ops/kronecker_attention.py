"""o_t = Σ_ij softmax_ij(scale · Σ_l q_tl k_il k'_jl) v_i ⊙ v'_j: attention to pairs of keys, exact or a polynomial."""

import math
from functools import partial
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..scan import join_chunks, split_chunks
from ..shapes import Array, Bool, Float, Int, accumulator, known, promoted, typed
from ..sharded import check_whole
from .linear_recurrence import linear_recurrence
from .visibility import check_lengths, check_segments

#: A logit that no pair has: finite, so that the difference of two is no NaN.
NONE = -1e30
#: The most monomials that a head may have: each is V + 1 numbers of a state, and of every token in training.
MOST_MONOMIALS = 2**14


@typed
def kronecker_attention(
    query: Float[Array, "B T H K"],
    key_1: Float[Array, "B S H K"],
    key_2: Float[Array, "B S H K"],
    value_1: Float[Array, "B S H V"],
    value_2: Float[Array, "B S H V"],
    *,
    causal: bool = True,
    ordered: bool = False,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    block_size: int = 32,
) -> Float[Array, "B T H V"]:
    """Third-order attention: every query over all pairs of keys (arXiv 2310.04064, section 3).

        o_t = Σ_ij a_tij v_i ⊙ v'_j        a_tij = softmax_ij(scale · Σ_l q_tl k_il k'_jl)

    Pairs are of i, j ≤ t where `causal`, and of i ≤ j where `ordered`; both are of the query's segment. With more keys
    than queries, the queries stand at the last T positions. `scale` is 1/K when None, the paper's. A query that sees no
    pair returns zero.

    About 4 T S² (K + V) operations a head, the scores once more in each pass for their maximum; a block of queries, of
    i and of j at a time, of `block_size` each, is all that is ever in memory, forwards and backwards.

    Raises:
      ValueError: shapes disagree, T > S, `ordered` without `causal`, block_size < 1, or segments of queries alone.
      NotImplementedError: time is split over devices.
    """
    check_whole("kronecker_attention", "give every device whole sequences")
    (length, width), span = (query.shape[1], query.shape[3]), key_1.shape[1]
    check_lengths("kronecker_attention", length, span, "key_1")
    if ordered and not causal:
        raise ValueError("ordered=True with causal=False; kronecker_attention takes pairs i ≤ j up to each query.")
    if block_size < 1:
        raise ValueError(f"block_size={block_size}; kronecker_attention takes 1 or more.")
    check_segments(segment_ids, key_segment_ids, length, span)
    dtype = promoted(query.dtype, key_1.dtype, key_2.dtype)
    q = query.astype(dtype) * jnp.asarray(1 / width if scale is None else scale, dtype)
    ids = jnp.zeros((query.shape[0], length), jnp.int32) if segment_ids is None else segment_ids
    key_ids = jnp.zeros((query.shape[0], span), jnp.int32) if segment_ids is None else key_segment_ids
    key_ids = ids if key_ids is None else key_ids
    size = min(block_size, span)
    there = jnp.arange(span, dtype=jnp.int32)[None]
    first, second = (
        split_chunks((k.astype(dtype), v, there, key_ids, jnp.ones_like(there, bool)), size)
        for k, v in ((key_1, value_1), (key_2, value_2))
    )
    rows = min(block_size, length)
    queries = split_chunks((q, there[:, span - length :], ids), rows)
    o = join_chunks(lax.map(partial(_read, first, second, causal, ordered), queries), length)
    return o.astype(value_1.dtype)


def _read(first, second, causal: bool, ordered: bool, queries):
    """What a block of queries reads: the largest logit, and then plain sums, whose adjoint keeps nothing."""
    q, at, ids = queries
    wide = accumulator(q.dtype)

    def scores(one, two):
        (k, _, i, i_ids, i_there), (l, _, j, j_ids, j_there) = one, two
        s = jnp.einsum("bphk,bihk,bjhk->bhpij", q, k, l, preferred_element_type=wide, optimize=[(0, 1), (0, 1)])
        own = lambda ids_there: ids[:, :, None] == ids_there[:, None]
        p, i, j = at[0][:, None, None], i[0][None, :, None], j[0][None, None, :]
        seen = (i_there[0][None, :, None] & j_there[0][None, None, :]) & ((not causal) | ((i <= p) & (j <= p)))
        seen = (seen & ((not ordered) | (i <= j)))[None] & own(i_ids)[..., None] & own(j_ids)[:, :, None]
        return s, seen[:, None]

    def over_pairs(step, carry):
        inner = lambda one: lambda carry, two: (step(carry, one, two), None)
        return lax.scan(lambda carry, one: (lax.scan(inner(one), carry, second)[0], None), carry, first)[0]

    def highest(most, one, two):
        s, seen = scores(one, two)
        return jnp.maximum(most, jnp.max(jnp.where(seen, s, NONE), axis=(3, 4)))

    @jax.checkpoint
    def block(one, two, most):
        s, seen = scores(one, two)
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, s - most[..., None, None], 0)), 0)
        v, w = (jnp.pad(of[1], ((0, 0),) * 3 + ((0, 1),), constant_values=1) for of in (one, two))
        over_second = jnp.einsum("bhpij,bjhv->bhpiv", weights.astype(w.dtype), w, preferred_element_type=wide)
        return jnp.einsum("bhpiv,bihv->bphv", over_second, v.astype(wide))

    start = jnp.full_like(q[..., 0].swapaxes(1, 2), NONE, wide)
    most = lax.stop_gradient(over_pairs(highest, lax.stop_gradient(start)))
    zero = jnp.zeros((*q.shape[:-1], first[1].shape[-1] + 1), wide)
    sums = over_pairs(lambda total, one, two: total + block(one, two, most), zero)
    return sums[..., :-1] / jnp.where(sums[..., -1:] == 0, 1, sums[..., -1:])


def num_monomials(width: int, degree: int) -> int:
    """Of a degree or less: width + degree over degree.

    Raises:
      ValueError: there are more than `MOST_MONOMIALS`.
    """
    if (number := math.comb(width + degree, degree)) > MOST_MONOMIALS:
        raise ValueError(
            f"degree={degree} of heads of {width} channels has {number:,} monomials; at most {MOST_MONOMIALS:,} are "
            "taken: choose a lower degree, or more and so narrower heads."
        )
    return number


def monomials(width: int, degree: int) -> np.ndarray:
    """Their exponents `R width`.

    Raises:
      ValueError: as `num_monomials`.
    """
    num_monomials(width, degree)
    chosen = [c for g in range(degree + 1) for c in combinations_with_replacement(range(width), g)]
    return np.stack([np.bincount(np.asarray(c, int), minlength=width) for c in chosen])


@typed
def kronecker_polynomial(
    query: Float[Array, "B T H K"],
    key_1: Float[Array, "B T H K"],
    key_2: Float[Array, "B T H K"],
    value_1: Float[Array, "B T H V"],
    value_2: Float[Array, "B T H V"],
    *,
    degree: int = 2,
    causal: bool = True,
    ordered: bool = False,
    scale: float | None = None,
    bound: float | None = None,
    initial_state: Float[Array, "B S H R _"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B S H R _"]]:
    """`kronecker_attention` in time linear in T, with exp replaced by its Taylor polynomial of an even degree g.

        o_t = Σ_α φ_α(q_t) (Σ_i k_i^α v_i) ⊙ (Σ_j k'_j^α v'_j) / Σ_α φ_α(q_t) (Σ_i k_i^α) (Σ_j k'_j^α)
        φ_α(q) = scale^|α| q^α / α!,  |α| ≤ g

    It is near where scale · K |q| |k| |k'| (largest entries) is at most about 1, and wrong where that is well above g
    (arXiv 2310.04064, theorem 1.3; `kronecker_polynomial_error` bounds it). `bound` is the β that entries of queries
    and keys are said to be within, ±β: it changes nothing, and one that is wrong raises where they are known, so not
    under `jit`. The polynomial of an even degree is positive everywhere. R is the number of monomials, K + g over g.
    Causal sums over i, j ≤ t are two `linear_recurrence`s; ordered, the second one sums the products of the first with
    what is new: Σ_{i ≤ j ≤ t}. The state is these two sums, V + 1 numbers each. Sums over all tokens leave out those
    that `mask` does.

    Raises:
      ValueError: shapes disagree, the degree is odd or below 0, or has more than `MOST_MONOMIALS` monomials, `ordered`,
        a state or segments without `causal`, or a mask with it, bound ≤ 0, or an entry known to be beyond it.
    """
    _check_degree("kronecker_polynomial", degree)
    _check_bound(bound, {"query": query, "key_1": key_1, "key_2": key_2})
    given = {"ordered": ordered or None, "initial_state": initial_state, "segment_ids": segment_ids}
    if not causal and (wrong := [name for name, value in given.items() if value is not None]):
        raise ValueError(f"{wrong[0]} with causal=False; kronecker_polynomial takes it with causal=True.")
    if causal and mask is not None:
        raise ValueError("mask with causal=True; kronecker_polynomial takes it with causal=False.")
    batch, width, wide = len(query), query.shape[-1], accumulator(query.dtype)
    exponents = monomials(width, degree)
    scale = 1 / width if scale is None else scale
    coefficients = [scale ** int(a.sum()) / math.prod(map(math.factorial, a.tolist())) for a in exponents]
    u = _powers(query.astype(wide), degree) * jnp.asarray(coefficients, wide)[None, None, None]
    parts = []
    for k, v in ((key_1, value_1), (key_2, value_2)):
        v = jnp.pad(v.astype(wide), ((0, 0),) * 3 + ((0, 1),), constant_values=1)
        v = v if mask is None else jnp.where(mask[..., None, None], v, 0)
        parts.append(_powers(k.astype(wide), degree)[..., None] * v[..., None, :])
    if not causal:
        check_whole("kronecker_polynomial(causal=False)", "give every device whole sequences")
        first, second = (part.sum(axis=1, keepdims=True) for part in parts)
        sums = jnp.einsum("bthr,bhrv->bthv", u, (first * second)[:, 0])
        final = jnp.concatenate([first, second], axis=1)
    else:
        flat = lambda x: x.reshape(*x.shape[:2], -1)
        before = None if initial_state is None else initial_state.astype(wide).reshape(batch, 2, -1)
        ones = jnp.ones((1, 1, 1), wide)
        run = lambda x, n: linear_recurrence(
            ones, x, initial_state=None if before is None else before[:, n], segment_ids=segment_ids
        )
        first, first_final = run(flat(parts[0]), 0)
        second, second_final = run(first * flat(parts[1]) if ordered else flat(parts[1]), 1)
        pairs = (second if ordered else first * second).reshape(parts[0].shape)
        sums = jnp.einsum("bthr,bthrv->bthv", u, pairs)
        final = jnp.stack([first_final, second_final], axis=1).reshape(batch, 2, *parts[0].shape[2:])
    total = sums[..., -1:]  # 0 where no token is left
    return (sums[..., :-1] / jnp.where(total == 0, 1, total)).astype(value_1.dtype), final


@typed
def kronecker_polynomial_error(largest_score: float, degree: int) -> float:
    """The most by which `kronecker_polynomial` of this degree g errs where no |score| exceeds R = `largest_score`.

        |õ − o| ≤ 2 ρ max|v| max|v'|        ρ = e^R R^(g+1) / (g+1)!

    R is scale · K β³ for entries of queries and keys in ±β. By Taylor's theorem P(s) − e^s = −e^ξ s^(g+1) / (g+1)! for
    some ξ between 0 and s, so that no weight P(s) of a pair p is off by more than its ρ-th part: e^(ξ−s) is at most
    e^R for a negative s, and 1 for a positive one. An even g makes all of these weights positive, so õ is a mean of
    the products u_p = v_i v'_j too, and

        õ − o = Σ_p (P(s_p) − e^s_p) (u_p − õ) / Σ_p e^s_p        as Σ_p P(s_p) (u_p − õ) = 0

    is at most ρ times the largest |u_p − õ| ≤ 2 max|v| max|v'|. No two means are further apart than that: from ρ = 1 on
    the bound says nothing. What is returned is 2 ρ, the bound for values in ±1.

    Raises:
      ValueError: the degree is odd or below 0, or `largest_score` is below 0.
    """
    _check_degree("kronecker_polynomial_error", degree)
    if not largest_score >= 0:
        raise ValueError(f"largest_score={largest_score}; kronecker_polynomial_error takes a size, 0 or more.")
    if largest_score == 0:
        return 0.0
    log_share = largest_score + (degree + 1) * math.log(largest_score) - math.lgamma(degree + 2)
    return 2 * math.exp(min(log_share, 700.0))  # a number, however large


def _check_degree(op: str, degree: int) -> None:
    if degree < 0 or degree % 2:
        raise ValueError(f"degree={degree}; {op} takes an even degree of 0 or more.")


def _check_bound(bound: float | None, entries: dict[str, Array]) -> None:
    """Raise where entries are known and beyond ±bound, as their dtype has it, or no numbers."""
    if bound is None:
        return
    if not bound > 0:
        raise ValueError(f"bound={bound}; kronecker_polynomial takes a number above 0, or None.")
    for name, array in entries.items():
        if (values := known(array)) is not None:
            beyond = values[~(np.abs(values) <= np.asarray(bound, values.dtype))]
            if beyond.size:
                raise ValueError(f"{name} holds {beyond[0]}; kronecker_polynomial(bound={bound}) takes ±{bound}.")


def _powers(x, degree: int):
    """x^α `… R` in the order of `monomials`, without a gather, whose gradient would be a scatter.

    Those of degree g that begin with x_l are x_l times the last ones of degree g − 1, which begin with x_l or later.
    """
    width, graded = x.shape[-1], [jnp.ones_like(x[..., :1])]
    for g in range(1, degree + 1):
        before = graded[-1]
        starts = [before.shape[-1] - math.comb(width - l + g - 2, g - 1) for l in range(width)]
        graded.append(jnp.concatenate([x[..., l : l + 1] * before[..., n:] for l, n in enumerate(starts)], axis=-1))
    return jnp.concatenate(graded, axis=-1)
