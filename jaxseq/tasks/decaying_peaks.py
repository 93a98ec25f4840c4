"""Peaks of energy that decay: a convex function of all inputs so far."""

import jax
import jax.numpy as jnp

from ..shapes import Array, Float
from .draws import require


def decaying_peaks(
    key: Array, *, num_examples: int, length: int = 10, channels: int = 3
) -> tuple[Float[Array, "N T C"], Float[Array, "N T 1"]]:
    """`(inputs, targets)`: x uniform in [−1, 1], and 2 s of s_t = max(0.8 s_{t-1}, ¼ mean x_t²), convex in all of x.

    Raises:
      ValueError: a number is below 1.
    """
    require("decaying_peaks", {}, num_examples=num_examples, length=length, channels=channels)
    x = jax.random.uniform(key, (num_examples, length, channels), minval=-1.0)

    def step(s, x):
        s = jnp.maximum(0.8 * s, jnp.mean(x**2, axis=-1) / 4)
        return s, s

    peaks = jax.lax.scan(step, jnp.zeros(num_examples, x.dtype), x.swapaxes(0, 1))[1]
    return x, 2 * peaks.swapaxes(0, 1)[:, :, None]
