"""Subsampled attention: trained on random subsets of the tokens, dense or an ensemble afterwards."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.cached_attention import AttentionState, cached_attention, counted, empty_cache
from ..layers.mixer import Mixer
from ..ops.subsampled_attention import SUBSETS
from ..shapes import Array, Float, Int, typed


class SubsampledAttention(Mixer):
    """Softmax attention (arXiv 2306.01705) that trains on 1/`ratio` of the sources, at as much less of the cost.

    With `subsample` every call draws new sets of sources from the rng "subsample", for each layer its own and for the
    batch and the heads the same: `mode` and `sigma` are those of `ops.subsets`. Without, it is dense attention, and has
    the whole contract. Parameters are the same in both: build the model once for training, and once without `subsample`
    to finish training, to evaluate and to decode; or evaluate the former by `jaxseq.analysis.self_ensemble`. It may
    decode by subsets too: from a state, every token sees what it would as the last one, by a draw for its position
    alone, `ops.subset_seen`. Steps with the same rng are then a call from the state at the start, of the same rng.

    With `causal=False` it is an encoder's, and has `__call__` alone. Padding takes up places of the sets.

    Raises:
      ValueError: a field is out of range, `ratio` does not divide the length, or the rng is missing.
      NotImplementedError: a state is asked for with `causal=False`; with `subsample`, time is split over devices.
    """

    d_model: int
    num_heads: int = 4
    subsample: bool = False
    ratio: int = 4
    mode: str = "local"
    sigma: float = 16.0
    causal: bool = True
    rotary_base: float | None = 10000.0
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        self._check()
        state = self.resumed(x, state, max_length=0 if self.subsample else None)
        sets = partial(self._among_sets, 0 if state is None else state.position)
        attend = sets if self.subsample and not self.is_initializing() else self._dense
        return cached_attention(self, x, state, counted(segment_ids), self.num_heads, attend)

    def _dense(self, q, k, v, **packed):
        return ops.softmax_attention(q, k, v, causal=self.causal, impl=self.impl, **packed)

    def _among_sets(self, first, q, k, v, segment_ids=None, key_segment_ids=None):
        if not self.has_rng("subsample"):
            raise ValueError(
                'SubsampledAttention(subsample=True) has no rng "subsample"; give it to apply in rngs, or build the '
                "model without subsample."
            )
        if self.ratio == 1:
            return self._dense(q, k, v, segment_ids=segment_ids, key_segment_ids=key_segment_ids)
        if k.shape[1] > q.shape[1]:
            return self._one_by_one(first, q, k, v, segment_ids, key_segment_ids)
        draw = partial(ops.subsets, ratio=self.ratio, mode=self.mode, sigma=self.sigma)
        sets = draw(self.make_rng("subsample"), q.shape[1])
        return ops.subsampled_attention(
            q, k, v, sets, queries_too=self.mode in ("window", "local"), causal=self.causal, segment_ids=segment_ids,
            impl=self.impl,
        )  # fmt: skip

    def _one_by_one(self, first, q, k, v, segment_ids, key_segment_ids):
        """Attention of queries at positions from `first` on, the last among those of the keys, each to its own set."""
        length, span = q.shape[1], k.shape[1]
        draw = partial(ops.subset_seen, self.make_rng("subsample"), ratio=self.ratio, mode=self.mode, sigma=self.sigma)

        def visible(i, j):  # all keys are listed, in order
            return jax.vmap(draw, (0, None))(first + i[:, 0], j[0] + first + length - span)

        size = min(length, 64)
        keys = jnp.broadcast_to(jnp.arange(span, dtype=jnp.int32)[None], (-(-length // size), span))
        ids = {"segment_ids": segment_ids, "key_segment_ids": key_segment_ids}
        return ops.block_sparse_attention(q, k, v, keys, visible, block_size=size, **ids)

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
        if self.mode not in SUBSETS:
            raise ValueError(
                f"mode={self.mode!r} is unknown to SubsampledAttention; choose one of {', '.join(SUBSETS)}."
            )
        if self.ratio < 1:
            raise ValueError(f"ratio={self.ratio}; SubsampledAttention takes 1 or more.")
        if self.sigma < 0:
            raise ValueError(f"sigma={self.sigma}; SubsampledAttention takes 0 or more.")
