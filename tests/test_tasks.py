"""Synthetic tasks are what they say."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxseq.tasks import drawn_anew, reset_recall, selective_copying, variate_chain


def test_reset_recall_asks_for_what_can_be_known():
    draw = jax.jit(partial(reset_recall, num_examples=200, length=64, num_keys=8, num_values=8))
    inputs, labels = jax.device_get(draw(jax.random.key(0)))
    asked = np.zeros(labels.shape, bool)
    for row, tokens in enumerate(inputs):
        values: dict[int, int] = {}
        for t, token in enumerate(tokens.tolist()):
            if token == 72:
                values = {}
            elif token < 64:
                which, value = divmod(token, 8)
                assert values.setdefault(which, value) == value
            else:
                asked[row, t] = True
                assert labels[row, t] == values[token - 64]
    assert (asked == (labels != -100)).all()
    assert abs((inputs == 72).mean() - 1 / 24) < 0.005 and 0.2 < asked.mean() < 0.45
    assert np.array_equal(draw(jax.random.key(0))[0], inputs) and (draw(jax.random.key(1))[0] != inputs).any()


@pytest.mark.parametrize("delay", [1, 3])
def test_a_chain_is_known_from_the_variate_before(delay):
    x = np.asarray(variate_chain(jax.random.key(0), num_examples=200, length=40, num_variates=5, delay=delay))
    assert x.shape == (200, 40, 5)
    before, after = x[:, :-delay, :-1], x[:, delay:, 1:]
    np.testing.assert_allclose(np.mean((after - 0.95 * before) ** 2, axis=(0, 1)), 0.09, rtol=0.1)
    np.testing.assert_allclose(x.var(axis=(0, 1)), [1, 0.9925, 0.986, 0.98, 0.974], rtol=0.05)
    itself = [abs(np.corrcoef(x[:, :-n].ravel(), x[:, n:].ravel())[0, 1]) for n in (1, delay)]
    assert max(itself) < 0.03
    assert np.ptp(x[:, 0].var(axis=0)) < 0.5  # from the first step on


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="num_keys=0; reset_recall takes 1 or more"):
        reset_recall(jax.random.key(0), num_examples=1, num_keys=0)
    with pytest.raises(ValueError, match="reset=2; reset_recall takes a probability"):
        reset_recall(jax.random.key(0), num_examples=1, reset=2)
    with pytest.raises(ValueError, match="delay=0; variate_chain takes 1 or more"):
        variate_chain(jax.random.key(0), num_examples=1, delay=0)


def test_examples_that_are_drawn_anew():
    """Other ones for each step and for the test, the same for the same step, as one call of the task makes them."""
    task = partial(selective_copying, length=15, num_tokens=3)
    (batches, test), (again, _) = (drawn_anew(task, seed, 4, 6) for seed in (0, 0))
    assert test["inputs"].shape == (6, 15) and batches(7)["labels"].shape == (4, 15)
    jax.tree.map(np.testing.assert_array_equal, batches(7), again(7))
    other = [batches(8)["inputs"], drawn_anew(task, 1, 4, 6)[0](7)["inputs"], test["inputs"][:4]]
    assert all((rows != batches(7)["inputs"]).any() for rows in other)
