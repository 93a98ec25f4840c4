"""Each series of a window by its own scale."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, accumulator


def instance_normalised(
    x: Float[Array, "B T V"], *, epsilon: float = 1e-5
) -> tuple[Float[Array, "B T V"], Callable[[Array], Array]]:
    """Every sequence and variate with mean 0 and variance 1 over time, and the map that undoes it.

        x' = (x − μ) / √(mean_t (x_t − μ)² + ε)        y ↦ y √(…) + μ

    μ has no gradient (iTransformer, arXiv 2310.06625). A series that never changes is divided by √ε.
    """
    wide = x.astype(accumulator(x.dtype))
    mean = jax.lax.stop_gradient(wide.mean(axis=1, keepdims=True))
    scale = jnp.sqrt(jnp.mean((wide - mean) ** 2, axis=1, keepdims=True) + epsilon)
    return ((wide - mean) / scale).astype(x.dtype), lambda y: y * scale.astype(y.dtype) + mean.astype(y.dtype)
