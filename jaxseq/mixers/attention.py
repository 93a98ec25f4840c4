"""Softmax attention with rotary positions, over everything, a window or blocks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .. import ops
from ..layers.cached_attention import (
    AttentionState,
    block_counts,
    cached_attention,
    counted,
    empty_cache,
    starts_of,
)
from ..layers.learned_span import bounded
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection
from ..shapes import Array, Float, Int, accumulator, typed


class Attention(Mixer):
    """Multi-head softmax attention (arXiv 1706.03762) with rotary positions and grouped key-value heads.

    `num_kv_heads` divides `num_heads`. `window` w sees the last w tokens, itself included. `block_size` b cuts every
    segment into blocks and sees what came before in its own one, and `look_back` whole blocks before that (MASFormer,
    arXiv 2310.12442): at most (look_back + 1) b tokens. Neither has parameters: layers of one model may differ in them
    (`jaxseq.models.mixed_spans`), and those of another be loaded. With a `forget_gate` f_t = σ(W_f x_t + b_f) a head,
    Σ_{j<u≤i} log f_u is added to the logit of i and j: keys fade (Forgetting Transformer, arXiv 2503.02130, eq. 6).

    With `max_span` S each head learns how far it sees (adaptive span, arXiv 1905.07799, eq. 4 to 6):

        a_ij ∝ m(i − j) exp(logit)        m(x) = clip(1 + (z − x) / R, 0, 1)        z = S · clip(span, 0, 1)

    with R = `span_ramp` and spans that start at 0. `span_loss` · mean_heads z is sown into the collection "losses", as
    `apply(..., mutable=["losses"])` hands it out. No token sees more than S + R. What is trained may be built again
    with the shorter `window` of `reach`, which changes no output and caches no more.

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
    max_span: int | None = None
    span_ramp: int = 32
    span_loss: float = 2e-6
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        state = self.resumed(x, state)
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
            **self._learned_span(x),
        )
        log_decay = None
        if self.forget_gate:
            z = projection(self.num_heads, "forget_proj", self, use_bias=True)(x)
            log_decay = nn.log_sigmoid(z.astype(accumulator(z.dtype)))
        y, state = cached_attention(self, x, state, counts, self._kv_heads(), attend, log_decay)
        return y, state._replace(filled=filled)

    def _learned_span(self, x) -> dict[str, Any]:
        """How far each head sees, and what that costs."""
        if self.max_span is None:
            return {}
        span = self.param("span", nn.initializers.zeros, (self.num_heads,), self.param_dtype)
        span = self.max_span * bounded(span.astype(accumulator(x.dtype)))
        if not self.is_initializing():  # else it would be among the parameters
            self.sow("losses", "span", self.span_loss * span.mean())
        return {"span": span, "ramp": self.span_ramp}

    @nn.nowrap
    def reach(self, span: Float[Array, "*L H"]) -> int:
        """The tokens that are seen by the head that sees most, of the parameters `span` of this mixer, or of layers."""
        self._span()
        if self.max_span is None:
            raise ValueError("max_span=None; Attention without a learned span has no parameters that tell its reach.")
        return int(np.ceil(self.max_span * np.clip(np.max(span), 0, 1))) + self.span_ramp

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
        if self.max_span is not None:
            at_least(self, max_span=1, span_ramp=1)
            if self.block_size is not None:
                raise ValueError(f"max_span={self.max_span} and block_size={self.block_size}; Attention takes one.")
            return min(self.max_span + self.span_ramp, self.window or self.max_span + self.span_ramp)
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
