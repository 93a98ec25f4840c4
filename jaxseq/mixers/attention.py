"""Softmax attention with rotary positions, over everything, a window or blocks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.cached_attention import (
    AttentionState,
    block_counts,
    cached_attention,
    counted,
    empty_cache,
    starts_of,
)
from ..layers.mixer import Mixer
from ..layers.projection import projection
from ..shapes import Array, Float, Int, accumulator, check_width, typed


class Attention(Mixer):
    """Multi-head softmax attention (arXiv 1706.03762) with rotary positions and grouped key-value heads.

    `num_kv_heads` divides `num_heads`. `window` w sees the last w tokens, itself included. `block_size` b cuts every
    segment into blocks and sees what came before in its own one, and `look_back` whole blocks before that (MASFormer,
    arXiv 2310.12442): at most (look_back + 1) b tokens. Neither has parameters: layers of one model may differ in them
    (`jaxseq.models.mixed_spans`), and those of another be loaded. With a `forget_gate` f_t = σ(W_f x_t + b_f) a head,
    Σ_{j<u≤i} log f_u is added to the logit of i and j: keys fade (Forgetting Transformer, arXiv 2503.02130, eq. 6).

    The state is a cache of the last `max_length` tokens, of as many as are seen where that is bounded, less the token
    itself: what lies further back is forgotten.
    """

    d_model: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    window: int | None = None
    block_size: int | None = None
    look_back: int = 0
    rotary_base: float | None = 10000.0
    logit_softcap: float | None = None
    forget_gate: bool = False
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        check_width(x, self.d_model, "Attention")
        state = self.start(x) if state is None else state
        filled = None
        if self.block_size is None:
            counts = counted(segment_ids)
        else:
            starts = starts_of(segment_ids, x.shape[:2])
            counts, filled = block_counts(starts, state.filled, self.block_size, self.look_back)
        attend = partial(
            ops.softmax_attention,
            window=self._span(),
            look_back=self.look_back,
            logit_softcap=self.logit_softcap,
            impl=self.impl,
        )
        log_decay = None
        if self.forget_gate:
            z = projection(self.num_heads, "forget_proj", self, use_bias=True)(x)
            log_decay = nn.log_sigmoid(z.astype(accumulator(z.dtype)))
        y, state = cached_attention(self, x, state, counts, self._kv_heads(), attend, log_decay)
        return y, state._replace(filled=filled)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> AttentionState:
        span, kv_heads = self._span(), self._kv_heads()
        spans = [max_length, span if span is None else span - 1]
        state = empty_cache(self, batch_size, spans, kv_heads, dtype, self.forget_gate)
        if self.block_size is None:
            return state
        # Below every block that a query may look back to.
        return state._replace(segment=state.segment - self.look_back, filled=jnp.zeros(batch_size, jnp.int32))

    @nn.nowrap
    def _span(self) -> int | None:
        """The most tokens that a query sees, itself included."""
        if self.look_back < 0 or (self.look_back and self.block_size is None):
            raise ValueError(
                f"look_back={self.look_back} and block_size={self.block_size}; Attention takes 0 or more blocks, of "
                "a size."
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}; Attention takes 1 or more tokens, or None.")
        if self.block_size is None:
            return self.window
        if self.block_size < 1 or self.window is not None:
            raise ValueError(
                f"block_size={self.block_size} and window={self.window}; Attention takes blocks of 1 or more tokens, "
                "or a window."
            )
        return (self.look_back + 1) * self.block_size

    @nn.nowrap
    def _kv_heads(self) -> int:
        return self.key_value_heads(self.num_heads, self.num_kv_heads, 1.0, 1.0)[1]


#: Attention over the last `window` tokens; the cache is of as many, less the token itself.
SlidingWindowAttention = partial(Attention, window=256)

#: Attention without positions, whose keys fade: the gates tell what is near.
ForgettingAttention = partial(Attention, forget_gate=True, rotary_base=None)
