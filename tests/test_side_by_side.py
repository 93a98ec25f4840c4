"""Models trained side by side, curricula, and the tasks that they are taught with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxseq.tasks import (
    decaying_peaks,
    delayed_match,
    reactor,
    reactor_energy,
    reactor_path,
    spike_adding,
    spike_templates,
    two_choices,
)
from jaxseq.train import Curriculum, TrainConfig, ensemble_init, ensemble_loss, fit, members, per_member, stacked


def test_models_side_by_side_are_those_alone():
    """Gradients, clipping and projections are each one's own; what `fit` reports are means."""
    target = jnp.asarray([1.0, -2.0, 3.0])
    loss = lambda params, batch, key: (
        jnp.sum((params["w"] * batch["x"].mean() - target) ** 2),
        {"size": jnp.abs(params["w"]).max()},
    )
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
    batches = lambda step: {"x": np.full(2, 1.0 + step, np.float32)}
    starts = [{"w": scale * jnp.ones(3)} for scale in (0.0, 100.0)]
    rows = []
    options = dict(config=TrainConfig(steps=5, batch_size=2, log_every=1))
    both = fit(
        ensemble_loss(loss), lambda key: stacked(starts), batches, optimizer=per_member(optimizer),
        report=lambda step, split, metrics: rows.append(metrics), **options,
    )  # fmt: skip
    alone = [fit(loss, lambda key, w=w: w, batches, optimizer=optimizer, **options).params for w in starts]
    for one, other in zip(members(both.params), alone, strict=True):
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-6)
    losses = [float(loss(w, batches(0), None)[0]) for w in starts]
    assert rows[0]["loss"] == pytest.approx(np.mean(losses)) and rows[0]["size"] == pytest.approx(50)


def test_models_side_by_side_have_optimizers_of_their_own():
    params = {"w": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), "b": jnp.asarray([0.5, -1.0])}
    each = [optax.chain(optax.clip_by_global_norm(norm), optax.adamw(rate)) for norm, rate in ((0.5, 0.1), (2.0, 0.01))]
    both, models = per_member(each), members(params)
    states, alone = both.init(params), [optimizer.init(model) for optimizer, model in zip(each, models, strict=True)]
    with jax.numpy_dtype_promotion("standard"):  # as in `fit`
        for _ in range(2):
            updates, states = both.update(params, states, params)
            for n, model in enumerate(models):
                expected, alone[n] = each[n].update(model, alone[n], model)
                jax.tree.map(np.testing.assert_array_equal, members(updates)[n], expected)
    with pytest.raises(ValueError, match="3 optimizers for 2 models; give as many, or one for all"):
        per_member([*each, each[0]]).init(params)


def test_models_side_by_side_have_keys_of_their_own():
    loss = lambda params, batch, key: (jnp.sum(params) * jax.random.normal(key), {})
    gradient = jax.grad(lambda params: ensemble_loss(loss)(params, {}, jax.random.key(0))[0])(jnp.zeros(3))
    assert len(set(gradient.tolist())) == 3
    init = lambda key: {"w": jax.random.normal(key, (2,))}
    keys = jax.random.split(jax.random.key(0), 3)
    for model, key in zip(members(ensemble_init(init, 3)(jax.random.key(0))), keys, strict=True):
        np.testing.assert_array_equal(model["w"], init(key)["w"])


def test_a_curriculum_advances_where_the_last_and_the_mean_are_mastered():
    multi, single, sliding = (Curriculum(2, 5, window) for window in (None, 1, 2))
    trained = lambda curriculum, level: [
        n for n, x in zip(curriculum.levels, curriculum.trained(level), strict=True) if x
    ]
    assert [trained(multi, n) for n in (2, 4, 6)] == [[2], [2, 3, 4], []]
    assert [trained(single, n) for n in (2, 4, 6)] == [[2], [4], []]
    assert trained(sliding, 4) == [3, 4]
    accuracy = jnp.asarray([0.9, 1.0, 0.99, 0.5])
    assert [int(c.after(4, accuracy)) for c in (multi, single, sliding)] == [4, 5, 5]
    assert int(multi.after(4, accuracy.at[0].set(0.97))) == 5 and int(multi.after(5, accuracy)) == 5
    assert int(single.after(6, jnp.ones(4))) == 6
    assert jax.vmap(single.after)(jnp.asarray([2, 3]), jnp.stack([accuracy] * 2)).tolist() == [2, 4]
    with pytest.raises(ValueError, match="threshold=0.5 must be above 0.5"):
        Curriculum(2, 5, threshold=0.5)
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        Curriculum(2, 5, window=0)
    with pytest.raises(ValueError, match="first=3 is above last=2"):
        Curriculum(3, 2)


def test_decisions_can_be_made_by_adding_up():
    draw = lambda task, **options: jax.device_get(task(jax.random.key(1), num_examples=4000, **options))
    inputs, labels = draw(two_choices, stimulus=7, decision=2)
    assert inputs.shape == (4000, 9, 3) and (inputs[:, :, 0] == ([1] * 7 + [0] * 2)).all()
    guess = inputs[:, :7, 2].mean(axis=1) > inputs[:, :7, 1].mean(axis=1)
    assert 0.94 < (guess == labels).mean() < 0.98 and abs(labels.mean() - 0.5) < 0.03
    assert abs(inputs[:, 7:, 1:].std() - 0.15) < 0.01
    exact, labels = draw(two_choices, noise=0.0)
    assert ((exact[:, 0, 2] > exact[:, 0, 1]) == labels).all() and np.allclose(exact[:, 0, 1:].sum(axis=1), 1)

    inputs, labels = draw(delayed_match, shown=2, delay=3, decision=2, noise=0.0)
    assert inputs.shape == (4000, 9, 3) and (inputs[:, :, 0] == ([1] * 7 + [0] * 2)).all()
    assert (inputs[:, :2, 1:].sum(axis=2) == 1).all() and (inputs[:, 2:5, 1:] == 0).all()
    again = (inputs[:, 0, 1:] == inputs[:, 5, 1:]).all(axis=1)
    assert (again == labels).all() and (inputs[:, 5] == inputs[:, 6]).all() and (inputs[:, 7:] == 0).all()
    with pytest.raises(ValueError, match="noise=-1; two_choices takes 0 or more"):
        two_choices(jax.random.key(0), num_examples=1, noise=-1)
    with pytest.raises(ValueError, match="delay=0; delayed_match takes 1 or more"):
        delayed_match(jax.random.key(0), num_examples=1, delay=0)


def test_a_reactor_rests_at_its_steady_state_and_not_near_it():
    path = partial(reactor_path, hours=0.2, steps=40)
    still = path(jnp.zeros(2), jnp.zeros(2))
    assert np.abs(still).max() < 0.05
    off = jnp.asarray([0.1, -5.0])
    assert reactor_energy(path(off, jnp.zeros(2))[-1]) > 2 * reactor_energy(off)
    inputs, targets = reactor(jax.random.key(0), num_examples=500)
    assert inputs.shape == (500, 10, 4) and targets.shape == (500, 10, 2)
    assert (inputs == inputs[:, :1]).all() and (np.abs(inputs[:, 0, 2:]).max(axis=0) <= [3.5, 5e5]).all()
    energy = reactor_energy(inputs[:, 0, :2])
    assert energy.max() < 372 and abs(energy.mean() - 186) < 20  # uniform in an ellipse
    finer = reactor_path(inputs[:, 0, :2], inputs[:, 0, 2:], steps=100)[:, 9::10]
    np.testing.assert_allclose(finer, targets, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="hours=0; reactor_path takes more than 0"):
        reactor_path(jnp.zeros(2), jnp.zeros(2), hours=0)


def test_peaks_decay():
    x, y = jax.device_get(decaying_peaks(jax.random.key(0), num_examples=50, length=12))
    s = np.zeros(50)
    for t in range(12):
        s = np.maximum(0.8 * s, (x[:, t] ** 2).mean(axis=1) / 4)
        np.testing.assert_allclose(y[:, t, 0], 2 * s, rtol=1e-5)


def test_spikes_of_two_patterns_add_up():
    """The patterns that most likely fired are those whose numbers the label adds."""
    templates = spike_templates(jax.random.key(0), count=4, length=20, channels=30)
    spikes, labels = jax.device_get(spike_adding(jax.random.key(1), templates, num_examples=300))
    assert spikes.shape == (300, 40, 30) and set(np.unique(spikes)) == {0, 1} and set(labels) == set(range(7))
    rates = np.clip(np.asarray(templates), 1e-6, None)
    halves = spikes.reshape(300, 2, 1, 20, 30)
    log_likelihood = (halves * np.log(rates) + (1 - halves) * np.log1p(-rates)).sum(axis=(3, 4))
    assert (log_likelihood.argmax(axis=2).sum(axis=1) == labels).all()
    with pytest.raises(ValueError, match="channels=0; spike_templates takes 1 or more"):
        spike_templates(jax.random.key(0), channels=0)
