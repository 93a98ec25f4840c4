"""Attention of all tokens to all: by blocks where nothing is dropped, and what dropping leaves in the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import random_params

from jaxseq.layers.self_attention import SelfAttention


def made(length: int, **fields):
    module = SelfAttention(8, num_heads=2, **fields)
    x = jax.random.normal(jax.random.key(0), (1, length, 8))
    return module, random_params(module, x), x


def test_no_square_is_kept_where_nothing_is_dropped():
    module, params, x = made(4096)
    loss = lambda params, x: jnp.sum(module.apply(params, x) ** 2)
    memory = jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 * 4  # one head's weights


def test_dropping_keeps_the_mean():
    """Of weights, and then of outputs: both are linear in what is kept. A share of 0 drops nothing."""
    module, params, x = made(5, dropout=0.4)
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.jit(jax.vmap(lambda key: module.apply(params, x, rngs={"dropout": key})))(keys)
    deviation = np.asarray(drawn.std(axis=0)) / len(keys) ** 0.5
    whole = module.apply(params, x)
    assert (np.abs(np.asarray(drawn.mean(axis=0) - whole)) <= 5 * deviation + 1e-6).all() and deviation.max() > 0
    none = SelfAttention(8, num_heads=2).apply(params, x, rngs={"dropout": keys[0]})
    np.testing.assert_array_equal(none, whole)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_segments_are_apart(dropout):
    """Also where weights are dropped, which is another way to compute them."""
    module, params, x = made(6, dropout=dropout)
    ids, rngs = jnp.asarray([[0, 0, 0, 1, 1, 1]]), {"dropout": jax.random.key(3)}
    later = lambda x: module.apply(params, x, ids, rngs=rngs)[:, 3:].sum()
    slope = jax.jit(jax.grad(later))(x)
    assert (slope[:, :3] == 0).all() and (slope[:, 3:] != 0).any()
    if dropout == 0:
        apply = jax.jit(module.apply)
        alone = [apply(params, part) for part in (x[:, :3], x[:, 3:])]
        np.testing.assert_allclose(apply(params, x, ids), np.concatenate(alone, axis=1), atol=1e-6)


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="num_heads=3 does not divide d_model=8"):
        SelfAttention(8, num_heads=3).init(jax.random.key(0), jnp.zeros((1, 2, 8)))
