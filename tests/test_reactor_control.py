"""Control of the stirred reactor, and the gap of convexity that its models are judged by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxseq.analysis import convexity_gap
from jaxseq.tasks import edge_states, least_cost, reactor_energy, reactor_path, steered
from jaxseq.tasks.reactor import LARGEST, REGION


def test_plans_are_followed_from_the_edge(key):
    """Period after period, each from where the last one ended; half of the largest heat, against none, changes it."""
    x = edge_states(key, num_examples=5)
    np.testing.assert_allclose(reactor_energy(x), 0.99**2 * REGION, rtol=1e-4)
    plan = lambda x: jnp.asarray([0.0, 0.5])
    last, energies = jax.jit(lambda x: steered(plan, x, periods=3))(x)
    by_hand = x
    for n in range(3):
        path = reactor_path(by_hand, jnp.broadcast_to(jnp.asarray([0.0, 0.5 * LARGEST[1]]), (5, 2)))
        np.testing.assert_allclose(energies[n], reactor_energy(path).mean() / REGION, rtol=1e-4)
        by_hand = path[:, -1]
    np.testing.assert_allclose(last, by_hand, rtol=1e-4)
    assert abs(steered(jnp.zeros_like, x, periods=3)[0] - last).max() > 1


def test_a_convex_cost_has_one_plan_from_any_start():
    """Also where the least lies outside of what inputs may be."""
    cost = lambda u: jnp.sum((u - jnp.asarray([0.3, 2.0])) ** 2)
    starts = jnp.asarray([[-1.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
    with jax.numpy_dtype_promotion("standard"):  # optax's own schedules promote
        plans = jax.jit(jax.vmap(lambda start: least_cost(cost, start)))(starts)
    np.testing.assert_allclose(plans, np.broadcast_to([0.3, 1.0], (3, 2)), atol=0.02)


def test_only_what_is_convex_has_no_gap_below_zero():
    rng = np.random.default_rng(0)
    x, other, share = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((50, 4, 2), (50, 4, 2), 50))
    share = jax.nn.sigmoid(share)
    assert convexity_gap(lambda x: x**2, x, other, share).min() >= -1e-6
    assert convexity_gap(jnp.sin, x, other, share).min() < -0.1
    np.testing.assert_allclose(convexity_gap(lambda x: 3 * x, x, other, share), 0, atol=1e-5)


def test_bad_input_is_named():
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="periods=0"):
        steered(jnp.zeros_like, x, periods=0)
    with pytest.raises(ValueError, match="steps=0"):
        least_cost(jnp.sum, x[0], steps=0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\), other \(2, 2\) and share \(3,\)"):
        convexity_gap(jnp.sin, x, x[:2], jnp.zeros(3))
