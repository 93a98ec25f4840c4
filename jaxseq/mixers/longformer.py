"""Longformer: a window, dilated in some heads, and tokens that see everything."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.cached_attention import AttentionState, cached_attention, counted, empty_cache
from ..layers.mixer import Mixer
from ..layers.projection import projection, split_heads
from ..layers.rotary import rotary
from ..shapes import Array, Float, Int, typed
from ..sharded import check_whole

#: The segment of keys that no query sees.
UNSEEN = -(2**30)


class Longformer(Mixer):
    """Attention in a sliding window, w tokens back and, unless causal, w ahead (arXiv 2004.05150).

        query i sees j where |i − j| ≤ w d and d divides i − j

    with `window` w and `dilation` d, one number or one a head. It costs O(T w).

    Causal, as the paper's language models are, it has the whole contract, and a cache of the last w d tokens. With
    `causal=False` it is the encoder: `global_tokens` are positions that every query sees too, and that see everything,
    with projections of their own for that; it has `__call__` alone. Segments are kept apart in both, and positions
    are rotary where the authors' are learnt.

    Raises:
      ValueError: a number is out of range, or `global_tokens` are repeated, or beyond the sequence, or causal.
      NotImplementedError: time is split over devices, or a state is asked for with `causal=False`.
    """

    d_model: int
    num_heads: int = 4
    window: int = 256
    dilation: int | tuple[int, ...] = 1
    global_tokens: tuple[int, ...] = ()
    causal: bool = True
    rotary_base: float | None = 10000.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
        dilations = self._dilations()
        check_whole("Longformer", "give every device whole sequences")
        length = x.shape[1]
        if not all(0 <= token < length for token in self.global_tokens):
            raise ValueError(
                f"global_tokens={self.global_tokens}; a sequence of {length} tokens has 0 to {length - 1}."
            )
        counts = counted(segment_ids)

        def attend(q, k, v, segment_ids=None, key_segment_ids=None):
            ids = segment_ids, key_segment_ids
            if ids[0] is None:
                ids = (jnp.zeros(q.shape[:2], jnp.int32),) * 2
            o = jnp.zeros_like(q)
            for d in sorted(set(dilations)):
                heads = np.asarray([head for head, own in enumerate(dilations) if own == d])
                o = o.at[:, :, heads].set(
                    self._windowed(q[:, :, heads], k[:, :, heads], v[:, :, heads], ids[0], ids[1], d)
                )
            return self._with_global_queries(o, x, ids[0]) if self.global_tokens else o

        return cached_attention(self, x, state, counts, self.num_heads, attend)

    def _windowed(self, q, k, v, segments, key_segments, d):
        """Attention of the queries, which stand at the last positions, in a window of every d-th key."""
        (batch, length), past = segments.shape, k.shape[1] - q.shape[1]
        others = key_segments.at[:, jnp.asarray(self.global_tokens, jnp.int32)].set(UNSEEN)
        # With so many keys more in front, every part of the queries stands at the end of its part of the keys.
        queries = lambda a, value=0: _every(d, a, 0, -length % d, value)
        keys = lambda a, value=0: _every(d, a, -past % d, -length % d, value)
        ids = queries(segments, UNSEEN), keys(others, UNSEEN)
        if self.causal:
            o = ops.softmax_attention(
                queries(q), keys(k), keys(v), window=self.window + 1, segment_ids=ids[0], key_segment_ids=ids[1]
            )
        else:
            first = lambda a: jnp.repeat(a[:, jnp.asarray(self.global_tokens, jnp.int32)], d, axis=0)
            joined = lambda a, b: jnp.concatenate([first(a), b], axis=1)
            ids = ids[0], joined(key_segments, ids[1])
            o = self._both_sides(queries(q), joined(k, keys(k)), joined(v, keys(v)), *ids)
        o = o.reshape(batch, d, *o.shape[1:]).swapaxes(1, 2)
        return o.reshape(batch, -1, *o.shape[3:])[:, :length]

    def _both_sides(self, q, k, v, segments, key_segments):
        """Attention in a window of both sides, and to the global tokens, which lead the keys."""
        count, length = len(self.global_tokens), q.shape[1]
        size = min(length, max(self.window, 32))
        near = np.arange(0, length, size)[:, None] + np.arange(-self.window, size + self.window)[None] + count
        lists = np.concatenate([np.broadcast_to(np.arange(count)[None], (len(near), count)), near], axis=1)
        return ops.block_sparse_attention(
            q,
            k,
            v,
            lists.astype(np.int32),
            lambda i, j: (j < count) | (jnp.abs(i + count - j) <= self.window),
            block_size=size,
            segment_ids=segments,
            key_segment_ids=key_segments,
        )

    def _with_global_queries(self, o, x, segments):
        """The outputs, those of the global tokens from all of the sequence."""
        at = jnp.asarray(self.global_tokens, jnp.int32)
        project = lambda name, x: split_heads(projection(self.d_model, name, self)(x), x.shape[-1] // self.num_heads)
        q, k, v = project("q_global_proj", x[:, at]), project("k_global_proj", x), project("v_global_proj", x)
        if self.rotary_base is not None:
            q = rotary(q, at, self.rotary_base)
            k = rotary(k, jnp.arange(x.shape[1], dtype=jnp.int32), self.rotary_base)
        seen = dict(segment_ids=segments[:, at], key_segment_ids=segments)
        return o.at[:, at].set(ops.softmax_attention(q, k, v, causal=False, **seen))

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> AttentionState:
        self.check_causal()
        spans = [max_length, self.window * max(self._dilations())]
        return empty_cache(self, batch_size, spans, self.num_heads, dtype)

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        return None if self.causal else "causal=False"

    @nn.nowrap
    def _dilations(self) -> tuple[int, ...]:
        """Of every head."""
        self.checked_heads(num_heads=self.num_heads)
        dilations = (self.dilation,) * self.num_heads if isinstance(self.dilation, int) else self.dilation
        if self.window < 1:
            raise ValueError(f"window={self.window}; Longformer takes 1 or more tokens a side.")
        if min(dilations) < 1 or len(dilations) != self.num_heads:
            raise ValueError(f"dilation={self.dilation}; Longformer takes 1 or more, or {self.num_heads} of them.")
        if self.causal and self.global_tokens:
            raise ValueError(f"global_tokens={self.global_tokens} see ahead; Longformer takes them with causal=False.")
        if len(set(self.global_tokens)) < len(self.global_tokens):
            raise ValueError(f"global_tokens={self.global_tokens} holds a token twice; Longformer takes each once.")
        return dilations


def _every(d: int, a: Array, before: int, after: int, value) -> Array:
    """`B T …` → `B·d T/d …`: every d-th token, from each of the first d, after padding both ends."""
    a = jnp.pad(a, ((0, 0), (before, after)) + ((0, 0),) * (a.ndim - 2), constant_values=value)
    return a.reshape(len(a), -1, d, *a.shape[2:]).swapaxes(1, 2).reshape(len(a) * d, -1, *a.shape[2:])
