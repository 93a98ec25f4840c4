"""Spike counts of neurons whose couplings switch with a hidden state: the simulation of arXiv 2310.15263."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..models.switching_glm import BASIS, LINKS
from ..shapes import Array, Float, Int


class SwitchingSpikes(NamedTuple):
    """Counts, and the truth behind them."""

    counts: Int[Array, "B T N"]
    states: Int[Array, "B T"]
    weights: Float[Array, "S N N"]
    bias: Float[Array, "N"]


def switching_spikes(
    key: Array,
    *,
    num_sequences: int,
    length: int,
    num_states: int = 5,
    num_neurons: int = 20,
    stay: float = 0.98,
    link: str = "sigmoid",
) -> SwitchingSpikes:
    """Draw a network and sequences of it.

        (inhibitory, none, excitatory) ~ Dirichlet(0.2, 1.6, 0.2), one for each connection        b ~ U(−0.05, 0.05)
        W_s = a sign drawn from it for each state, times softplus(log 3u), u ~ U(0, 1)
        z_1 uniform        z_{t+1} = z_t with probability `stay`, else another state
        x_t ~ Poisson(link(b + W_z Σ_k φ_k x_{t-k})), z = z_t

    Raises:
      ValueError: a number is below 1, or `stay` is outside (0, 1).
    """
    sizes = dict(num_sequences=num_sequences, length=length, num_states=num_states, num_neurons=num_neurons)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}; switching_spikes takes 1 or more.")
    if not 0 < stay < 1:
        raise ValueError(f"stay={stay}; switching_spikes takes a probability between 0 and 1.")
    keys = jax.random.split(key, 6)
    shape = (num_states, num_neurons, num_neurons)
    shares = jax.random.dirichlet(keys[0], jnp.asarray([0.2, 1.6, 0.2]), shape[1:])
    sign = jax.random.categorical(keys[1], jnp.log(shares)[None], shape=shape) - 1
    strength = jax.nn.softplus(jnp.log(3 * jax.random.uniform(keys[2], shape)))
    weights = sign.astype(strength.dtype) * strength
    bias = 0.1 * (jax.random.uniform(keys[3], (num_neurons,)) - 0.5)
    basis = jnp.asarray(BASIS)

    def step(carry, randomness):
        state, past = carry  # past: B K N, the latest first
        u, key = randomness
        drive = jnp.einsum("bnm,k,bkm->bn", weights[state], basis, past)
        x = jax.random.poisson(key, LINKS[link](bias[None] + drive))
        others = 1 + jnp.floor((u - stay) / (1 - stay) * (num_states - 1)).astype(state.dtype)
        following = jnp.where(u < stay, state, (state + others) % num_states)
        return (following, jnp.concatenate([x[:, None].astype(past.dtype), past[:, :-1]], axis=1)), (x, state)

    start = jax.random.randint(keys[4], (num_sequences,), 0, num_states)
    past = jnp.zeros((num_sequences, len(BASIS), num_neurons))
    moves, draws = jax.random.split(keys[5])
    randomness = jax.random.uniform(moves, (length, num_sequences)), jax.random.split(draws, length)
    _, (counts, states) = lax.scan(step, (start, past), randomness)
    return SwitchingSpikes(counts.swapaxes(0, 1), states.swapaxes(0, 1), weights, bias)
