"""Distillation: its definition and its limit, which positions count, and a student that is better for its teacher."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from families import assert_close
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax

from jaxseq import LanguageModel
from jaxseq.mixers import MinGRU
from jaxseq.sharded import AXIS
from jaxseq.train import cross_entropy, distillation


def drawn(seed=0, shape=(2, 6, 5)):
    rng = np.random.default_rng(seed)
    student, teacher = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    targets = jnp.asarray(rng.integers(0, shape[-1], shape[:-1]), jnp.int32)
    return student, teacher, targets.at[0, :2].set(-100)


def test_the_definition():
    """α T² KL + (1 − α) CE in NumPy, over the positions that are asked."""
    student, teacher, targets = drawn()
    counts = np.asarray(targets) >= 0
    z, t = (log_softmax(np.asarray(x, np.float64) / 3, axis=-1) for x in (student, teacher))
    divergence = (np.exp(t) * (t - z)).sum(-1)[counts].mean()
    hard = -np.take_along_axis(log_softmax(np.asarray(student, np.float64), -1), np.abs(targets)[..., None] % 5, -1)
    expected = {"divergence": divergence, "cross_entropy": hard[..., 0][counts].mean()}
    expected["loss"] = 0.3 * 9 * divergence + 0.7 * expected["cross_entropy"]
    loss, metrics = distillation(student, teacher, targets, temperature=3.0, alpha=0.3)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    assert loss == metrics["loss"] and metrics["accuracy"] == cross_entropy(student, targets)[1]["accuracy"]
    assert distillation(student, teacher, targets, alpha=0.0)[0] == cross_entropy(student, targets)[0]


def test_high_temperature_matches_logits():
    """α = 1, T → ∞: the gradient is (z − z_teacher) / V a position, both centred; the error falls as 1/T."""
    student, teacher, targets = drawn()
    targets = jnp.abs(targets) % 5  # all count
    centred = lambda z: z - z.mean(-1, keepdims=True)
    limit = (centred(student) - centred(teacher)) / 5 / targets.size
    error = {}
    for temperature in (10.0, 100.0):
        loss = lambda z, T=temperature: distillation(z, teacher, targets, temperature=T, alpha=1.0)[0]
        error[temperature] = float(jnp.linalg.norm(jax.grad(loss)(student) - limit) / jnp.linalg.norm(limit))
    assert error[100.0] < 0.01 and 5 < error[10.0] / error[100.0] < 20
    assert_close(jax.grad(lambda t: distillation(student, t, targets)[0])(teacher), jnp.zeros_like(teacher), 0)


def test_what_is_not_asked_does_not_count():
    student, teacher, targets = drawn()
    run = partial(distillation, targets=targets, alpha=0.5)
    moved = run(student.at[0, :2].add(9), teacher.at[0, :2].add(jnp.arange(5.0)[None]))
    assert_close(moved, run(student, teacher), 0)
    some = jnp.asarray(np.random.default_rng(1).random((2, 6)) < 0.5)
    rows = lambda x: x.reshape(12, *x.shape[2:])[np.flatnonzero(some)]
    expected = distillation(rows(student), rows(teacher), rows(jnp.abs(targets) % 5))
    assert_close(distillation(student, teacher, jnp.abs(targets) % 5, some), expected, "mixer")


def test_time_over_devices():
    arrays = drawn()
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AxisType.Auto,))
    in_time = P(None, AXIS)
    split = jax.shard_map(lambda *a: distillation(*a)[0], mesh=mesh, in_specs=(in_time,) * 3, out_specs=P())
    assert_close(jax.jit(split)(*arrays), distillation(*arrays)[0], "mixer")


def trained(model, loss, tokens, keys, steps=80):
    """Parameters after Adam on `loss(logits, inputs, targets)`, one model a key."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: loss(model.apply(params, inputs), inputs, targets))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    def run(key):
        params = model.init(key, inputs)
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(jax.vmap(run))(keys)


@pytest.mark.slow
def test_a_student_of_half_the_depth_learns_more_from_its_teacher():
    """From little text: held-out text surprises it less than the same student, trained as long alone; three seeds."""
    rng = np.random.default_rng(0)
    moves = np.exp(1.5 * rng.standard_normal((6, 6)))
    moves /= moves.sum(1, keepdims=True)

    def text(rows):
        tokens = rng.integers(0, 6, (rows, 1))
        for _ in range(24):
            following = [rng.choice(6, p=moves[last]) for last in tokens[:, -1]]
            tokens = np.concatenate([tokens, np.asarray(following)[:, None]], axis=1)
        return jnp.asarray(tokens, jnp.int32)

    much, little, held_out = text(64), text(8), text(64)
    build = lambda depth: LanguageModel(6, 16, (MinGRU,) * depth, mlp=None)
    hard = lambda logits, inputs, targets: cross_entropy(logits, targets)[0]
    teacher = jax.tree.map(lambda x: x[0], trained(build(2), hard, much, jax.random.split(jax.random.key(0), 1)))

    def softened(logits, inputs, targets):
        return distillation(logits, build(2).apply(teacher, inputs), targets, temperature=2.0, alpha=0.9)[0]

    seeds = jax.random.split(jax.random.key(1), 3)
    surprise = lambda model, params: hard(model.apply(params, held_out[:, :-1]), None, held_out[:, 1:])
    of_students = jax.jit(jax.vmap(partial(surprise, build(1))))
    alone, taught = (np.asarray(of_students(trained(build(1), loss, little, seeds))) for loss in (hard, softened))
    best = float(jax.jit(partial(surprise, build(2)))(teacher))
    least = -np.mean(np.log(moves)[held_out[:, :-1], held_out[:, 1:]])  # the surprise of who knows the chain
    assert best < least + 0.2
    assert (taught < alone - 0.05).all() and (taught < best + 0.1).all(), (least, best, taught, alone)


def test_what_the_teacher_holds_impossible_does_not_count():
    """A padded vocabulary: the loss and its gradient are those without it."""
    logits, teacher, targets = drawn()
    padded = lambda x, value: jnp.concatenate([x, jnp.full_like(x[..., :2], value)], axis=-1)
    slope = jax.value_and_grad(lambda z, t: distillation(z, t, targets, alpha=1.0)[0])
    loss, gradient = slope(padded(logits, -1e9), padded(teacher, -jnp.inf))
    expected, expected_gradient = slope(logits, teacher)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, padded(expected_gradient, 0.0), atol=1e-7)


def test_wrong_arguments_are_named():
    arrays = drawn()
    with pytest.raises(ValueError, match="temperature=0; distillation takes a number above 0"):
        distillation(*arrays, temperature=0)
    with pytest.raises(ValueError, match="alpha=1.1; it is the teacher's share of the loss"):
        distillation(*arrays, alpha=1.1)
    with pytest.raises(ValueError, match="teacher_logits has shape .2, 6, 4."):
        distillation(arrays[0], arrays[1][..., :4], arrays[2])
