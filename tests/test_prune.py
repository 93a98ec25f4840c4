"""Pruning: exactly the stated share is zero, of the scores stated, whatever trains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import assert_close
from sampled import by_default

from jaxseq import LanguageModel
from jaxseq.compress import cubic_sparsity, keep, masked, pruned, sparsity_of
from jaxseq.mixers import MinGRU
from jaxseq.train import TrainConfig, cross_entropy, fit
from jaxseq.train.paths import named_leaves

#: Weights that training leads to zero, large at first, and some that it leads away from zero, small at first.
START, TARGET = jnp.asarray([1.0, -0.8, 0.1, -0.2]), jnp.asarray([0.0, 0.0, 2.0, -3.0])


def regression(optimizer, steps):
    """Every step's parameters, from START by the gradient of ½ |w − TARGET|²."""
    params = {"kernel": START[:, None], "bias": jnp.zeros(1)}
    loss = lambda p: 0.5 * jnp.sum((p["kernel"][:, 0] - TARGET) ** 2) + 0.5 * jnp.sum((p["bias"] - 1) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    with jax.numpy_dtype_promotion("standard"):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]


def test_movement_and_magnitude_disagree():
    """After a few small steps the large weights are still the large ones, and it shows that they are not needed."""
    kept = {}
    for by in ("magnitude", "movement"):
        params, _ = regression(pruned(optax.sgd(0.02), optax.constant_schedule(0.5), by=by), 5)
        kept[by] = np.flatnonzero(params["kernel"][-1, :, 0]).tolist()
    assert kept == {"magnitude": [0, 1], "movement": [2, 3]}


def test_movement_is_what_training_moves():
    """S = −Σ w ∂L/∂w, with the gradient at the masked weights and w those behind the masks, recomputed in NumPy."""
    optimizer = pruned(optax.sgd(0.1), optax.constant_schedule(0.5), by="movement")
    params, states = regression(optimizer, 6)
    w, score, mask = np.asarray(START, np.float64), np.zeros(4), np.ones(4)
    for step in range(6):
        gradient = mask * w - np.asarray(TARGET)
        score = score - w * gradient
        w = w - 0.1 * gradient
        mask = (score.argsort().argsort() >= 2).astype(float)
        np.testing.assert_allclose(states.scores["kernel"][step, :, 0], score, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(params["kernel"][step, :, 0], mask * w, rtol=1e-5, atol=1e-6)
    assert states.scores["bias"] is None and (params["bias"][:, 0] > 0).all()


def test_what_is_left_out_may_come_back():
    """Straight-through: the small weights are pruned at first, grow behind their masks, and take over."""
    params, _ = regression(pruned(optax.sgd(0.05), optax.constant_schedule(0.5)), 60)
    kept = np.asarray(params["kernel"][..., 0]) != 0
    assert kept[0].tolist() == [True, True, False, False] and kept[-1].tolist() == [False, False, True, True]
    assert (kept.sum(1) == 2).all()
    np.testing.assert_allclose(params["kernel"][-1, 2:, 0], TARGET[2:], atol=0.2)


def test_a_mask_has_the_gradient_of_what_it_leaves():
    params = {"a": jnp.asarray([1.0, 2.0, 3.0]), "b": jnp.asarray([4.0])}
    masks = {"a": jnp.asarray([True, False, True]), "b": None}
    loss = lambda p: jnp.sum(p["a"] ** 3) + jnp.sum(p["b"] ** 2)
    through = lambda p: loss(masked(p, masks))
    expected = {"a": jnp.asarray([1.0, 0.0, 3.0]), "b": params["b"]}
    assert_close(masked(params, masks), expected, 0)
    assert_close(jax.grad(through)(params), jax.grad(loss)(expected), 0)


def test_scopes():
    """A threshold a matrix, an array of two layers, or one for all; ties do not change the number."""
    rng = np.random.default_rng(0)
    scores = {"layers": jnp.asarray(rng.random((2, 5, 4))), "head": jnp.asarray(3 + rng.random((3, 10))), "bias": None}
    scores["layers"] = scores["layers"].at[1].add(1).astype(jnp.float32)
    kept = jax.jit(lambda s: {scope: keep(s, 0.5, scope=scope) for scope in ("matrix", "array", "all")})(scores)
    counts = {scope: [int(m.sum()) for m in (*masks["layers"], masks["head"])] for scope, masks in kept.items()}
    assert counts == {"matrix": [10, 10, 15], "array": [0, 20, 15], "all": [0, 5, 30]}
    layer = np.asarray(scores["layers"][0])
    np.testing.assert_array_equal(kept["matrix"]["layers"][0], layer >= np.sort(layer.reshape(-1))[10])
    assert keep(jnp.zeros((7, 3)), 1 / 3).sum() == 14 and keep(jnp.zeros((7, 3)), 0.0).all()


def test_the_schedule_is_cubic():
    schedule = cubic_sparsity(0.8, 10, begin=5)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(5)), 0)
    np.testing.assert_allclose(schedule(10), 0.8 * (1 - 0.5**3), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray([15, 99])), 0.8, rtol=1e-6)


@pytest.mark.parametrize("by", by_default(["movement"], ["magnitude", "movement"]))
def test_a_model_keeps_its_sparsity_through_training(by):
    """In `fit`, at every step that the schedule and `every` say, and to the weight; what is no matrix stays dense."""
    model = LanguageModel(11, 8, (MinGRU,) * 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 8)), jnp.int32)
    init = lambda key: model.init(key, tokens)
    schedule = cubic_sparsity(0.6, 8)
    zeros = lambda x: (x == 0).astype(jnp.float32).sum(tuple(range(x.ndim - 2, x.ndim)))

    def loss(params, batch, key):
        of_head = zeros(named_leaves(params)["params/head/kernel"])
        return cross_entropy(model.apply(params, batch[:, :-1]), batch[:, 1:])[0], {"zeros": of_head}

    seen = []
    config = TrainConfig(steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=1, log_every=1)
    optimizer = pruned(optax.adam(1e-2), schedule, by=by, every=2)
    report = lambda step, split, metrics: seen.append(metrics)
    batches = lambda step: np.asarray(tokens)
    params = fit(loss, init, batches, config=config, optimizer=optimizer, report=report).params
    shares = [0.0, *(float(schedule(n - n % 2)) for n in range(1, 12))]  # at the start of each step
    assert [row["zeros"] for row in seen] == [round(88 * s) for s in shares]
    assert seen[-1]["loss"] < seen[0]["loss"]
    for path, x in named_leaves(params).items():
        expected = round(0.6 * np.prod(x.shape[-2:])) if path.endswith("kernel") else 0
        assert (np.asarray(zeros(x) if x.ndim > 1 else (x == 0).sum()) == expected).all(), path
    assert abs(sparsity_of(params) - 0.6) < 0.01


@pytest.mark.slow
def test_half_of_the_weights_do():
    """A trained model loses half of its matrices in 100 steps and its held-out loss no more than 5 % after 200."""
    rng = np.random.default_rng(0)
    moves = np.exp(1.5 * rng.standard_normal((6, 6)))
    moves /= moves.sum(1, keepdims=True)
    tokens = rng.integers(0, 6, (128, 1))
    for _ in range(24):
        following = [rng.choice(6, p=moves[last]) for last in tokens[:, -1]]
        tokens = np.concatenate([tokens, np.asarray(following)[:, None]], axis=1)
    text, held_out = jnp.asarray(tokens[:64], jnp.int32), jnp.asarray(tokens[64:], jnp.int32)
    model = LanguageModel(6, 16, (MinGRU,) * 2, mlp=None)
    loss = lambda params, text: cross_entropy(model.apply(params, text[:, :-1]), text[:, 1:])[0]

    def trained(params, optimizer, steps):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, text), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    def measured():
        dense = trained(model.init(jax.random.key(0), text), optax.adam(1e-2), 80)
        prune = partial(pruned, optax.adam(3e-3), cubic_sparsity(0.5, 100))
        return dense, [trained(dense, prune(by=by), 200) for by in ("magnitude", "movement")]

    with jax.numpy_dtype_promotion("standard"):
        dense, sparse = jax.jit(measured)()
    before, *after = (float(loss(params, held_out)) for params in (dense, *sparse))
    assert before < np.log(6) - 0.2 and [sparsity_of(params) for params in sparse] == [0.5, 0.5]
    assert max(after) < 1.05 * before, (before, after)


def test_wrong_arguments_are_named():
    grow = optax.constant_schedule(0.5)
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="final=1.0; a share of the weights is 0 or more and below 1"):
        cubic_sparsity(1.0, 10)
    with pytest.raises(ValueError, match="steps=0 and begin=0; cubic_sparsity takes 1 or more"):
        cubic_sparsity(0.5, 0)
    with pytest.raises(ValueError, match="sparsity=-0.1; a share"):
        keep(params, -0.1)
    with pytest.raises(ValueError, match="by='size' is unknown; choose one of magnitude, movement"):
        pruned(optax.sgd(1.0), grow, by="size")
    with pytest.raises(ValueError, match="scope='row' is unknown; choose one of matrix, array, all"):
        pruned(optax.sgd(1.0), grow, scope="row")
    with pytest.raises(ValueError, match="every=0; pruned takes 1 step or more"):
        pruned(optax.sgd(1.0), grow, every=0)
    with pytest.raises(ValueError, match="which='q_proj' is found in no path of the parameters"):
        pruned(optax.sgd(1.0), grow, which="q_proj").init(params)
    with pytest.raises(ValueError, match="params=None; a pruning optimizer is given the parameters"):
        optimizer = pruned(optax.sgd(1.0), grow)
        optimizer.update(params, optimizer.init(params))
