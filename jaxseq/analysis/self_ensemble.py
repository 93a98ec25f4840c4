"""A model with randomness inside, averaged over several draws of it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def self_ensemble(apply: Callable[[jax.Array], jax.Array], key: jax.Array, size: int) -> jax.Array:
    """log (1/E) Σ_e softmax(apply(key_e)): logarithms of the averaged probabilities of `size` E passes.

    `apply` gives logits `… V` for a key, as `lambda key: model.apply(params, tokens, rngs={"subsample": key})`. The
    result can stand where logits do. Averaged logits would be another model (arXiv 2306.01705). Passes run one after
    another, so memory does not grow with E.

    Raises:
      ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"size={size}; self_ensemble takes 1 or more.")
    passed = lambda key: jax.nn.log_softmax(apply(key).astype(jnp.float32), axis=-1)
    keys = jax.random.split(key, size)
    add = lambda total, key: (jnp.logaddexp(total, passed(key)), None)
    total, _ = lax.scan(add, passed(keys[0]), keys[1:])
    return total - jnp.log(size)
