"""Reformer: attention among tokens that hash alike."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import ops
from ..layers.mixer import Mixer, at_least
from ..layers.projection import projection, split_heads
from ..ops.lsh_attention import bucket_factors, num_buckets
from ..shapes import Array, Bool, Float, Int, typed


class Reformer(Mixer):
    """Attention whose queries are the keys too, each among tokens of its bucket (arXiv 2001.04451, section 2).

        o_t = Σ_s softmax_s(q_t·q_s / |q_s| K^-½) v_s        q = x W_qk, s in the bucket of t in one of the rounds

    `lsh_attention`, in T/`bucket_size` buckets (an even number) and `rounds` rounds. There are no positions. Rotations
    are no parameters: they come from `seed`, or from an rng "features" where there is one, which redraws them. `mask`
    leaves tokens out, but there are as many buckets as the whole row takes: a row padded to another number of them
    hashes otherwise than alone.

    Which tokens share a chunk depends on all of them: there is no state, and `__call__` alone, `causal` or not.

    Raises:
      ValueError: `num_heads` does not divide `d_model`, or a number is below 1.
      NotImplementedError: time is split over devices, or a state is asked for.
    """

    d_model: int
    num_heads: int = 4
    bucket_size: int = 64
    rounds: int = 4
    causal: bool = False
    count_once: bool = False
    seed: int = 0
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
        self.resumed(x, state)
        self.checked_heads(num_heads=self.num_heads)
        at_least(self, bucket_size=1, rounds=1)
        width = self.d_model // self.num_heads
        key = self.make_rng("features") if self.has_rng("features") else jax.random.key(self.seed)
        axes = sum(bucket_factors(num_buckets(x.shape[1], self.bucket_size))) // 2
        heads = lambda name: split_heads(projection(self.d_model, name, self)(x), width)
        o = ops.lsh_attention(
            heads("qk_proj"), heads("v_proj"), jax.random.normal(key, (width, self.rounds, axes)),
            bucket_size=self.bucket_size, causal=self.causal, segment_ids=segment_ids, mask=mask,
            count_once=self.count_once,
        )  # fmt: skip
        return projection(self.d_model, "out_proj", self)(o.reshape(x.shape)), None

    @nn.nowrap
    def looks_ahead(self) -> str:
        return ""
