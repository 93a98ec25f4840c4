"""Draw a token from logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, Int, typed


class Sampling(NamedTuple):
    """How tokens are drawn. Temperature 0 takes the likeliest; top_k 0 and top_p 1 leave nothing out."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def checked(self) -> "Sampling":
        allowed = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0 and self.top_k == int(self.top_k), "0 (all tokens) or more, whole numbers"),
            "top_p": (0 < self.top_p <= 1, "a share in (0, 1]"),
        }
        for name, (holds, rule) in allowed.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}; sampling takes {rule}.")
        return Sampling(float(self.temperature), int(self.top_k), float(self.top_p))  # hashable, whatever they came as


@typed
def sample(key: Array, logits: Float[Array, "B vocabulary"], sampling: Sampling) -> Int[Array, "B"]:
    """One token a row: among the `top_k` likeliest, and the fewest that together hold `top_p` of the probability
    (nucleus sampling, arXiv 1904.09751), from the softmax of logits / temperature."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the likeliest, so that no temperature makes an infinite one of it.
    tiny = float(jnp.finfo(jnp.float32).tiny)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / max(sampling.temperature, tiny)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = jnp.arange(logits.shape[-1]) < sampling.top_k
        ordered = jnp.where(kept[None], ordered, -jnp.inf)
    if sampling.top_p < 1:
        probability = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        ordered = jnp.where(before < sampling.top_p, ordered, -jnp.inf)
    least = jnp.min(jnp.where(jnp.isfinite(ordered), ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= least, logits, -jnp.inf), axis=-1).astype(jnp.int32)
