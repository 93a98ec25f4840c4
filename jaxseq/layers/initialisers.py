"""How state spaces and decays start: eigenvalues, input vectors, step sizes. Computed on the host, in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def hippo_legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS: the matrix A `N N` and vector B `N` (S4, arXiv 2111.00396, eq. 2)."""
    root = np.sqrt(2 * np.arange(size) + 1.0)
    A = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(size) + 1.0)
    return A, root


def legs_diagonal(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The normal part of HiPPO-LegS in its eigenbasis: the half of (eigenvalues, V*B) with negative imaginary part.

    A + PPᵀ = −I/2 + a skew matrix; the real parts are the mean diagonal, the imaginary parts come from a Hermitian
    eigenproblem. The imaginary part of V*B is clipped to ±2, as in the authors' code (their theory would halve B).
    """
    A, B = hippo_legs(size)
    P = np.sqrt(np.arange(size) + 0.5)
    normal = A + np.outer(P, P)
    frequencies, V = np.linalg.eigh(-1j * (normal - np.diag(np.diag(normal))))
    half = slice(0, size // 2)  # ascending: the negative ones first
    VB = V.conj().T @ B
    return np.mean(np.diag(normal)) + 1j * frequencies[half], VB.real[half] + 1j * np.clip(VB.imag[half], -2, 2)


def s4d_eigenvalues(name: str, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) `N/2` of one copy, one state of each conjugate pair (S4D, arXiv 2206.11893, section 4.3)."""
    n = np.arange(size // 2)
    if name == "legs":
        return legs_diagonal(size)
    real, imaginary = {
        "inv": (-0.5 * np.ones_like(n), size / np.pi * (size / (2 * n + 1) - 1)),
        "lin": (-0.5 * np.ones_like(n), np.pi * n),
        "quad": (-0.5 * np.ones_like(n), (2 * n + 1) ** 2 / np.pi),
        "real": (-(n + 1.0), 0.0 * n),
        "random": (-0.5 * np.ones_like(n), np.exp(rng.standard_normal(n.shape))),
    }[name]
    return real - 1j * imaginary, np.ones(n.shape, complex)


S4D_INITIALISATIONS = ("legs", "inv", "lin", "quad", "real", "random")


def log_uniform(low: float, high: float):
    """An initialiser: log of a step size drawn between `low` and `high`, uniform in the log."""

    def initialise(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, np.log(low), np.log(high))

    return initialise


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
