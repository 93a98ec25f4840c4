"""Waves that tell positions apart."""

import jax.numpy as jnp

from ..shapes import Array, Float
from ..sharded import first_position


def sinusoids(length: int, width: int, base: float = 10000.0) -> Float[Array, "T D"]:
    """sin and cos of t base^(−2i/D), i = 0 … ⌈D/2⌉ − 1, side by side, of positions t (1706.03762, section 3.5)."""
    t = (first_position(length) + jnp.arange(length, dtype=jnp.int32)).astype(jnp.float32)
    pairs = -(-width // 2)
    angle = t[:, None] * base ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :width]
