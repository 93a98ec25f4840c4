"""Kronecker attention: softmax over pairs of keys."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..ops.kronecker_attention import num_monomials
from ..segments import segment_counts
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from ..sharded import check_whole, on_last


class PairCache(NamedTuple):
    keys: Float[Array, "B L 2 H K"]  # both keys of the last L tokens, newest last
    values: Float[Array, "B L 2 H K"]
    segment: Int[Array, "B L"]  # 0: the segment in progress; below: an earlier one, or nothing yet


class KroneckerAttention(Mixer):
    """Attention whose queries see pairs of tokens: it finds triples, where attention finds pairs (arXiv 2310.04064).

        o_t = Σ_ij a_tij v_i ⊙ v'_j        a_tij = softmax_ij(scale · Σ_l q_tl k_il k'_jl)

    of tokens i, j ≤ t, with i ≤ j where `ordered`; of all with `causal=False`, which has `__call__` alone, and of which
    `mask` leaves tokens out. There are no positions. v' starts near one: the layer starts as attention over i.

    With `degree` None it is exact, in time T³ and with a cache of tokens: queries and keys are normalised a head and
    scaled by K^-½. A call, and the cache, take `max_length` tokens at most, any number with None. With an even `degree`
    it is `kronecker_polynomial`, in time T: entries x are bounded by β tanh(x / β), β the `bound`, and scaled by 1/K,
    so that no score exceeds β³; the state is 2 R (K + 1) numbers a head, R monomials of K entries: heads of 4 to 8
    channels are what it can afford.

    Raises:
      ValueError: a field is out of range, exact attention is given more than `max_length` tokens, or there are too many
        monomials.
      NotImplementedError: time is split over devices without a `degree`, or a state is asked for with `causal=False`.
    """

    d_model: int
    num_heads: int = 4
    degree: int | None = None
    bound: float = 1.0
    ordered: bool = False
    causal: bool = True
    max_length: int | None = 1024
    block_size: int = 32
    norm_eps: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(
        self,
        x: Float[Array, "B T D"],
        state: Any,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        mask: Bool[Array, "B T"] | None = None,
    ):
        state = self.resumed(x, state)
        self._check()
        self.check_mask(mask)
        width = self.d_model // self.num_heads
        heads = lambda name, use_bias=False: split_heads(projection(self.d_model, name, self, use_bias)(x), width)
        q, *keys = (self._entries(name, heads(f"{name}_proj")) for name in ("q", "k1", "k2"))
        values = heads("v1_proj"), 1 + heads("v2_proj", use_bias=True)
        if self.degree is not None:
            o, state = self._polynomial(q, keys, values, state, segment_ids, mask)
        else:
            o, state = self._exact(q, keys, values, state, segment_ids, mask)
        return projection(self.d_model, "out_proj", self)(o.reshape(x.shape)), state

    def _entries(self, name: str, x):
        """Queries or keys of a size that their products can bear."""
        if self.degree is None:
            return nn.RMSNorm(self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=f"{name}_norm")(x)
        return self.bound * jnp.tanh(x / self.bound)

    def _polynomial(self, q, keys, values, state, segment_ids, mask):
        options = dict(degree=self.degree, causal=self.causal, ordered=self.ordered, mask=mask)
        if self.causal:
            options |= dict(initial_state=state, segment_ids=segment_ids)
        elif segment_ids is not None:
            raise ValueError("segment_ids: KroneckerAttention(causal=False, degree=...) sums over all of a row.")
        o, sums = ops.kronecker_polynomial(q, *keys, *values, **options)
        return o, sums.astype(state.dtype) if self.causal else None

    def _exact(self, q, keys, values, state, segment_ids, mask):
        check_whole("KroneckerAttention", "give every device whole sequences, or take a degree")
        if self.max_length is not None and q.shape[1] > self.max_length:
            raise ValueError(
                f"x has {q.shape[1]} tokens; KroneckerAttention(max_length={self.max_length}) is exact, in time T³, "
                "and takes at most as many in a call: give it a degree, or another max_length."
            )
        options = dict(causal=self.causal, ordered=self.ordered, scale=q.shape[-1] ** -0.5, block_size=self.block_size)
        counts = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_counts(segment_ids)
        if state is None:
            seen = counts if mask is None else jnp.where(mask, counts, -1)  # which is no query's
            o = ops.kronecker_attention(q, *keys, *values, segment_ids=counts, key_segment_ids=seen, **options)
            return o, None
        both, cached = (lambda pair: jnp.stack(pair, axis=2)), state.segment.shape[1]
        after = lambda kept, new: jnp.concatenate([kept.astype(new.dtype), new], axis=1)
        keys, values = after(state.keys, both(keys)), after(state.values, both(values))
        segments = after(state.segment, counts)
        pair = lambda x: (x[:, :, 0], x[:, :, 1])
        o = ops.kronecker_attention(
            q, *pair(keys), *pair(values), segment_ids=counts, key_segment_ids=segments, **options
        )
        last = lambda x, like: on_last(x[:, x.shape[1] - cached :].astype(like.dtype))
        segments = last(segments - segments[:, -1:], segments)
        return o, PairCache(last(keys, state.keys), last(values, state.values), segments)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32):
        self._check()
        self.check_causal()
        width = self.d_model // self.num_heads
        if self.degree is not None:
            number = num_monomials(width, self.degree)
            return jnp.zeros((batch_size, 2, self.num_heads, number, width + 1), accumulator(dtype))
        if max_length is None or max_length < 0:
            raise ValueError(
                f"max_length={max_length}; KroneckerAttention takes the number of tokens its cache holds, 0 or more."
            )
        if self.max_length is not None and max_length > self.max_length:
            raise ValueError(
                f"max_length={max_length}; the cache of KroneckerAttention(max_length={self.max_length}) holds at most "
                "as many tokens."
            )
        pairs = jnp.zeros((batch_size, max_length, 2, self.num_heads, width), dtype)
        return PairCache(pairs, pairs, jnp.full((batch_size, max_length), -1, jnp.int32))

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        return None if self.causal else "causal=False"

    @nn.nowrap
    def _check(self) -> None:
        self.checked_heads(num_heads=self.num_heads)
        at_least(self, block_size=1, max_length=1)
        if self.degree is not None and (self.degree < 0 or self.degree % 2):
            raise ValueError(f"degree={self.degree}; KroneckerAttention takes an even one of 0 or more, or None.")
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound}; KroneckerAttention takes a number above 0.")
        if self.ordered and not self.causal:
            raise ValueError("ordered=True with causal=False; KroneckerAttention takes pairs i ≤ j up to each token.")
