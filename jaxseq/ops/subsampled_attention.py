"""Attention among random subsets of the tokens (the information pathways hypothesis, arXiv 2306.01705)."""

import math

import jax
import jax.numpy as jnp

from ..shapes import Array, Bool, Float, Int, typed
from ..sharded import check_whole
from .block_sparse_attention import block_sparse_attention
from .softmax_attention import softmax_attention

#: How sources are drawn: of a uniform permutation the first ones, for all queries, or consecutive windows; windows of
#: tokens in jittered order; these for consecutive queries.
SUBSETS = ("truncate", "window", "local", "local_source")


@typed
def subsets(key: jax.Array, length: int, *, ratio: int, mode: str = "local", sigma: float = 16.0) -> Int[Array, "R W"]:
    """Sets of W = length / ratio positions, each in order: of all tokens once, or with `mode` "truncate" but one set.

        π uniform (truncate, window)        π = argsort(i + σ ε_i), ε ~ N(0, 1) (local, local_source)

    The sets are consecutive windows of π: σ = 0 cuts the sequence in order, a great σ draws as "window" does.

    Raises:
      ValueError: `mode` is unknown, `ratio` does not divide `length`, or sigma < 0.
    """
    if mode not in SUBSETS:
        raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(SUBSETS)}.")
    if ratio < 1 or length % ratio:
        raise ValueError(f"ratio={ratio} does not divide the {length} tokens; choose a divisor, or pad them.")
    if sigma < 0:
        raise ValueError(f"sigma={sigma}; subsets takes 0 or more.")
    index = jnp.arange(length, dtype=jnp.int32)
    if mode in ("truncate", "window"):
        permutation = jax.random.permutation(key, index)
    else:
        noise = jax.random.normal(key, (length,))
        permutation = jnp.argsort(index.astype(noise.dtype) + sigma * noise, stable=True).astype(jnp.int32)
    sets = jnp.sort(permutation.reshape(ratio, -1), axis=1)
    return sets[:1] if mode == "truncate" else sets


@typed
def subset_seen(
    key: jax.Array, position: Int[Array, ""], others: Int[Array, "S"], *, ratio: int, mode: str, sigma: float = 16.0
) -> Bool[Array, "S"]:
    """Which of the tokens at these positions the token at `position` sees, as the last one, where it decodes.

    It is what `subsets` would have it see if the sequence ended there: its own set, of a share of 1 / ratio of the N
    `others` from position 0 up to its own, and with "truncate" and "local_source" itself besides. `others` hold
    `position`, each once. What is drawn is of the two positions alone: the same key draws the same for tokens one by
    one as for many.
    """
    noise = lambda other: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, position), other))
    place = jax.vmap(noise)(others)
    if mode in ("local", "local_source"):
        place = others.astype(place.dtype) + sigma * place
    there = (others >= 0) & (others <= position)
    rank = jnp.argsort(jnp.argsort(jnp.where(there, place, jnp.inf), stable=True)).astype(jnp.int32)
    group = rank * ratio // there.sum(dtype=jnp.int32)
    own = jnp.sum(jnp.where(others == position, group, 0))
    chosen = {"truncate": 0, "local_source": ratio - 1}.get(mode, own)
    return there & ((group == chosen) | (others == position))


@typed
def subsampled_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B T G K"],
    value: Float[Array, "B T G V"],
    sets: Int[Array, "R W"],
    *,
    queries_too: bool = True,
    causal: bool = True,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention of every query to the keys of one set, for all sequences and heads the same.

    With `queries_too` the R sets of W positions hold all tokens once, and a token sees its own set; else the r-th of R
    equal runs of consecutive queries sees the r-th set. What is causal, and of which segment, is told by the positions
    in the sequence. Every token sees itself, but where queries that are not causal see a set without it. Keys may have
    fewer heads than queries. `num_scores` says what it costs.

    Raises:
      ValueError: shapes disagree, or R runs of T / R tokens are not W each; one set W may be any part of T.
      NotImplementedError: time is split over devices.
    """
    check_whole("subsampled_attention", "give every device whole sequences")
    (batch, length), (count, width) = query.shape[:2], sets.shape
    if count * width != length and (queries_too or count > 1 or length % width):
        raise ValueError(f"sets has shape {sets.shape}; sets of {length} tokens hold each of them once.")
    if not queries_too:
        return _to_sources(query, key, value, sets, causal, segment_ids, scale)
    # A set is in order: what is causal inside of it is so in the sequence.
    order = sets.reshape(-1)
    apart = lambda x: jnp.take(x, order, axis=1).reshape(batch * count, width, *x.shape[2:])
    ids = None if segment_ids is None else apart(segment_ids)
    o = softmax_attention(
        apart(query), apart(key), apart(value), causal=causal, segment_ids=ids, scale=scale, impl=impl
    )
    return jnp.take(o.reshape(batch, length, *o.shape[2:]), jnp.argsort(order), axis=1)


def num_scores(length: int, *, ratio: int, mode: str = "local", causal: bool = True) -> int:
    """Scores that a head computes, and so its work: length² / ratio.

    Where only sources are drawn, causal queries have a block of their own neighbours besides, for themselves.
    """
    width = length // ratio
    own = _block_size(width) if causal and mode in ("truncate", "local_source") else 0
    return length * (width + own)


def _block_size(width: int) -> int:
    """Of queries that share a list of keys."""
    return math.gcd(width, 64)


def _to_sources(q, k, v, sets, causal, segment_ids, scale):
    """Runs of consecutive queries, each to its set and, where causal, each query to itself."""
    (count, width), length = sets.shape, q.shape[1]
    size, run = _block_size(width), length // count
    inside = jnp.full((length, count), False).at[sets, jnp.arange(count)[:, None]].set(True)
    visible = lambda i, j: (inside[j, i // run] & (j <= i)) | (i == j) if causal else inside[j, i // run]
    keys = jnp.repeat(sets, run // size, axis=0)
    if causal:
        own = jnp.arange(length, dtype=sets.dtype).reshape(-1, size)
        keys = jnp.concatenate([keys, own], axis=1)
    ids = {"segment_ids": segment_ids, "scale": scale}
    return block_sparse_attention(q, k, v, keys, visible, block_size=size, **ids)
