"""Any causal mixer, in both directions of time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FULL_MIXERS, MIXERS, assert_close, random_params
from sampled import by_default

from jaxseq import GLA, Classifier, LanguageModel
from jaxseq.layers import Bidirectional

WIDTH = 8
gla = partial(GLA, num_heads=2)


def draw(length, batch=2):
    return jnp.asarray(np.random.default_rng(0).standard_normal((batch, length, WIDTH)), jnp.float32)


@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", by_default(["LSTM", "Attention"], [p.values[0] for p in FULL_MIXERS]))
def test_each_direction_is_the_mixer(name, shared):
    """Also of packed sequences."""
    mixer, x, ids = MIXERS[name].build(), draw(9), jnp.asarray([[3] * 4 + [1] * 5, [2] * 9])
    module = Bidirectional(WIDTH, lambda d_model, **names: MIXERS[name].build(**names), shared=shared)
    params = random_params(module, x)
    own = params["params"]
    assert set(own) == ({"forwards"} if shared else {"forwards", "backwards"})

    @jax.jit
    def both(params, x):
        once = lambda way, x, ids: mixer.apply({"params": params["params"][way]}, x, ids)
        turned = once("forwards" if shared else "backwards", x[:, ::-1], ids[:, ::-1])[:, ::-1]
        return module.apply(params, x, ids), once("forwards", x, ids) + turned

    assert_close(*both(params, x), "mixer")


def test_every_token_sees_its_segment_and_no_other():
    module, x = Bidirectional(WIDTH, gla), draw(9, batch=1)
    params = random_params(module, x)
    ids = jnp.asarray([[3, 3, 3, 3, 1, 1, 2, 2, 2]])
    jacobian = jax.jit(jax.jacrev(lambda x: module.apply(params, x, ids)[0].sum(-1)))(x)[:, 0]
    size = np.abs(np.asarray(jacobian)).max(-1)
    depends = size > 1e-5 * size.max()  # the gradient of decays is a sum that cancels up to rounding
    np.testing.assert_array_equal(depends, np.asarray(ids[0][:, None] == ids[0][None]))


def test_a_classifier_takes_it_and_a_language_model_does_not():
    slot = partial(Bidirectional, mixer=gla)
    model = Classifier(3, WIDTH, mixers=(slot,) * 2)
    params = random_params(model, draw(5))
    assert jax.jit(model.apply)(params, draw(5)).shape == (2, 3)
    with pytest.raises(TypeError, match="looks at the whole sequence; give mixers that have a state"):
        jax.eval_shape(LanguageModel(11, WIDTH, (slot,)).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))


def test_split_time_is_refused():
    module, x = Bidirectional(WIDTH, gla), draw(8)
    params = random_params(module, x)
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    time = jax.sharding.PartitionSpec(None, "sequence")
    split = jax.shard_map(lambda x: module.apply(params, x), mesh=mesh, in_specs=time, out_specs=time)
    with pytest.raises(NotImplementedError, match="Bidirectional cannot run with time split"):
        jax.eval_shape(split, x)
