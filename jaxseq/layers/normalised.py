"""Vectors of length one."""

import jax
import jax.numpy as jnp

from ..shapes import accumulator


def unit(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / √(Σ x² + ε) over the last axis, computed in at least float32; zeros stay zeros, with a gradient."""
    wide = x.astype(accumulator(x.dtype))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, axis=-1, keepdims=True) + epsilon)).astype(x.dtype)
