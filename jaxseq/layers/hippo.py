"""HiPPO matrices, and the eigenbasis of their normal part. Computed on the host, in float64."""

import numpy as np

MEASURES = ("legs", "legt", "lagt", "fout")


def hippo(measure: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A `N N`, B `N`, and the low rank P `R N` for which A + Σ P Pᵀ is a multiple of I plus a skew matrix.

    Scaled Legendre, translated Legendre, translated Laguerre and truncated Fourier (HiPPO, arXiv 2008.07669; S4,
    arXiv 2111.00396, theorem 1; arXiv 2206.12037, section 3 for the Fourier one). The translated Legendre has rank 2.
    """
    n = np.arange(size)
    root = np.sqrt(2 * n + 1.0)
    if measure == "legs":
        return -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0), root, root[None] / np.sqrt(2)
    if measure == "legt":
        sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1)
        halves = np.stack([root * (n % 2 == 0), root * (n % 2 == 1)])
        return -0.5 * np.outer(root, root) * sign, 0.5 * root, halves / np.sqrt(2)
    if measure == "lagt":
        return -np.tril(np.ones((size, size)), -1) - np.eye(size) / 2, np.ones(size), np.full((1, size), 0.5**0.5)
    if measure == "fout":
        frequencies = np.stack([np.zeros(size // 2), np.arange(size // 2)], axis=1).reshape(-1)[1:]
        B = np.where(n % 2 == 0, np.sqrt(2), 0)
        B[0] = 1
        return np.pi * (np.diag(frequencies, -1) - np.diag(frequencies, 1)) - np.outer(B, B), B, B[None]
    raise ValueError(f"measure={measure!r}; choose one of {', '.join(MEASURES)}.")


def eigenbasis(A: np.ndarray, P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One eigenvalue of A + Σ P Pᵀ of each pair, the negative imaginary part, `N/2`, and its vectors `N N/2`.

    The real parts are the mean diagonal, the imaginary ones come from a Hermitian eigenproblem.
    """
    half = slice(0, len(A) // 2)  # ascending: the negative ones first
    normal = A + P.T @ P
    frequencies, V = np.linalg.eigh(-1j * (normal - normal.T) / 2)
    null = np.abs(frequencies) < 1e-6
    if null.sum() == 2:  # two real vectors, of which the half has to hold a pair's one
        a, b = np.linalg.svd(normal - normal.T)[2][-2:]
        V[:, null] = np.stack([a + 1j * b, a - 1j * b], axis=1) / np.sqrt(2)
        frequencies[null] = 0
    return np.mean(np.diag(normal)) + 1j * frequencies[half], V[:, half]


def clipped(B: np.ndarray) -> np.ndarray:
    """V*B with imaginary parts in ±2, as the authors' code starts S4 and S4D (their theory would halve it)."""
    return B.real + 1j * np.clip(B.imag, -2, 2)
