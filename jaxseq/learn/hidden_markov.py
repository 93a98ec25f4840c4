"""Two ways to fit a hidden Markov model with learned emissions: expectation-maximisation, and the gradient.

The model is a linen module: `apply(params, counts)` are log-emissions `B T S`, its method `log_prior` is log p(params).
An rng "gumbel" is at hand where a step is taken, and not where the states are inferred. `lengths` are the bins that
count in each sequence, all when None. Both rules climb

    log p(x | params, P) + log p(params),        z_1 uniform, P[i, j] = p(z_{t+1} = j | z_t = i)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ..monoid import log_sum
from ..ops import hidden_markov_log_likelihood, hidden_markov_smoother
from ..shapes import Array, Float


class HiddenMarkovState(NamedTuple):
    """What a fit goes on from."""

    params: Any
    log_transition: Float[Array, "S S"]
    optimizer: Any
    key: Array


Step = Callable[..., tuple[HiddenMarkovState, Array]]


def hidden_markov_start(params, optimizer, num_states: int, key, stay: float = 0.98, *, transition=False):
    """A fit's first state: P stays with probability `stay`. `transition`: the optimizer moves log P too."""
    other = (1 - stay) / max(1, num_states - 1)
    P = jnp.where(jnp.eye(num_states, dtype=bool), stay if num_states > 1 else 1.0, other)
    log_P = jnp.log(P).astype(float)  # of no weak type, or the second round would be compiled anew
    return HiddenMarkovState(params, log_P, optimizer.init((params, log_P) if transition else params), key)


def expectation_maximisation(model, optimizer: optax.GradientTransformation, inner_steps: int) -> Step:
    """`step(state, counts, lengths=None) -> (state, log p(x, params) before it)`.

    E: γ and ξ by the smoother. M: P = Σ_t ξ_t, its rows divided by their sums, is exact; the emissions' parameters take
    `inner_steps` of the optimizer up Σ_t γ_t · log p(x_t | z_t) + log p(params).
    """

    def step(state: HiddenMarkovState, counts, lengths=None):
        emissions = model.apply(state.params, counts)
        posterior = hidden_markov_smoother(_uniform(state), state.log_transition, emissions, lengths=lengths)

        def expected(params, key):
            emissions = model.apply(params, counts, rngs={"gumbel": key})
            return -(jnp.sum(posterior.states * emissions) + _log_prior(model, params)) / counts.size

        params, inner, key = _climb(expected, optimizer, state.params, state.optimizer, state.key, inner_steps)
        log_P = jnp.log(posterior.transitions.sum(axis=(0, 1)))
        row = log_sum(log_P)[:, None]
        log_P = jnp.where(row == -jnp.inf, state.log_transition, log_P - row)  # a state never left keeps its row
        objective = posterior.log_likelihood.sum() + _log_prior(model, state.params)
        return HiddenMarkovState(params, log_P, inner, key), objective

    return step


def gradient_ascent(model, optimizer: optax.GradientTransformation, inner_steps: int) -> Step:
    """The same, by `inner_steps` up the gradient of the marginal likelihood: no posterior is ever formed."""

    def step(state: HiddenMarkovState, counts, lengths=None):
        def objective(both, key=None):
            params, logits = both
            emissions = model.apply(params, counts, rngs={} if key is None else {"gumbel": key})
            chain = _uniform(state), jax.nn.log_softmax(logits), emissions
            value = hidden_markov_log_likelihood(*chain, lengths=lengths).sum()
            return -(value + _log_prior(model, params)) / counts.size

        both = state.params, state.log_transition
        (params, log_P), inner, key = _climb(objective, optimizer, both, state.optimizer, state.key, inner_steps)
        return HiddenMarkovState(params, jax.nn.log_softmax(log_P), inner, key), -objective(both) * counts.size

    return step


def best_fit(step: Step, starts: list[HiddenMarkovState], counts, steps: int) -> HiddenMarkovState:
    """`steps` rounds from several starts: after a quarter of them only the one that stands highest goes on."""
    awhile = steps // 4 if len(starts) > 1 else 0
    state = max((_rounds(step, state, counts, awhile) for state in starts), key=lambda fit: fit[1])[0]
    return _rounds(step, state, counts, steps - awhile)[0]


def _rounds(step: Step, state: HiddenMarkovState, counts, steps: int) -> tuple[HiddenMarkovState, float]:
    height: Any = -math.inf
    for _ in range(steps):
        state, height = step(state, counts)
    return state, float(height)


def _climb(loss, optimizer, params, state, key, steps: int):
    key, *keys = jax.random.split(key, steps + 1)

    def inner(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = lax.scan(inner, (params, state), jnp.stack(keys))
    return params, state, key


def _log_prior(model, params):
    return model.apply(params, method="log_prior")


def _uniform(state: HiddenMarkovState):
    size = state.log_transition.shape[0]
    return jnp.full((size,), -math.log(size), state.log_transition.dtype)
