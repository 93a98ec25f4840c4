"""Losses, in float32 whatever the model computes in."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxseq.shapes import Array, Bool, Float, Int, known, typed
from jaxseq.sharded import sum_over_time


def with_sown(model: Any, params: Any, *inputs: Any, **options: Any) -> tuple[Any, Float[Array, ""]]:
    """`model.apply`, and the sum of what layers sow into the collection "losses", as selection and spans cost."""
    output, sown = model.apply(params, *inputs, mutable=["losses"], **options)
    return output, sum((jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(sown)), jnp.float32(0))


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
    metrics are `loss`, `accuracy` and, where `bytes_per_token` is given, `bits_per_byte`. Under `jit`, where targets
    are not known, one that counts and is beyond the vocabulary makes the loss NaN.

    Raises:
      ValueError: a target that counts is known to be beyond the vocabulary.
    """
    size = logits.shape[-1]
    beyond = (targets >= size) & (True if mask is None else mask.astype(bool))
    if (wrong := known(beyond)) is not None and wrong.any():
        raise ValueError(f"targets holds {targets[wrong].max()}; the vocabulary of logits is 0 to {size - 1}.")
    logits, mean = logits.astype(jnp.float32), _mean_where(targets, mask)
    index = jnp.maximum(targets, 0)
    # A sum over the vocabulary, not a gather: it stays in place where the mesh splits the vocabulary.
    here = index[..., None] == jax.lax.broadcasted_iota(index.dtype, logits.shape, logits.ndim - 1)
    chosen = jnp.sum(jnp.where(here, logits, 0), axis=-1)
    nats = jnp.where(beyond, jnp.nan, jax.nn.logsumexp(logits, axis=-1) - chosen)
    loss = mean(nats)
    right = (logits.argmax(axis=-1) == index).astype(jnp.float32)
    metrics = {"loss": loss, "accuracy": mean(right)}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = loss / (math.log(2) * bytes_per_token)
    return loss, metrics


@typed
def distillation(
    logits: Float[Array, "*B V"],
    teacher_logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    mask: Bool[Array, "*B"] | Float[Array, "*B"] | None = None,
    *,
    temperature: float = 2.0,
    alpha: float = 0.5,
    bytes_per_token: float | None = None,
) -> tuple[Float[Array, ""], dict]:
    """What a student loses to its teacher, and to the targets (arXiv 1503.02531).

        α T² KL(softmax(z_teacher / T) ‖ softmax(z / T)) + (1 − α) cross_entropy(z, targets)

    in nats, a mean over the positions that count, as in `cross_entropy`; with `alpha` 1 targets only tell which do. T²
    keeps the size of the gradient: for large T it is that of the squares of (z − z_teacher) / √2V, both of mean zero
    over the vocabulary V. The teacher has none. The metrics are those of `cross_entropy` but for `loss`, which is this
    one; `cross_entropy` and `divergence`, its parts.

    Raises:
      ValueError: `temperature` is not above 0, `alpha` is no share, or as `cross_entropy` does.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; distillation takes a number above 0.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it is the teacher's share of the loss, 0 to 1.")
    hard, metrics = cross_entropy(logits, targets, mask, bytes_per_token=bytes_per_token)
    softened = lambda z: jax.nn.log_softmax(z.astype(jnp.float32) / temperature, axis=-1)
    teacher, student = softened(jax.lax.stop_gradient(teacher_logits)), softened(logits)
    possible = teacher > -jnp.inf  # to the teacher: a vocabulary may be padded
    apart = jnp.where(possible, jnp.where(possible, teacher, 0) - jnp.where(possible, student, 0), 0)
    divergence = _mean_where(targets, mask)(jnp.sum(jnp.exp(teacher) * apart, axis=-1))
    loss = alpha * temperature**2 * divergence + (1 - alpha) * hard
    return loss, metrics | {"loss": loss, "cross_entropy": hard, "divergence": divergence}


def _mean_where(targets, mask):
    """The mean over the positions that count, of all devices."""
    weights = (targets >= 0 if mask is None else mask).astype(jnp.float32)
    total = jnp.maximum(sum_over_time(weights.sum()), 1e-9)
    return lambda x: sum_over_time((weights * x).sum()) / total
