"""A prediction at every step: in parts and by steps, with padding behind, of any mixers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import assert_close, random_params

from jaxseq import GLA
from jaxseq.models import Forecaster, SequenceForecaster, SequenceRegressor

MODEL = SequenceRegressor(2, 8, (partial(GLA, num_heads=2),) * 2)
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 9, 4)), jnp.float32)


def test_the_whole_is_its_parts_and_its_steps():
    params = random_params(MODEL, X)
    whole = jax.jit(MODEL.apply)(params, X)
    assert whole.shape == (3, 9, 2)

    @jax.jit
    def decoded(params, x):
        first, states = MODEL.apply(params, x[:, :4], MODEL.init_state(3), method="prefill")
        step = lambda states, x: MODEL.apply(params, x, states, method="step")[::-1]
        return jnp.concatenate([first, jax.lax.scan(step, states, x[:, 4:].swapaxes(0, 1))[1].swapaxes(0, 1)], axis=1)

    assert_close(decoded(params, X), whole, "mixer")


def test_padding_and_segments():
    params = random_params(MODEL, X)
    run, lengths = jax.jit(MODEL.apply), jnp.asarray([5, 9, 9])
    assert_close(run(params, X.at[0, 5:].set(7.0), None, lengths)[0, :5], run(params, X)[0, :5], "mixer")
    packed = run(params, X, jnp.asarray([[0] * 4 + [1] * 5] * 3))
    assert_close(packed[:, 4:], run(params, X[:, 4:]), "mixer")


def test_names():
    assert Forecaster is SequenceForecaster
    with pytest.raises(ValueError, match="outputs=0 must be at least 1"):
        jax.eval_shape(MODEL.clone(outputs=0).init, jax.random.key(0), X)
