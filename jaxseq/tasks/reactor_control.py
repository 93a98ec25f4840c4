"""The stirred reactor under inputs that are planned anew each period: model predictive control."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ..shapes import Array, Float
from .draws import require
from .reactor import LARGEST, REGION, reactor, reactor_energy, reactor_path


def edge_states(key: Array, *, num_examples: int) -> Float[Array, "N 2"]:
    """States just inside the region that initial states lie in."""
    x = reactor(key, num_examples=num_examples)[0][:, 0, :2]
    return x * jnp.sqrt(REGION / reactor_energy(x))[:, None] * 0.99


def steered(
    plan: Callable[[Float[Array, "2"]], Float[Array, "2"]], x: Float[Array, "N 2"], *, periods: int
) -> tuple[Float[Array, "N 2"], Float[Array, "periods"]]:
    """Where states are after so many periods, and the mean energy in each, as a share of the region's.

    `plan(state) -> inputs`, shares of the `LARGEST`, is asked at the start of every period.

    Raises:
      ValueError: `periods` is below 1.
    """
    require("steered", {}, periods=periods)

    def period(x, _):
        path = reactor_path(x, jax.vmap(plan)(x) * jnp.asarray(LARGEST)[None])
        return path[:, -1], reactor_energy(path).mean() / REGION

    return jax.lax.scan(period, x, length=periods)


def least_cost(
    cost: Callable[[Float[Array, "2"]], Float[Array, ""]],
    start: Float[Array, "2"],
    *,
    steps: int = 100,
    learning_rate: float = 0.1,
) -> Float[Array, "2"]:
    """Inputs in [−1, 1] found by Adam from `start`: where the cost is convex, the same from any.

    Raises:
      ValueError: `steps` is below 1.
    """
    require("least_cost", {}, steps=steps)
    descent = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, _):
        u, state = carry
        updates, state = descent.update(jax.grad(cost)(u), state)
        return (jnp.clip(u + updates, -1, 1), state), None

    return jax.lax.scan(step, (start, descent.init(start)), length=steps)[0][0]
