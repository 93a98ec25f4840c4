"""A sensor that drifts and vibrates, and the motion to be read from it."""

import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import Array, Float
from .draws import require


def drifting_sensor(
    key: Array,
    *,
    num_examples: int,
    length: int = 400,
    chunk: int = 10,
    num_channels: int = 6,
    smoothness: int = 25,
    vibration: float = 1.0,
    noise: float = 0.3,
) -> tuple[Float[Array, "N T 2*C"], Float[Array, "N T/k 2"]]:
    """`(inputs, targets)`: C channels and their first differences, and the mean velocity of each chunk of k samples.

        x = tanh(v A) (1 + tanh(d) / 2) + d + vibration sin(ω t + φ) + noise ε

    v is a velocity in the plane, white noise behind two running means over `smoothness` samples, of variance 1; A a map
    that is always the same; d a random walk a channel that ends with variance 1; ω is drawn in [0.6, 2.6] for each
    sequence. To guess 0 costs a mean squared error just below 1. In little what the sensors of CSP-Bench do
    (arXiv 2402.10211).

    Raises:
      ValueError: a number is too small, or `length` is no whole number of chunks.
    """
    sizes = dict(num_examples=num_examples, length=length, chunk=chunk, num_channels=num_channels)
    require("drifting_sensor", {}, **sizes, smoothness=smoothness)
    if length % chunk:
        raise ValueError(f"length={length} is no multiple of chunk={chunk}.")
    keys = jax.random.split(key, 5)
    box = np.ones(smoothness)
    means = np.convolve(box, box)
    kernel = jnp.asarray(means / np.sqrt(np.sum(means**2)), jnp.float32)
    white = jax.random.normal(keys[0], (num_examples, 2, length + len(kernel) - 1))
    smooth = jax.vmap(jax.vmap(lambda row: jnp.convolve(row, kernel, mode="valid")))
    v = smooth(white).swapaxes(1, 2)
    A = jnp.asarray(np.random.default_rng(0).standard_normal((2, num_channels)), jnp.float32)
    shape = (num_examples, length, num_channels)
    drift = jnp.cumsum(jax.random.normal(keys[1], shape), axis=1) / length**0.5
    rate = jax.random.uniform(keys[2], (num_examples, 1, 1), minval=0.6, maxval=2.6)
    phase = jax.random.uniform(keys[3], (num_examples, 1, num_channels), maxval=2 * np.pi)
    time = jnp.arange(length, dtype=jnp.float32)[None, :, None]
    x = jnp.tanh(v @ A) * (1 + jnp.tanh(drift) / 2) + drift
    x += vibration * jnp.sin(rate * time + phase) + noise * jax.random.normal(keys[4], shape)
    differences = jnp.diff(x, axis=1, prepend=x[:, :1])
    return jnp.concatenate([x, differences], axis=2), v.reshape(num_examples, -1, chunk, 2).mean(axis=2)
