"""Softmax attention with rotary positions."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.mixer import Mixer
from ..layers.projection import projection
from ..layers.rotary import rotary
from ..segments import segment_counts
from ..shapes import Array, Float, Int, check_width, typed
from ..sharded import devices, first_position, on_last


class AttentionState(NamedTuple):
    key: Float[Array, "B L H K"]  # the last L tokens, newest last
    value: Float[Array, "B L H K"]
    segment: Int[Array, "B L"]  # 0: the segment in progress; below: an earlier one, or nothing yet
    position: Int[Array, ""]  # tokens seen so far


class Attention(Mixer):
    """Multi-head softmax attention (arXiv 1706.03762) with rotary positions and grouped key-value heads.

    `num_kv_heads` divides `num_heads`; `window` w sees the last w tokens, itself included. The state is a cache of
    the last `max_length` tokens (of w − 1 with a window): what lies further back is forgotten.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    window: int | None = None
    rotary_base: float | None = 10000.0
    logit_softcap: float | None = None
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        check_width(x, self.d_model, "Attention")
        state = self.start(x) if state is None else state
        (batch, length, _), cached, width = x.shape, state.key.shape[1], self.d_model // self.num_heads
        project = lambda name, heads: projection(heads * width, name, self)(x).reshape(batch, length, heads, width)
        q = project("q_proj", self.num_heads)
        k, v = (project(name, self._kv_heads()) for name in ("k_proj", "v_proj"))
        if self.rotary_base is not None:
            positions = state.position + first_position(length) + jnp.arange(length, dtype=jnp.int32)
            q, k = (rotary(a, positions, self.rotary_base) for a in (q, k))
        k = jnp.concatenate([state.key.astype(k.dtype), k], axis=1)
        v = jnp.concatenate([state.value.astype(v.dtype), v], axis=1)
        # Segments are counted from the one in progress at the start of the call.
        counts = jnp.zeros((batch, length), jnp.int32)
        if segment_ids is not None:
            counts = segment_counts(segment_ids)
        segments = jnp.concatenate([state.segment, counts], axis=1)
        packed = dict(segment_ids=counts, key_segment_ids=segments) if cached or segment_ids is not None else {}
        o = ops.softmax_attention(
            q, k, v, window=self.window, logit_softcap=self.logit_softcap, impl=self.impl, **packed
        )
        y = projection(self.d_model, "out_proj", self)(o.reshape(batch, length, -1))
        last = lambda a, like: on_last(a[:, a.shape[1] - cached :].astype(like.dtype))
        return y, AttentionState(
            last(k, state.key),
            last(v, state.value),
            last(segments - segments[:, -1:], segments),
            state.position + length * devices(),
        )

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> AttentionState:
        if max_length is None and self.window is None:
            raise ValueError("max_length=None; Attention without a window takes the number of tokens its cache holds.")
        spans = [span for span in (max_length, self.window and self.window - 1) if span is not None]
        if min(spans) < 0:
            raise ValueError(f"max_length={max_length} and window={self.window}; Attention takes no negative length.")
        shape = (batch_size, min(spans), self._kv_heads(), self.d_model // self.num_heads)
        segment = jnp.full(shape[:2], -1, jnp.int32)
        return AttentionState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), segment, jnp.zeros((), jnp.int32))

    @nn.nowrap
    def _kv_heads(self) -> int:
        self.checked_heads(num_heads=self.num_heads)
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={kv_heads} does not divide num_heads={self.num_heads}.")
        return kv_heads
