"""How much a network's representation moves when it learns: rich where it does, lazy where it stays (2310.08513)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..exact import matmul
from ..shapes import Array, Float


def effective_rank(matrix: Float[np.ndarray, "N M"]) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007): r where r are equal, others 0.

    Raises:
      ValueError: the matrix is zero.
    """
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    if not values.sum() > 0:
        raise ValueError("matrix is zero; it has no effective rank.")
    share = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(share * np.log(share))))


def gram_alignment(before: Float[np.ndarray, "M M"], after: Float[np.ndarray, "M M"]) -> float:
    """⟨K, K'⟩ / (‖K‖ ‖K'‖), in float64: 1 where one is a multiple of the other. Not centred: it is no CKA.

    Raises:
      ValueError: shapes disagree, or a matrix is zero or not finite.
    """
    K, other = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if K.shape != other.shape:
        raise ValueError(f"before has shape {K.shape}, after {other.shape}; give both on the same probes.")
    norms = np.linalg.norm(K) * np.linalg.norm(other)
    if not (np.isfinite(norms) and norms > 0):
        raise ValueError(f"the norms' product is {norms}; alignment takes finite matrices that are not zero.")
    return float(np.sum(K * other) / norms)


def representation_alignment(before: Float[np.ndarray, "M N"], after: Float[np.ndarray, "M N"]) -> float:
    """Of the Gram matrices of M states, before and after training.

    Raises:
      ValueError: as `gram_alignment`, or shapes differ.
    """
    if np.shape(before) != np.shape(after):
        raise ValueError(
            f"before has shape {np.shape(before)}, after {np.shape(after)}; they are states of one network."
        )
    gram = lambda states: np.asarray(states, np.float64) @ np.asarray(states, np.float64).T
    return gram_alignment(gram(before), gram(after))


def tangent_kernel(
    outputs: Callable[[Any, Array], Array], params: Any, probes: Float[Array, "M ..."], select: str = ""
) -> Float[Array, "R R"]:
    """J Jᵀ of `outputs(params, probe)` in the parameters whose path holds `select`; inside `jit` too.

    J has a row for each entry of the outputs of one probe after the other. Probes are taken one at a time, as what one
    gives does not depend on the others: it costs a backward pass through one probe for each row.

    Raises:
      ValueError: no parameter has such a path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    chosen = {i: leaf for i, (path, leaf) in enumerate(leaves) if select in jax.tree_util.keystr(path)}
    if not chosen:
        names = ", ".join(jax.tree_util.keystr(path) for path, _ in leaves)
        raise ValueError(f"select={select!r} is in none of the paths {names}.")
    tree = jax.tree.structure(params)

    def of(chosen, probe):
        whole = jax.tree.unflatten(tree, [chosen.get(i, leaf) for i, (_, leaf) in enumerate(leaves)])
        return jnp.ravel(outputs(whole, probe))

    jacobian = jax.tree.leaves(jax.vmap(jax.jacrev(of), (None, 0))(chosen, probes))
    J = jnp.concatenate([part.reshape(part.shape[0] * part.shape[1], -1) for part in jacobian], axis=1)
    return matmul(J, J.T)


def kernel_alignment(
    outputs: Callable[[Any, Array], Array], before: Any, after: Any, probes: Float[Array, "M ..."], select: str = ""
) -> float:
    """Of the tangent kernels at two sets of parameters, by `gram_alignment`.

    Raises:
      ValueError: as `tangent_kernel` and `gram_alignment`.
    """
    before, after = (np.asarray(tangent_kernel(outputs, params, probes, select)) for params in (before, after))
    return gram_alignment(before, after)
