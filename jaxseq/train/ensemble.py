"""Models of one shape, trained at once and each as if alone: their parameters are stacked along a first axis."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def ensemble_init(init: Callable[[jax.Array], Any], count: int) -> Callable[[jax.Array], Any]:
    """`key -> parameters` of `count` stacked models, each of a key of its own, from that of one."""
    return lambda key: jax.vmap(init)(jax.random.split(key, count))


def ensemble_loss(loss: Callable, *own: Any) -> Callable:
    """The loss of stacked models from that of one, `loss(params, batch, key, *own) -> (scalar, metrics)`, for `fit`.

    All are given the batch, and each a key of its own, which a loss may draw its batch from, and its row of what `own`
    stacks. The scalar is the sum, so that gradients are each model's own; metrics, and what `fit` calls the loss, are
    means over the models.
    """

    def summed(params, batch, key):
        count = len(jax.tree.leaves(params)[0])
        values, metrics = jax.vmap(loss, (0, None, 0) + (0,) * len(own))(
            params, batch, jax.random.split(key, count), *own
        )
        return values.sum(), {"loss": values.mean()} | jax.tree.map(jnp.mean, metrics)

    return summed


def per_member(
    optimizer: optax.GradientTransformation | Sequence[optax.GradientTransformation],
) -> optax.GradientTransformation:
    """An optimizer of stacked models, each by itself: norms that it clips to, and projections, are of one model.

    Of several optimizers, as many as models, each has its own model, in their order.

    Raises:
      ValueError: there are not as many.
    """
    if isinstance(optimizer, optax.GradientTransformation):
        return optax.GradientTransformation(jax.vmap(optimizer.init), jax.vmap(optimizer.update))
    optimizers = tuple(optimizer)

    def init(params):
        if len(models := members(params)) != len(optimizers):
            raise ValueError(f"{len(optimizers)} optimizers for {len(models)} models; give as many, or one for all.")
        return tuple(each.init(model) for each, model in zip(optimizers, models, strict=True))

    def update(grads, states, params=None):
        models = [None] * len(optimizers) if params is None else members(params)
        given = zip(optimizers, members(grads), states, models, strict=True)
        updates, states = zip(*(each.update(*own) for each, *own in given), strict=True)
        return stacked(updates), states

    return optax.GradientTransformation(init, update)


def stacked(models: Sequence[Any]) -> Any:
    """The parameters of models, one after the other along a first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


def members(params: Any) -> list[Any]:
    """The parameters of each of stacked models."""
    return [jax.tree.map(lambda x, n=n: x[n], params) for n in range(len(jax.tree.leaves(params)[0]))]
