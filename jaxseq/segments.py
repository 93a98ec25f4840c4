"""Packed sequences: where a new one starts, told from the ids of its tokens."""

import jax.numpy as jnp

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
def segment_counts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many restarts have come up to each token: ids that come again are told apart."""
    counts = jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
    total = lambda: Affine(jnp.ones_like(counts[:, -1]), counts[:, -1])
    add = lambda earlier: (earlier[:, None] + counts, earlier + counts[:, -1])
    return sharded.across_devices(affine, total, add, jnp.zeros_like(counts[:, 0]))[0]
