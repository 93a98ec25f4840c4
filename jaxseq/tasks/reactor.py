"""A stirred reactor, a plant to model and to control (ICLRNN, arXiv 2401.07494)."""

import jax
import jax.numpy as jnp
import numpy as np

from ..shapes import Array, Float
from .draws import require

#: Concentration (kmol/m³) and temperature (K) at which the reactor rests, and is not stable.
STEADY = (1.9537, 401.8727)
#: Largest deviations of the inputs: of the feed's concentration (kmol/m³), and the heat (kJ/h).
LARGEST = (3.5, 5e5)
ENERGY = ((1060.0, 22.0), (22.0, 0.52))
REGION = 372.0


def reactor_energy(x: Float[Array, "*B 2"]) -> Float[Array, "*B"]:
    """xᵀ P x of a deviation from the steady state; initial states lie where it is below `REGION`."""
    return jnp.einsum("...i,ij,...j->...", x, jnp.asarray(ENERGY, x.dtype), x)


def reactor_path(
    x: Float[Array, "*B 2"], u: Float[Array, "*B 2"], *, hours: float = 0.005, steps: int = 10
) -> Float[Array, "*B T 2"]:
    """Deviations from the steady state at `steps` times, from x on and under constant inputs u, by Runge and Kutta.

        dC/dt = F/V (C_0 + u_1 − C) − k_0 e^{−E/RT} C²
        dT/dt = F/V (T_0 − T) − ΔH/(ρ C_p) k_0 e^{−E/RT} C² + u_2 / (ρ C_p V)

    Raises:
      ValueError: `steps` is below 1, or `hours` is not above 0.
    """
    require("reactor_path", {}, steps=steps)
    if not hours > 0:
        raise ValueError(f"hours={hours}; reactor_path takes more than 0.")
    flow, feed, inflow, rate, activation, heat, capacity = 5.0, 4.0, 300.0, 8.46e6, 5e4 / 8.314, -1.15e4, 231.0

    def slope(x):
        C, T = x[..., 0] + STEADY[0], x[..., 1] + STEADY[1]
        reaction = rate * jnp.exp(-activation / T) * C**2
        dC = flow * (feed + u[..., 0] - C) - reaction
        dT = flow * (inflow - T) + (u[..., 1] - heat * reaction) / capacity
        return jnp.stack([dC, dT], axis=-1)

    def step(x, _):
        h = hours / steps
        k1 = slope(x)
        k2 = slope(x + h / 2 * k1)
        k3 = slope(x + h / 2 * k2)
        k4 = slope(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x, x

    return jnp.moveaxis(jax.lax.scan(step, x, length=steps)[1], 0, -2)


def reactor(
    key: Array, *, num_examples: int, length: int = 10, hours: float = 0.005
) -> tuple[Float[Array, "N T 4"], Float[Array, "N T 2"]]:
    """`(inputs, targets)`: the initial state and the inputs, again at each step, and the states that follow in `hours`.

    States are uniform where `reactor_energy` is below `REGION`, inputs uniform up to `LARGEST`.

    Raises:
      ValueError: a number is too small.
    """
    require("reactor", {}, num_examples=num_examples, length=length)
    keys = jax.random.split(key, 3)
    radius = jnp.sqrt(REGION * jax.random.uniform(keys[0], (num_examples,)))
    angle = jax.random.uniform(keys[1], (num_examples,), maxval=2 * np.pi)
    circle = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    x = circle @ jnp.asarray(np.linalg.inv(np.linalg.cholesky(np.asarray(ENERGY))), circle.dtype)
    bound = jnp.asarray(LARGEST, circle.dtype)
    u = jax.random.uniform(keys[2], (num_examples, 2), minval=-1.0) * bound[None]
    given = jnp.concatenate([x, u], axis=-1)
    inputs = jnp.broadcast_to(given[:, None], (num_examples, length, 4))
    return inputs, reactor_path(x, u, hours=hours, steps=length)
