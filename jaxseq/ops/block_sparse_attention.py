"""Softmax attention over short lists of keys, one list a block of queries."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ..shapes import Array, Float, Int, typed
from ..sharded import check_whole
from .softmax_attention import parallel
from .visibility import Rules, check_heads, check_segments


@typed
def block_sparse_attention(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G V"],
    keys: Int[Array, "Q M"],
    visible: Callable[[Array, Array], Array] | None = None,
    *,
    block_size: int,
    segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    chunk_size: int = 256,
) -> Float[Array, "B T H V"]:
    """Softmax attention in which a block of queries looks at M keys.

        o_i = Σ_{j ∈ M_i} a_ij v_j        a_ij = softmax_{j ∈ M_i}(scale · q_i·k_j)
        M_i = {j ∈ keys[⌊i / block_size⌋] : visible(i, j), j of the segment of i}

    `keys` holds positions among the S keys: one outside is no key, one that comes again counts once. `visible` takes
    positions of queries and keys that broadcast against each other; all pairs are when None. Each of G key heads serves
    a run of H/G query heads, `scale` is K^-½ when None, and a query that sees no key returns zero.

    It costs O(T M) for any S. Blocks of about `chunk_size` queries together are gathered, multiplied and, in the
    backward pass, computed again.

    Raises:
      ValueError: shapes disagree, G does not divide H, Q is not the number of blocks, or segments of queries alone.
      NotImplementedError: time is split over devices.
    """
    check_whole("block_sparse_attention", "give every device whole sequences")
    (batch, length, heads, width), (span, groups) = query.shape, key.shape[1:3]
    check_heads(key, heads)
    if block_size < 1 or keys.shape[0] != -(-length // block_size):
        raise ValueError(
            f"keys has {keys.shape[0]} lists and block_size={block_size}; {length} queries take one list a block of 1 "
            "or more."
        )
    check_segments(segment_ids, key_segment_ids, length, span)
    key_segment_ids = segment_ids if key_segment_ids is None else key_segment_ids
    blocks = lambda x: jnp.pad(x, ((0, 0), (0, -length % block_size)) + ((0, 0),) * (x.ndim - 2)).reshape(
        batch, -1, block_size, *x.shape[2:]
    )
    q = query * jnp.asarray(width**-0.5 if scale is None else scale, query.dtype)
    q = blocks(q.reshape(batch, length, groups, heads // groups, width))
    segments = None if segment_ids is None else blocks(segment_ids)
    keys = jnp.sort(keys, axis=1)
    again = jnp.pad(keys[:, 1:] == keys[:, :-1], ((0, 0), (1, 0)))
    there = (keys >= 0) & (keys < span) & ~again
    keys = jnp.clip(keys, 0, span - 1)

    @jax.checkpoint
    def block(n):
        queries = n * block_size + jnp.arange(block_size, dtype=keys.dtype)
        listed = lambda x: jnp.take(x, keys[n], axis=1)
        ids = None if segments is None else (segments[:, n], listed(key_segment_ids))

        def seen(queries, others, ids):
            pairs = there[n][None] & (True if visible is None else visible(queries[:, None], others[None]))
            return pairs[None] if ids is None else pairs[None] & (ids[0][:, :, None] == ids[1][:, None])

        return parallel(q[:, n], listed(key), listed(value), (queries, keys[n]), ids, None, Rules(seen))

    o = lax.map(block, jnp.arange(len(keys), dtype=keys.dtype), batch_size=max(1, chunk_size // block_size))
    return o.swapaxes(0, 1).reshape(batch, -1, heads, value.shape[-1])[:, :length].astype(value.dtype)
