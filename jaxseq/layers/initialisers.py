"""How state spaces and decays start: eigenvalues, input vectors, step sizes. Computed on the host, in float64."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import accumulator
from .hippo import clipped, eigenbasis, hippo


@cache
def diagonal_plus_low_rank(measure: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A HiPPO matrix in the eigenbasis of its normal part: one of each pair of Λ, P `R N/2` and V*B, `clipped`."""
    A, B, P = hippo(measure, size)
    eigenvalues, V = eigenbasis(A, P)
    return eigenvalues, P @ V.conj(), clipped(V.conj().T @ B)


#: Imaginary parts of S4D's starts, by the number n of a state, a whole one or one drawn, and N.
S4D_FREQUENCIES: dict[str, Callable] = {
    "inv": lambda n, size: size / np.pi * (size / (2 * n + 1) - 1),
    "lin": lambda n, size: np.pi * n,
    "quad": lambda n, size: (2 * n + 1) ** 2 / np.pi,
}
S4D_INITIALISATIONS = ("legs", "fout", *S4D_FREQUENCIES, "real", "random")


@cache
def s4d_eigenvalues(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) `N/2` of one copy, one state of each conjugate pair (S4D, arXiv 2206.11893, section 4.3).

    The imaginary parts of "random" are drawn by the layer, log-normal.
    """
    n = np.arange(size // 2)
    if name in ("legs", "fout"):
        return diagonal_plus_low_rank(name, size)[::2]
    real = -(n + 1.0) if name == "real" else -0.5 * np.ones_like(n)
    imaginary = S4D_FREQUENCIES[name](n, size) if name in S4D_FREQUENCIES else 0.0 * n
    return real - 1j * imaginary, np.ones(n.shape, complex)


def log_uniform(low: float, high: float):
    """An initialiser: log of a step size drawn between `low` and `high`, uniform in the log."""

    def initialise(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, np.log(low), np.log(high))

    return initialise


def symmetric_uniform(bound: float):
    """An initialiser: uniform between −bound and bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def inverse_softplus(x):
    return x + jnp.log(-jnp.expm1(-x))


def step_size_bias(low: float, high: float):
    """An initialiser: what softplus takes to step sizes log-uniform between `low` and `high`, 1e-4 at least."""

    def initialise(key, shape, dtype=jnp.float32):
        return inverse_softplus(jnp.maximum(jnp.exp(log_uniform(low, high)(key, shape, dtype)), 1e-4))

    return initialise


def log_of_uniform(low: float, high: float):
    """An initialiser: log of a number drawn uniform between `low` and `high`, above 0."""

    def initialise(key, shape, dtype=jnp.float32):
        return jnp.log(jnp.maximum(jax.random.uniform(key, shape, dtype, low, high), 1e-4))

    return initialise


def drawn_wide(base: Callable):
    """An initialiser: what `base` draws in at least float32, rounded: matrix factors are of no narrower numbers."""

    def initialise(key, shape, dtype=jnp.float32):
        drawn = base(key, shape, accumulator(dtype))
        return drawn if dtype == accumulator(dtype) else drawn.astype(dtype)

    return initialise


def low_rank(base: Callable, rank: int):
    """An initialiser: what `base` draws, cut to its `rank` largest singular values, at its Frobenius norm.

    So that rank is not size (arXiv 2310.08513).

    Raises:
      ValueError: the shape is no matrix, or `rank` is not from 1 to its smaller side.
    """

    def initialise(key, shape, dtype=jnp.float32):
        if len(shape) != 2 or not 1 <= rank <= min(shape):
            raise ValueError(f"rank={rank}; of a matrix of shape {tuple(shape)} it is 1 to {min(shape)}.")
        U, values, V = jnp.linalg.svd(base(key, shape, dtype), full_matrices=False)
        scale = jnp.linalg.norm(values) / jnp.linalg.norm(values[:rank])
        return (scale * U[:, :rank] * values[None, :rank]) @ V[:rank]

    return drawn_wide(initialise)
