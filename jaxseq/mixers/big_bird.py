"""BigBird: blocks that see their neighbours, the first blocks, and a few at random."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.cached_attention import AttentionState, cached_attention, counted, empty_cache
from ..layers.mixer import Mixer
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
    global blocks see everything too, as the paper has it, and it has `__call__` alone. Segments are kept apart, but
    blocks are those of the whole row: a packed sequence sees what it would alone only where it starts the row.
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
        if state is not None:
            self.check_causal()
        check_whole("BigBird", "give every device whole sequences")
        first = np.zeros((), np.int32) if state is None else state.position
        attend = lambda q, k, v, **packed: self._attend(first, q, k, v, packed)
        return cached_attention(self, x, state, counted(segment_ids), self.num_heads, attend)

    def _attend(self, first, q, k, v, packed):
        """Attention of queries at positions from `first` on, the last among those of the keys."""
        size, length, span = self.block_size, q.shape[1], k.shape[1]
        total = None if self.causal else -(-length // size)
        before = first + length - span  # the position of the first key
        start = first + jnp.arange(0, length, size, dtype=jnp.int32)
        blocks = self._blocks(start // size, total)
        # A run of queries that starts inside a block ends inside the next one.
        if length > 1 and (known(first) is None or int(first) % size):
            blocks = jnp.concatenate([blocks, self._blocks(start // size + 1, total)], axis=1)
        keys = blocks[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]
        keys = jnp.where(blocks[..., None] == NONE, NONE, keys - before).reshape(len(start), -1)

        def visible(i, j):
            seen = self._blocks((i[:, 0] + first) // size, total)[:, None] == ((j + before) // size)[..., None]
            return seen.any(-1) & ((j + before <= i + first) if self.causal else True)

        # Fewer queries than a block holds, one of them where it decodes, are a block as they are.
        o = ops.block_sparse_attention(q, k, v, keys, visible, block_size=min(size, length), **packed)
        first_ones = min(length, self.num_global_blocks * size)
        if self.causal or first_ones == 0:
            return o
        some = packed and {
            "segment_ids": packed["segment_ids"][:, :first_ones],
            "key_segment_ids": packed["segment_ids"],
        }
        return o.at[:, :first_ones].set(ops.softmax_attention(q[:, :first_ones], k, v, causal=False, **some))

    def _blocks(self, n: Int[Array, "Q"], total: int | None) -> Int[Array, "Q M"]:
        """What each block n sees, of `total` or, causal, of those up to n; NONE for one that is not there."""
        side, g, r = self.num_window_blocks // 2, self.num_global_blocks, self.num_random_blocks
        n, ahead = n[:, None], 0 if self.causal else side
        last = n if total is None else jnp.full_like(n, total - 1)
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
        there = lambda blocks, known: jnp.where(known & (blocks >= 0) & (blocks <= last), blocks, NONE)
        return jnp.concatenate([there(window, True), there(first, True), there(random, low < high)], axis=1)

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
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}; BigBird takes 1 or more.")
        if self.num_window_blocks < 1 or self.num_window_blocks % 2 == 0:
            raise ValueError(f"num_window_blocks={self.num_window_blocks}; BigBird takes an odd number.")
        for name in ("num_global_blocks", "num_random_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; BigBird takes 0 or more.")
