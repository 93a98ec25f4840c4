"""What is divided by its size: vectors, and sums over the past."""

import jax
import jax.numpy as jnp

from .. import ops
from ..shapes import accumulator


def unit(x: jax.Array, epsilon: float = 1e-6, least: float | None = None) -> jax.Array:
    """x / √(Σ x² + ε) over the last axis, in at least float32; or x / max(‖x‖, least).

    Zeros stay zeros, with a gradient.
    """
    wide = x.astype(accumulator(x.dtype))
    square = jnp.sum(wide**2, axis=-1, keepdims=True)
    square = square + epsilon if least is None else jnp.maximum(square, least**2)
    return (wide * jax.lax.rsqrt(square)).astype(x.dtype)


def with_ones(value: jax.Array) -> jax.Array:
    """Values and, beside them, a one: its read-out is the sum of the weights."""
    return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def normalised_attention(query, key, value, *, epsilon: float, **options) -> tuple[jax.Array, jax.Array]:
    """`ops.gated_linear_attention` as a mean: Σ_s w_ts v_s / (Σ_s w_ts + ε).

    The denominator is one more value, of ones, through the same op: its state `B H K V+1` has it in the last column.
    """
    o, state = ops.gated_linear_attention(query, key, with_ones(value), **options)
    wide = o.astype(accumulator(o.dtype))
    return (wide[..., :-1] / (wide[..., -1:] + epsilon)).astype(o.dtype), state
