"""Attention of all tokens to all, whatever their order."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..ops.softmax_attention import softmax_attention
from ..shapes import Array, Float, Int, accumulator, typed
from ..sharded import check_whole
from .projection import fan_in_projection


class SelfAttention(nn.Module):
    """Multi-head softmax attention (arXiv 1706.03762) without positions: permuted tokens give permuted outputs.

    All four maps have biases. Where there is an rng "dropout", a share of the weights and of the output is dropped. It
    looks at the whole sequence: there is no state, and `__call__` alone.

    Raises:
      ValueError: `num_heads` does not divide `d_model`.
      NotImplementedError: weights are dropped, and time is split over devices.
    """

    d_model: int
    num_heads: int = 8
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        if self.num_heads < 1 or self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}.")
        project = lambda name, x: fan_in_projection(self.d_model, name, self, self.d_model)(x)
        heads = lambda name: project(name, x).reshape(*x.shape[:2], self.num_heads, -1)
        q, k, v = (heads(f"{name}_proj") for name in "qkv")
        drops = self.dropout > 0 and self.has_rng("dropout")
        attend = self._with_weights_dropped if drops else partial(softmax_attention, causal=False)
        o = attend(q, k, v, segment_ids=segment_ids)
        return nn.Dropout(self.dropout, deterministic=not drops)(project("out_proj", o.reshape(x.shape)))

    def _with_weights_dropped(self, q, k, v, *, segment_ids):
        """All weights at once: they have to be there to be dropped."""
        check_whole("SelfAttention", "give every device whole sequences where it drops weights")
        logits = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=accumulator(q.dtype)) / q.shape[-1] ** 0.5
        if segment_ids is not None:
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            logits = jnp.where(same, logits, jnp.finfo(logits.dtype).min)
        weights = nn.Dropout(self.dropout, deterministic=False)(jax.nn.softmax(logits, axis=-1)).astype(v.dtype)
        return jnp.einsum("bhts,bshv->bthv", weights, v)
