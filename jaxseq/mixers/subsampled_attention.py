"""Subsampled attention: trained on random subsets of the tokens, dense or an ensemble afterwards."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .. import ops
from ..layers.cached_attention import AttentionState, cached_attention, counted, empty_cache
from ..layers.mixer import Mixer
from ..ops.subsampled_attention import SUBSETS
from ..shapes import Array, Float, Int, typed


class SubsampledAttention(Mixer):
    """Softmax attention (arXiv 2306.01705) that trains on 1/`ratio` of the sources, at as much less of the cost.

    With `subsample` every call draws new sets of sources from the rng "subsample", for each layer its own and for the
    batch and the heads the same: `mode` and `sigma` are those of `ops.subsampled_attention.subsets`. It has `__call__`
    alone then. Without, it is dense attention, and has the whole contract. Parameters are the same in both: build the
    model once for training, and once without `subsample` to finish training, to evaluate and to decode; or evaluate the
    former by `jaxseq.analysis.self_ensemble`.
    """

    d_model: int
    num_heads: int = 4
    subsample: bool = False
    ratio: int = 4
    mode: str = "local"
    sigma: float = 16.0
    rotary_base: float | None = 10000.0
    impl: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def prefill(self, x: Float[Array, "B T D"], state: Any, segment_ids: Int[Array, "B T"] | None = None):
        self._check()
        state = self.resumed(x, state, max_length=0 if self.subsample else None)
        attend = self._among_sets if self.subsample and not self.is_initializing() else self._dense
        return cached_attention(self, x, state, counted(segment_ids), self.num_heads, attend)

    def _dense(self, q, k, v, **packed):
        return ops.softmax_attention(q, k, v, impl=self.impl, **packed)

    def _among_sets(self, q, k, v, segment_ids=None, key_segment_ids=None):
        if not self.has_rng("subsample"):
            raise ValueError(
                'SubsampledAttention(subsample=True) has no rng "subsample"; give it to apply in rngs, or build the '
                "model without subsample."
            )
        if k.shape[1] > q.shape[1]:
            raise NotImplementedError("SubsampledAttention(subsample=True) has no state; decode without subsample.")
        if self.ratio == 1:
            return self._dense(q, k, v, segment_ids=segment_ids, key_segment_ids=key_segment_ids)
        draw = partial(ops.subsets, ratio=self.ratio, mode=self.mode, sigma=self.sigma)
        sets = draw(self.make_rng("subsample"), q.shape[1])
        return ops.subsampled_attention(
            q, k, v, sets, queries_too=self.mode in ("window", "local"), segment_ids=segment_ids, impl=self.impl
        )

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> AttentionState:
        self._check()
        return empty_cache(self, batch_size, [max_length], self.num_heads, dtype)

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
