"""Packed sequences: where a new one starts, told from the ids of its tokens; and padding among them."""

import jax.numpy as jnp
from jax import lax

from . import sharded
from .monoid import Affine, affine
from .shapes import Array, Bool, Int, typed


@typed
def segment_starts(segment_ids: Int[Array, "B T"], *, reverse: bool = False) -> Bool[Array, "B T"]:
    """True at the first token of a new segment (the last one, in reverse).

    The first token of the call continues the segment before it.
    """
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    before = sharded.halo(ids, ids[:, :1], reverse=reverse)
    starts = ids != jnp.concatenate([before, ids[:, :-1]], axis=1)
    return jnp.flip(starts, 1) if reverse else starts


@typed
def padded_segments(segment_ids: Int[Array, "B T"] | None, mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Segments in which the tokens that `mask` leaves out are one of their own."""
    ids = jnp.zeros(mask.shape, jnp.int32) if segment_ids is None else segment_ids
    return jnp.where(mask, 2 * ids, -1)  # the one odd number, on every device


@typed
def segment_counts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many restarts have come up to each token: ids that come again are told apart."""
    counts = jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
    total = lambda: Affine(jnp.ones_like(counts[:, -1]), counts[:, -1])
    add = lambda earlier: (earlier[:, None] + counts, earlier + counts[:, -1])
    return sharded.across_devices(affine, total, add, jnp.zeros_like(counts[:, 0]))[0]


@typed
def last_of_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The position of the last token of each token's segment; all of the time is at hand."""
    index, length = jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape[1]
    starts = jnp.where(segment_starts(segment_ids), index[None], length)
    later = jnp.pad(starts[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return lax.cummin(later, axis=1, reverse=True) - 1


@typed
def tokens_so_far(starts: Bool[Array, "B T"], before: Int[Array, "B"]) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """How many tokens of its segment there are up to each one, itself included, and up to the last.

    `starts` are those of segments; of the segment in progress at the start of the call came `before` tokens.
    """
    index = jnp.broadcast_to(jnp.arange(starts.shape[1], dtype=jnp.int32)[None], starts.shape)
    start = lax.cummax(jnp.where(starts, index, -1), axis=1)
    goes_on, alone = start < 0, index - jnp.maximum(start, 0) + 1
    total = lambda: Affine(goes_on[:, -1].astype(jnp.int32), alone[:, -1])

    def run(before):
        counts = jnp.where(goes_on, before[:, None] + alone, alone)
        return counts, counts[:, -1]

    return sharded.across_devices(affine, total, run, before)
