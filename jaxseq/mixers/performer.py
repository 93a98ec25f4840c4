"""Performer: softmax attention by random features."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.mixer import Mixer
from ..layers.projection import projection, split_heads
from ..layers.random_features import log_positive_features, orthogonal_features
from ..ops.rescaled import rescaled
from ..shapes import Array, Bool, Float, Int, accumulator, typed
from ..sharded import check_whole


class PerformerState(NamedTuple):
    matrix: Float[Array, "B H M V"]
    log_sum: Float[Array, "B 1 _"]


class Performer(Mixer):
    """Attention whose weights are products of positive random features, in expectation softmax's (arXiv 2009.14794).

        o_t = Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s)        φ_r(x) = exp(w_r·x K^-¼ − |x|² K^-½ / 2)

    over s ≤ t, or all s with `causal=False`, which has `__call__` alone, and of which `mask` leaves tokens out.
    M = `num_features` rows w, orthogonal in blocks, K ln K when None. It is computed in logs: with m_t = log Σ_s φ(k_s)
    each feature's state S_t,r is a mean of values, and o_t = S_tᵀ softmax_r(log φ(q_t) + m_t). Nothing overflows, no ε
    is needed, and no maximum over all keys, as in other implementations, lets later tokens change earlier outputs.

    The rows are no parameters: they come from `seed`, or from an rng "features" where there is one, which redraws them:
    `apply(params, x, rngs={"features": key})`. All heads share them.
    """

    d_model: int
    num_heads: int = 4
    num_features: int | None = None
    norms: str = "chi"
    seed: int = 0
    causal: bool = True
    chunk_size: int | None = None
    impl: str | None = None
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
        width, number = self._sizes()
        self.check_mask(mask)
        key = self.make_rng("features") if self.has_rng("features") else jax.random.key(self.seed)
        rows = orthogonal_features(key, number, width, norms=self.norms)
        q, k, v = (split_heads(projection(self.d_model, f"{name}_proj", self)(x), width) for name in "qkv")
        log = lambda a: log_positive_features(a.astype(accumulator(a.dtype)), rows.astype(accumulator(a.dtype)))
        if self.causal:
            keys = log(k).reshape(*x.shape[:2], -1)
            k, decay, scale, log_sum = rescaled(None, keys, state.log_sum, segment_ids)
            heads = lambda a: split_heads(a, number)
            o, matrix = ops.gated_linear_attention(
                nn.softmax(log(q) + heads(scale)).astype(v.dtype), heads(k).astype(v.dtype), v, heads(decay), scale=1.0,
                initial_state=state.matrix, segment_ids=segment_ids, chunk_size=self.chunk_size, impl=self.impl,
            )  # fmt: skip
            state = PerformerState(matrix.astype(state.matrix.dtype), log_sum)
        else:
            o = self._of_all(log(q), log(k), v, segment_ids, mask)
        return projection(self.d_model, "out_proj", self)(o.reshape(x.shape)), state

    def _of_all(self, log_q, log_k, v, segment_ids, mask):
        check_whole("Performer(causal=False)", "give every device whole sequences")
        if segment_ids is not None:
            raise ValueError("segment_ids: Performer(causal=False) sums over all of a row; give one sequence a row.")
        if mask is not None:  # by a finite number: a row may hold no token at all
            log_k = jnp.where(mask[..., None, None], log_k, jnp.finfo(log_k.dtype).min)
        scale = jax.nn.logsumexp(log_k, axis=1, keepdims=True)
        means = jnp.einsum("bthm,bthv->bhmv", jnp.exp(log_k - scale).astype(v.dtype), v)
        return jnp.einsum("bthm,bhmv->bthv", nn.softmax(log_q + scale).astype(v.dtype), means)

    @nn.nowrap
    def init_state(self, batch_size: int, *, max_length: int | None = None, dtype=jnp.float32) -> PerformerState:
        self.check_causal()
        width, number = self._sizes()
        matrix = jnp.zeros((batch_size, self.num_heads, number, width), accumulator(dtype))
        return PerformerState(matrix, jnp.full((batch_size, 1, self.num_heads * number), -jnp.inf, accumulator(dtype)))

    @nn.nowrap
    def looks_ahead(self) -> str | None:
        return None if self.causal else "causal=False"

    @nn.nowrap
    def _sizes(self) -> tuple[int, int]:
        """Channels of a head, and its features."""
        self.checked_heads(num_heads=self.num_heads)
        width = self.d_model // self.num_heads
        return width, max(1, int(width * math.log(width))) if self.num_features is None else self.num_features
