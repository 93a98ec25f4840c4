"""BigBird: blocks that see their neighbours, the first blocks, and a few at random."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.cached_attention import AttentionState, cached_attention, counted, empty_cache
from ..layers.mixer import Mixer, at_least
from ..segments import last_of_segment
from ..shapes import Array, Float, Int, known, typed
from ..sharded import check_whole

#: The number of no block.
NONE = -1


class BigBird(Mixer):
    """Attention among blocks of `block_size` tokens (arXiv 2007.14062).

    A block sees itself and its neighbours, `num_window_blocks` in all, the first `num_global_blocks` of the sequence,
    and `num_random_blocks` of the others, drawn once and for all from `seed`, a block at a time: a longer sequence sees
    what a shorter one does. Layers of one model want seeds of their own. It costs O(T) for any length.

    Causal, it keeps what lies behind: half of the neighbours, and of the others those before. It has the whole contract
    then, and a cache of `max_length` tokens, of which a step reads the blocks that it sees. With `causal=False` the
    global blocks see everything too, as the paper has it, and it has `__call__` alone; the random ones are then drawn
    from those up to the last that holds tokens of the segment in which the block starts, so that a row sees the same
    however far it is padded. Segments are kept apart, but blocks are those of the whole row: a packed sequence sees
    what it would alone only where it starts the row.

    Raises:
      ValueError: `num_heads` does not divide `d_model`, or a number of blocks or tokens is out of range.
      NotImplementedError: time is split over devices, or a state is asked for with `causal=False`.
    """

    d_model: int
    num_heads: int = 4
    block_size: int = 64
    num_window_blocks: int = 3
    num_global_blocks: int = 2
    num_random_blocks: int = 3
    seed: int = 0
    causal: bool = True
    rotary_base: float | None = 10000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        self._check()
        check_whole("BigBird", "give every device whole sequences")
        first = np.zeros((), np.int32) if state is None else state.position
        attend = lambda q, k, v, **packed: self._listed(first, None, q, k, v, packed)
        return cached_attention(
            self, x, state, counted(segment_ids), self.num_heads, attend if self.causal else self._both_ways
        )

    def _both_ways(self, q, k, v, segment_ids=None, key_segment_ids=None):
        """Attention of all blocks, each by its list, and of the first ones to everything."""
        size, start = self.block_size, np.zeros((), np.int32)

        def row(q, k, v, ids, total):
            packed = dict(segment_ids=ids[None], key_segment_ids=ids[None])
            return self._listed(start, total, q[None], k[None], v[None], packed)[0]

        if segment_ids is None:
            o = self._listed(start, -(-q.shape[1] // size), q, k, v, {})
        else:  # every row draws from the blocks of its own segments
            o = jax.vmap(row)(q, k, v, segment_ids, last_of_segment(segment_ids)[:, ::size] // size + 1)
        ahead = min(q.shape[1], self.num_global_blocks * size)
        if ahead == 0:
            return o
        some = {} if segment_ids is None else dict(segment_ids=segment_ids[:, :ahead], key_segment_ids=segment_ids)
        return o.at[:, :ahead].set(ops.softmax_attention(q[:, :ahead], k, v, causal=False, **some))

    def _listed(self, first, total, q, k, v, packed):
        """Attention of queries at positions from `first` on, the last among those of the keys, each block by its list.

        `total`, where it is not causal, is how many blocks there are to draw from, of all blocks or of each.
        """
        size, length, span = self.block_size, q.shape[1], k.shape[1]
        before = first + length - span  # the position of the first key
        start = first + jnp.arange(0, length, size, dtype=jnp.int32)
        blocks = self._blocks(start // size, total)
        # A run of queries that starts inside a block ends inside the next one.
        if length > 1 and (known(first) is None or int(first) % size):
            blocks = jnp.concatenate([blocks, self._blocks(start // size + 1, total)], axis=1)
        keys = blocks[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]
        keys = jnp.where(blocks[..., None] == NONE, NONE, keys - before).reshape(len(start), -1)

        def visible(i, j):
            n = (i[:, 0] + first) // size
            own = total if total is None or jnp.ndim(total) == 0 else total[n]
            seen = self._blocks(n, own)[:, None] == ((j + before) // size)[..., None]
            return seen.any(-1) & ((j + before <= i + first) if self.causal else True)

        # Fewer queries than a block holds, one of them where it decodes, are a block as they are.
        return ops.block_sparse_attention(q, k, v, keys, visible, block_size=min(size, length), **packed)

    def _blocks(self, n: Int[Array, "Q"], total: int | Int[Array, "Q"] | None) -> Int[Array, "Q M"]:
        """What each block n sees, random ones of the first `total` or, causal, of those up to n.

        NONE stands for one that is not there. Neighbours and global blocks beyond the sequence are listed.
        """
        side, g, r = self.num_window_blocks // 2, self.num_global_blocks, self.num_random_blocks
        n, ahead = n[:, None], 0 if self.causal else side
        last = n if total is None else jnp.broadcast_to(jnp.asarray(total, n.dtype).reshape(-1, 1) - 1, n.shape)
        window = n + jnp.arange(-side, ahead + 1, dtype=n.dtype)[None]
        near, far = jnp.maximum(n - side, g), jnp.maximum(jnp.minimum(n + ahead, last) + 1, g)
        others = near - g + jnp.maximum(last + 1 - far, 0)
        # One of each of r runs of the others: all are different.
        run = jnp.arange(r, dtype=n.dtype)[None]
        low, high = run * others // max(r, 1), (run + 1) * others // max(r, 1)
        draw = lambda n: jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), n), (r,))
        drawn = low + (jax.vmap(draw)(n[:, 0]) * (high - low).astype(jnp.float32)).astype(n.dtype)
        random = jnp.where(drawn < near - g, g + drawn, far + drawn - (near - g))
        first = jnp.broadcast_to(jnp.arange(g, dtype=n.dtype)[None], (len(n), g))
        there = lambda blocks, seen: jnp.where(seen & (blocks >= 0), blocks, NONE)
        first = there(first, (first <= n) | (not self.causal))
        return jnp.concatenate([there(window, True), first, there(random, low < high)], axis=1)

    def start(self, x, *, max_length: int | None = None):
        """It starts at a position that is known."""
        state = Mixer.start(self, x, max_length=max_length)
        return None if state is None else state._replace(position=np.zeros((), np.int32))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> AttentionState:
        self._check()
        self.check_causal()
        return empty_cache(self, batch_size, [max_length], self.num_heads, dtype)

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        return None if self.causal else "causal=False"

    @nn.nowrap
    def _check(self) -> None:
        self.checked_heads(num_heads=self.num_heads)
        at_least(self, block_size=1, num_global_blocks=0, num_random_blocks=0)
        if self.num_window_blocks < 1 or self.num_window_blocks % 2 == 0:
            raise ValueError(f"num_window_blocks={self.num_window_blocks}; BigBird takes an odd number.")
