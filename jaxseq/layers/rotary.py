"""Rotary position embedding."""

import jax.numpy as jnp

from ..shapes import Array, Float, Int, accumulator, typed


@typed
def rotary(x: Float[Array, "B T H K"], positions: Int[Array, "T"], base: float = 10000.0) -> Float[Array, "B T H K"]:
    """Rotate channel pairs (i, i + K/2) by position · base^(−2i/K) radians (RoFormer, arXiv 2104.09864, eq. 15).

    Raises:
      ValueError: K is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"x has head width {width}; rotary takes an even one.")
    dtype = accumulator(x.dtype)
    frequencies = base ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = positions.astype(dtype)[:, None, None] * frequencies[None, None]
    a, b = jnp.split(x.astype(dtype), 2, axis=-1)
    cos, sin = jnp.cos(angles)[None], jnp.sin(angles)[None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
