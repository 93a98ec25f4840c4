"""Dense layers by rows are flax's own."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from families import assert_close

from jaxseq.layers.projection import Dense


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 3, 4)], ids=str)
def test_a_dense_layer_by_rows_is_a_dense_layer(shape):
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal(shape), jax.numpy.float32)
    params = nn.Dense(5).init(jax.random.key(0), x)

    def with_slopes(layer):
        y, pull = jax.vjp(layer.apply, params, x)
        return y, pull(jax.numpy.sin(y))

    actual, expected = with_slopes(Dense(5)), with_slopes(nn.Dense(5))
    assert jax.tree.map(jax.numpy.shape, actual) == jax.tree.map(jax.numpy.shape, expected)
    assert_close(actual, expected, "mixer")
