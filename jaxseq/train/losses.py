"""Losses, in float32 whatever the model computes in."""

import math

import jax
import jax.numpy as jnp

from jaxseq.shapes import Array, Bool, Float, Int, typed
from jaxseq.sharded import sum_over_time


@typed
def cross_entropy(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    mask: Bool[Array, "*B"] | Float[Array, "*B"] | None = None,
    *,
    bytes_per_token: float | None = None,
) -> tuple[Float[Array, ""], dict]:
    """Mean of -log softmax(logits)[target] in nats, over the positions that count.

    `mask` weighs the positions; None counts those whose target is not negative (-100 marks "nothing is asked"). The
    metrics are `loss`, `accuracy` and, where `bytes_per_token` is given, `bits_per_byte`.
    """
    logits = logits.astype(jnp.float32)
    weights = (targets >= 0 if mask is None else mask).astype(jnp.float32)
    index = jnp.maximum(targets, 0)
    # A sum over the vocabulary, not a gather: it stays in place where the mesh splits the vocabulary.
    here = index[..., None] == jax.lax.broadcasted_iota(index.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(here, logits, 0), axis=-1)
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    total = jnp.maximum(sum_over_time(weights.sum()), 1e-9)
    mean = lambda x: sum_over_time((weights * x).sum()) / total
    loss = mean(nats)
    right = (logits.argmax(axis=-1) == index).astype(jnp.float32)
    metrics = {"loss": loss, "accuracy": mean(right)}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = loss / (math.log(2) * bytes_per_token)
    return loss, metrics
