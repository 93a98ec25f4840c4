"""Pruning: a growing share of the weights is zero, those of the least magnitude or of the least movement.

Masks are trees of the parameters' structure, True where a weight stays, and None where none is ever pruned.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..shapes import Array, Bool, Float, Int
from ..train.paths import matching

#: What is pruned: the matrices of layers.
MATRICES = r"(^|/)kernel$"
SCORES = ("magnitude", "movement")
SCOPES = ("matrix", "array", "all")


class PruneState(NamedTuple):
    step: Int[Array, ""]  # steps taken
    dense: Any  # the weights behind the masks
    scores: Any  # by movement: −Σ w ∂L/∂w of all steps
    masks: Any
    optimizer: Any


def cubic_sparsity(final: float, steps: int, *, begin: int = 0) -> optax.Schedule:
    """The share pruned at step t: s_t = s_f (1 − (1 − t/T)³) over T = `steps` from `begin` on (arXiv 1710.01878).

    Raises:
      ValueError: `final` is outside [0, 1), or there is no step.
    """
    _check_share("final", final)
    if steps < 1 or begin < 0:
        raise ValueError(f"steps={steps} and begin={begin}; cubic_sparsity takes 1 or more, from 0 or later.")
    return lambda count: final * (1 - (1 - jnp.clip((count - begin) / steps, 0, 1)) ** 3)


def keep(scores: Any, sparsity: float | Float[Array, ""], *, scope: str = "matrix") -> Any:
    """Masks that leave out the share `sparsity` of least scores: of n numbers exactly round(n · sparsity), ties or not.

    They are counted in each `scope`: a "matrix", the last two axes of an array, which may hold one a layer; an "array";
    or "all" arrays together, so that some lose more than others. None is no score and has no mask.

    Raises:
      ValueError: `sparsity` is outside [0, 1), or `scope` is unknown.
    """
    if not isinstance(sparsity, jax.core.Tracer):
        _check_share("sparsity", float(sparsity))
    _check_one_of("scope", scope, SCOPES)
    leaves, structure = jax.tree.flatten(scores)
    if scope == "all":
        flat = _largest(jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in leaves])[None], sparsity)[0]
        ends = [sum(x.size for x in leaves[: i + 1]) for i in range(len(leaves))]
        parts = jnp.split(flat, ends[:-1])
    else:
        size = lambda x: x.size if scope == "array" else math.prod(x.shape[-2:])
        parts = [_largest(x.reshape(-1, size(x)), sparsity) for x in leaves]
    return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])


def _largest(scores: Float[Array, "S N"], sparsity) -> Bool[Array, "S N"]:
    """True for all of each row but the share of its least."""
    number = scores.shape[1]
    dropped = jnp.round(jnp.asarray(sparsity, jnp.float32) * number).astype(jnp.int32)
    places = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    order = jnp.argsort(scores, axis=1)
    row = jnp.zeros(number, bool)
    return jax.vmap(lambda order, kept: row.at[order].set(kept))(order, places >= dropped)


def masked(params: Any, masks: Any) -> Any:
    """Parameters times masks. The gradient is that at the masked ones, also where a mask is zero (straight-through).

    So a weight that is left out still learns, and may come back.
    """
    apply = lambda mask, x: x if mask is None else x + lax.stop_gradient(jnp.where(mask, x, 0) - x)
    return jax.tree.map(apply, masks, params, is_leaf=lambda x: x is None)


def pruned(
    optimizer: optax.GradientTransformation,
    sparsity: optax.Schedule,
    *,
    by: str = "magnitude",
    scope: str = "matrix",
    which: str = MATRICES,
    every: int = 1,
) -> optax.GradientTransformation:
    """`optimizer`, and after each step the share `sparsity(step)` of the weights whose paths match `which` is zero.

    Those of least score are, "magnitude" |w| or "movement" (arXiv 2005.07683)

        S = −Σ_t w_t ∂L/∂w_t

    which grows where steps lead away from zero. The parameters are masked ones; the optimizer moves the dense ones
    behind them, by the gradient at the masked ones (straight-through). Masks change `every` so many steps. Within a
    `scope`, as of `keep`, exactly the rounded share is zero.

    Raises:
      ValueError: `by` or `scope` is unknown, `every` is below 1, nothing matches, or no parameters are given.
    """
    _check_one_of("by", by, SCORES)
    _check_one_of("scope", scope, SCOPES)
    if every < 1:
        raise ValueError(f"every={every}; pruned takes 1 step or more.")

    def init(params):
        prunable = _prunable(params, which)
        zeros = _where(prunable, lambda x: jnp.zeros(x.shape, jnp.float32), params)
        masks = _where(prunable, lambda x: jnp.ones(x.shape, bool), params)
        # A copy: what trains in place gives the parameters' own memory away.
        dense = jax.tree.map(jnp.copy, params)
        scores = zeros if by == "movement" else None
        return PruneState(jnp.zeros((), jnp.int32), dense, scores, masks, optimizer.init(params))

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("params=None; a pruning optimizer is given the parameters.")
        step, prunable = state.step + 1, _prunable(params, which)
        updates, inner = optimizer.update(grads, state.optimizer, state.dense)
        dense = optax.apply_updates(state.dense, updates)
        if by == "movement":
            moved = lambda s, w, g: s - w.astype(s.dtype) * g.astype(s.dtype)
            scores = found = _where(prunable, moved, state.scores, state.dense, grads)
        else:
            scores, found = None, _where(prunable, jnp.abs, dense)
        share = jnp.asarray(sparsity(step), jnp.float32)
        masks = lax.cond(step % every == 0, lambda: keep(found, share, scope=scope), lambda: state.masks)
        new = jax.tree.map(lambda p, x: x - p, params, masked(dense, masks))
        return new, PruneState(step, dense, scores, masks, inner)

    return optax.GradientTransformation(init, update)


def sparsity_of(params: Any, which: str = MATRICES) -> float:
    """The share of zeros among the weights whose paths match `which`."""
    leaves = jax.tree.leaves(_where(_prunable(params, which), lambda x: x, params))
    return float(sum(jnp.sum(x == 0) for x in leaves)) / sum(x.size for x in leaves)


def _prunable(params: Any, which: str) -> Any:
    found = matching(which)(params)
    if not any(jax.tree.leaves(found)):
        raise ValueError(f"which={which!r} is found in no path of the parameters.")
    return found


def _where(prunable: Any, function, *trees: Any) -> Any:
    """The function of the leaves that can be pruned, None for the others."""
    return jax.tree.map(lambda yes, *x: function(*x) if yes else None, prunable, *trees)


def _check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"{name}={share}; a share of the weights is 0 or more and below 1.")


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}.")
