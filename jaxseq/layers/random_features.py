"""Random features φ with E φ(q)·φ(k) = exp(q·k / √K): a softmax's weights as a product of vectors.

All take heads `B T H K` and a projection `M K`, whose rows w_r are drawn by `orthogonal_features`, and scale x to
x' = x K^-¼ first.
"""

import jax
import jax.numpy as jnp

from ..shapes import Array, Float, typed

NORMS = ("chi", "constant")


def orthogonal_features(key: Array, number: int, width: int, *, norms: str = "chi") -> Float[Array, "M K"]:
    """Rows of which each K after one another are orthogonal (Performer, arXiv 2009.14794, section 2.4).

    Their `norms` are those of Gaussian vectors, so that each row by itself is one, or the "constant" √K.

    Raises:
      ValueError: `number` is below 1, or `norms` is unknown.
    """
    if number < 1:
        raise ValueError(f"num_features={number}; random features are 1 or more.")
    if norms not in NORMS:
        raise ValueError(f"norms={norms!r}; choose one of {', '.join(NORMS)}.")
    k_blocks, k_norms = jax.random.split(key)
    # Of the Haar measure: the Q of a QR alone has signs of its own, and features of it a bias.
    rows = jax.random.orthogonal(k_blocks, width, (-(-number // width),)).reshape(-1, width)[:number]
    if norms == "constant":
        return rows * width**0.5
    return rows * jnp.linalg.norm(jax.random.normal(k_norms, (number, width)), axis=1, keepdims=True)


@typed
def log_positive_features(x: Float[Array, "B T H K"], projection: Float[Array, "M K"]) -> Float[Array, "B T H M"]:
    """log φ for φ_r = M^-½ exp(w_r·x' − |x'|²/2) (FAVOR+, lemma 1)."""
    projected, x = _projected(x, projection)
    return projected - jnp.sum(x**2, axis=-1, keepdims=True) / 2 - jnp.log(projection.shape[0]) / 2


@typed
def positive_features(
    x: Float[Array, "B T H K"], projection: Float[Array, "M K"], *, of_keys: bool, epsilon: float = 1e-4
) -> Float[Array, "B T H M"]:
    """The features as the authors compute them: over the largest, and never zero.

        φ_r = M^-½ (exp(w_r·x' − |x'|²/2 − max w·x') + ε)

    The maximum is over the features of a query, and over those of all keys of a head: there what comes later changes
    what was before, so nothing causal may be made of it. `Performer` keeps logs instead.
    """
    projected, x = _projected(x, projection)
    largest = jnp.max(projected, axis=(1, 3) if of_keys else 3, keepdims=True)
    exponent = projected - jnp.sum(x**2, axis=-1, keepdims=True) / 2 - jax.lax.stop_gradient(largest)
    return (jnp.exp(exponent) + epsilon) / projection.shape[0] ** 0.5


@typed
def trigonometric_features(x: Float[Array, "B T H K"], projection: Float[Array, "M K"]) -> Float[Array, "B T H 2*M"]:
    """M^-½ exp(|x'|²/2) [sin w·x', cos w·x']: as unbiased, but of a variance that explodes where weights are small."""
    projected, x = _projected(x, projection)
    waves = jnp.concatenate([jnp.sin(projected), jnp.cos(projected)], axis=-1)
    return jnp.exp(jnp.sum(x**2, axis=-1, keepdims=True) / 2) * waves / projection.shape[0] ** 0.5


@typed
def relu_features(
    x: Float[Array, "B T H K"], projection: Float[Array, "M K"], epsilon: float = 1e-3
) -> Float[Array, "B T H M"]:
    """relu(w x') + ε: no softmax's weights, but of as much use on many tasks (section 4.2)."""
    return jnp.maximum(_projected(x, projection)[0], 0) + epsilon


def _projected(x, projection):
    x = x * x.shape[-1] ** -0.25
    return jnp.einsum("bthk,mk->bthm", x, projection), x
