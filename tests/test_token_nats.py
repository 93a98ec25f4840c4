"""Nats of every token, a batch at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.analysis import TokenNats

rows = np.random.default_rng(0).integers(0, 5, (7, 4))


def test_nats_are_those_of_all_rows_at_once():
    table = jax.random.normal(jax.random.key(0), (5, 5))
    found = TokenNats(lambda params, inputs, key: params[inputs], batch_size=3)(table, rows, rows[::-1])
    expected = -np.asarray(jax.nn.log_softmax(table))[rows, rows[::-1]]
    assert found.shape == rows.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_every_batch_draws_its_own():
    noise = lambda params, inputs, key: jax.random.normal(key, (*inputs.shape, 5))
    score, same = TokenNats(noise, batch_size=3), np.zeros((6, 4), int)
    first, second = np.split(score(None, same, same), 2)
    assert np.all(first != second)
    np.testing.assert_array_equal(score(None, same, same)[:3], first)
    assert np.all(score(None, same, same, jax.random.key(1))[:3] != first)


def test_what_is_no_rows_of_tokens_is_refused():
    with pytest.raises(ValueError, match="batch_size=0; TokenNats takes 1 or more"):
        TokenNats(lambda *x: jnp.zeros(1), batch_size=0)
    score = TokenNats(lambda params, inputs, key: jnp.zeros((*inputs.shape, 5)))
    for targets in (rows[:, 1:], rows[:0]):
        with pytest.raises(ValueError, match="they agree, and have rows"):
            score(None, rows if targets.size else targets, targets)
