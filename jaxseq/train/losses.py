"""Losses, in float32 whatever the model computes in."""

import math

import jax
import jax.numpy as jnp

from jaxseq.shapes import Array, Bool, Float, Int, typed


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
    chosen = jnp.take_along_axis(logits, index[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - chosen
    total = jnp.maximum(weights.sum(), 1e-9)
    loss = (weights * nats).sum() / total
    right = (logits.argmax(axis=-1) == index).astype(jnp.float32)
    metrics = {"loss": loss, "accuracy": (weights * right).sum() / total}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = loss / (math.log(2) * bytes_per_token)
    return loss, metrics
