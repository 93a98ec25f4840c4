"""Synthetic tasks are what they say."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxseq.tasks import reset_recall


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


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="num_keys=0; reset_recall takes 1 or more"):
        reset_recall(jax.random.key(0), num_examples=1, num_keys=0)
    with pytest.raises(ValueError, match="reset=2; reset_recall takes a probability"):
        reset_recall(jax.random.key(0), num_examples=1, reset=2)
