"""Attention among tokens that fall into the same buckets: locality-sensitive hashing by random rotations."""

import math

import jax
import jax.numpy as jnp

from ..segments import padded_segments
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from ..sharded import check_whole

#: The logit of a token with itself: it counts where there is nothing else.
ITSELF = -5e4
#: The logit of what is not seen: below that, and finite.
UNSEEN = -1e30
#: The most buckets that one rotation tells apart: it takes an axis for two of them.
LARGEST_FACTOR = 128


def num_buckets(length: int, bucket_size: int) -> int:
    """The even number of buckets that hold so many tokens; 1 where one does."""
    return 1 if length <= bucket_size else 2 * -(-length // (2 * bucket_size))


def bucket_factors(buckets: int) -> tuple[int, ...]:
    """Even numbers n_f, near each other, whose product is this even number of buckets or little more; () for 1 bucket.

    They are as few as there are of `LARGEST_FACTOR` or less.
    """
    sizes, count = [], 1
    while LARGEST_FACTOR**count < buckets:
        count += 1
    for left in range(count if buckets > 1 else 0, 0, -1):
        sizes.append(2 * math.ceil(round(buckets ** (1 / left), 9) / 2))
        buckets = -(-buckets // sizes[-1])
    return tuple(sizes)


@typed
def lsh_attention(
    query_key: Float[Array, "B T H K"],
    value: Float[Array, "B T H V"],
    rotations: Float[Array, "K R _"],
    *,
    bucket_size: int = 64,
    causal: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    mask: Bool[Array, "B T"] | None = None,
    count_once: bool = False,
) -> Float[Array, "B T H V"]:
    """Softmax attention of queries that are the keys too, each over tokens that hash alike (Reformer, 2001.04451).

        o_t = Σ_s a_ts v_s        a_ts = softmax_s(q_t·k_s K^-½)        k = q / |q|

    In each of R rounds the bucket of a token is the sign and the axis of its rotation that it is nearest to,

        b_r = argmax [x R_r; −x R_r]        or, in factors,        b_r = Σ_f (Π_{g<f} n_g) argmax [x R_rf; −x R_rf]

    with `rotations` to n/2 axes, n = `num_buckets(T, bucket_size)`; where n is above `LARGEST_FACTOR` they are to
    Σ n_f/2 axes side by side, n_f = `bucket_factors(n)`, as the authors' code has it. Tokens are sorted by bucket and
    position and cut into chunks of `bucket_size`; a chunk sees itself and the one before, the first the last one of the
    round before. Rounds are averaged by the sum of their weights. A token sees itself where it sees nothing else, and
    others of its segment. A pair that meets in several rounds counts as often, or with `count_once` once. Tokens that
    `mask` leaves out fall into no bucket, and no other one sees them. O(R T (bucket_size + Σ n_f)).

    `causal` masks what comes later, but buckets fill up with it: which earlier tokens are seen may depend on later
    ones. With one bucket it is dense attention.

    Raises:
      ValueError: shapes disagree, T = 0, bucket_size < 1, or rotations have another number of axes.
      NotImplementedError: time is split over devices.
    """
    check_whole("lsh_attention", "give every device whole sequences")
    (batch, length, heads, width), rounds = query_key.shape, rotations.shape[1]
    if length == 0:
        raise ValueError(f"query_key has shape {query_key.shape}; lsh_attention takes at least one step of time.")
    if bucket_size < 1:
        raise ValueError(f"bucket_size={bucket_size}; lsh_attention takes 1 or more.")
    buckets = num_buckets(length, bucket_size)
    factors = bucket_factors(buckets)
    if rotations.shape[2] != sum(factors) // 2:
        raise ValueError(
            f"rotations have {rotations.shape[2]} axes; {length} tokens in {buckets} buckets of {bucket_size} take "
            f"{sum(factors) // 2}."
        )
    size = length if buckets == 1 else bucket_size
    wide = accumulator(query_key.dtype)
    q = query_key.swapaxes(1, 2)
    bucket, none = hashed(q.astype(wide), rotations.astype(wide), factors), math.prod(factors)
    if mask is not None:
        bucket = jnp.where(mask[:, None, None], bucket, none)
        segment_ids = padded_segments(segment_ids, mask)
    pad = lambda x, fill: jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, buckets * size - length),), constant_values=fill)
    # Padding comes last, and is no token.
    order = jnp.argsort(pad(bucket, none), axis=-1, stable=True).reshape(batch, heads, -1, size)
    key = q * jax.lax.rsqrt(jnp.sum(q.astype(wide) ** 2, axis=-1, keepdims=True) + 1e-12).astype(q.dtype)
    segments = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    own = lambda x: _taken(x, jnp.minimum(order, length - 1))
    seen = lambda x: jnp.concatenate([x, jnp.roll(x, 1, axis=2)], axis=3)
    ids = own(jnp.broadcast_to(segments[:, None], (batch, heads, length)))
    s = jnp.einsum("bhcik,bhcjk->bhcij", own(q), seen(own(key)), preferred_element_type=wide) * width**-0.5
    i, j = order[..., :, None], seen(order)[..., None, :]
    hidden = (j >= length) | (ids[..., :, None] != seen(ids)[..., None, :]) | (causal & (j > i))
    s = jnp.where(hidden, UNSEEN, jnp.where(i == j, ITSELF, s))
    if count_once:
        s -= jnp.log(_meetings(order, rounds, length, i, j, seen).astype(wide))
    total = jax.nn.logsumexp(s, axis=-1)
    weights = jax.nn.softmax(s, axis=-1).astype(value.dtype)
    o = jnp.einsum("bhcij,bhcjv->bhciv", weights, seen(own(value.swapaxes(1, 2))), preferred_element_type=wide)
    # Back into the order of time, round by round.
    back = jnp.argsort(order.reshape(batch, heads, rounds, -1), axis=-1)[..., :length]
    by_round = lambda x: x.reshape(batch, heads, rounds, -1, *x.shape[4:])
    total = jnp.take_along_axis(by_round(total), back, axis=3)
    o = jnp.take_along_axis(by_round(o), back[..., None], axis=3)
    o = jnp.einsum("bhrt,bhrtv->bthv", jax.nn.softmax(total, axis=2), o)
    return o.astype(value.dtype)


def hashed(
    x: Float[Array, "B H T K"], rotations: Float[Array, "K R N"], factors: tuple[int, ...]
) -> Int[Array, "B H R T"]:
    """The bucket of every token in every round, of Π n_f for these factors n_f; 0 where there are none."""
    bucket = jnp.zeros((*x.shape[:2], rotations.shape[1], x.shape[2]), jnp.int32)
    first, before = 0, 1
    for size in factors:
        turned = jnp.einsum("bhtk,krn->bhrtn", x, rotations[:, :, first : first + size // 2])
        # The first of the largest in [turned; −turned], which is not laid out.
        ahead = turned.max(axis=-1) >= -turned.min(axis=-1)
        place = jnp.where(ahead, turned.argmax(axis=-1), size // 2 + turned.argmin(axis=-1))
        bucket += before * place.astype(jnp.int32)
        first, before = first + size // 2, before * size
    return bucket


def _taken(x, at):
    """Tokens of x `B H T …` at places `B H …`."""
    flat = at.reshape(*at.shape[:2], -1)
    found = jnp.take_along_axis(x, flat.reshape(*flat.shape, *(1,) * (x.ndim - 3)), axis=2)
    return found.reshape(*at.shape, *x.shape[3:])


def _meetings(order, rounds: int, length: int, i, j, seen):
    """In how many chunks each query meets each key that it sees."""
    batch, heads, chunks, size = order.shape
    places = jnp.argsort(order.reshape(batch, heads, rounds, -1), axis=-1)[..., :length] // size
    first = jnp.arange(rounds, dtype=places.dtype) * (chunks // rounds)
    places = places.swapaxes(2, 3) + first[None, None, None]  # `B H T R`
    of = _taken(places, jnp.minimum(order, length - 1))
    query, key = of[..., :, None, :, None], seen(of)[..., None, :, None, :]
    met = lambda place: jnp.sum(key == place, axis=(-1, -2))
    return jnp.maximum(met(query) + met((query - 1) % chunks), 1)
