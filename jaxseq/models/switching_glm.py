"""The hidden Markov generalised linear model of spike counts, with priors that its states share (arXiv 2310.15263)."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

from ..ops import short_convolution
from ..shapes import Array, Float, Int, known, typed

LINKS = {"sigmoid": jax.nn.sigmoid, "softplus": jax.nn.softplus}
# φ_k ∝ exp(−k): what a spike k bins ago still weighs.
#: Couplings below are none to `one_hot_parameters`.
THRESHOLD = 0.3
BASIS = tuple((np.exp(-np.arange(1, 6)) / np.exp(-np.arange(1, 6)).sum()).tolist())


class SwitchingGLM(nn.Module):
    """Poisson neurons whose couplings depend on a hidden state s.

        c_t = Σ_k φ_k x_{t-k}        f_{t,s} = g(b + W_s c_t)        x_t ~ Poisson(f_{t,s}), s = z_t

    `prior` ties the W_s together. "none": free. "gaussian": W_s[n, m] ~ N(W_0[n, m], scale²), W_0 at its best, the mean
    over states. "one_hot": W_s = (a_exc − a_inh) ⊙ softplus(r_s), where each connection has a point (a_inh, a_none,
    a_exc) of the simplex, ~ GumbelSoftmax(ω, temperature), and the states share ω. Such a point is drawn where an rng
    "gumbel" is given (training), and is the nearest corner elsewhere (evaluation).
    """

    num_states: int
    num_neurons: int
    prior: Literal["none", "gaussian", "one_hot"] = "none"
    link: Literal["sigmoid", "softplus"] = "sigmoid"
    basis: tuple[float, ...] = BASIS
    scale: float = 1 / 3
    temperature: float = 0.5

    def setup(self):
        for name, allowed in (("prior", ("none", "gaussian", "one_hot")), ("link", tuple(LINKS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; SwitchingGLM takes {', '.join(map(repr, allowed))}.")
        for name in ("num_states", "num_neurons"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; SwitchingGLM takes 1 or more.")
        for name in ("scale", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; SwitchingGLM takes a number above 0.")
        shape = (self.num_states, self.num_neurons, self.num_neurons)
        small = nn.initializers.normal(0.1)
        self.bias = self.param("bias", nn.initializers.zeros, shape[1:2])
        if self.prior == "one_hot":
            self.strength = self.param("strength", small, shape)
            self.adjacency = self.param("adjacency", small, (*shape, 3))
            self.shares = self.param("shares", nn.initializers.zeros, (*shape[1:], 3))
        else:
            self.weight = self.param("weight", small, shape)

    @typed
    def __call__(self, counts: Float[Array, "B T N"] | Int[Array, "B T N"]) -> Float[Array, "B T S"]:
        """log p(x_t | z_t = s, past): spikes before the first bin are none."""
        _check_counts(counts, len(self.basis))
        if counts.shape[2] != self.num_neurons:
            raise ValueError(f"counts has {counts.shape[2]} neurons; this SwitchingGLM has {self.num_neurons}.")
        x = counts.astype(self.bias.dtype)
        drive = jnp.einsum("btm,snm->btsn", history(x, self.basis), self.weights()) + self.bias[None, None, None]
        rate = LINKS[self.link](drive)
        terms = x[:, :, None] * jnp.log(rate + 1e-8) - rate
        return terms.sum(-1) - gammaln(x + 1).sum(-1, keepdims=True)

    def weights(self) -> Float[Array, "S N N"]:
        """W_s[n, m]: what neuron m does to neuron n."""
        if self.prior != "one_hot":
            return self.weight
        if self.has_rng("gumbel"):
            noise = jax.random.gumbel(self.make_rng("gumbel"), self.adjacency.shape)
            a = jax.nn.softmax((self.adjacency + noise) / self.temperature)
        else:
            a = jax.nn.one_hot(jnp.argmax(self.adjacency, axis=-1), 3)
        return (a[..., 2] - a[..., 0]) * jax.nn.softplus(self.strength)

    def log_prior(self) -> Float[Array, ""]:
        """log p(W), up to a constant; 0 where there is no prior."""
        if self.prior == "none":
            return jnp.zeros(())
        if self.prior == "gaussian":
            return -0.5 * jnp.sum(((self.weight - self.weight.mean(axis=0, keepdims=True)) / self.scale) ** 2)
        log_a, log_shares = jax.nn.log_softmax(self.adjacency), jax.nn.log_softmax(self.shares)
        return gumbel_softmax_log_density(log_a, log_shares[None], self.temperature).sum()


@typed
def one_hot_parameters(weights: Float[Array, "S N N"], bias: Float[Array, "N"], threshold: float = THRESHOLD) -> dict:
    """Parameters of a `one_hot` SwitchingGLM that begins at given weights, those below `threshold` set to zero."""
    weights = jnp.asarray(weights)
    adjacency = jnp.stack([-weights, jnp.full_like(weights, threshold), weights], axis=-1) / threshold
    strength = jnp.log(jnp.expm1(jnp.maximum(jnp.abs(weights), 0.1)))
    shares = adjacency.mean(axis=0)
    return {"params": dict(bias=jnp.asarray(bias), strength=strength, adjacency=adjacency, shares=shares)}


def history(x: Float[Array, "B T N"], basis: tuple[float, ...] = BASIS) -> Float[Array, "B T N"]:
    """c_t = Σ_k φ_k x_{t-k}, k = 1 … K; nothing comes before the first bin."""
    weight = jnp.asarray([*reversed(basis), 0], x.dtype)[:, None]
    return short_convolution(x, jnp.broadcast_to(weight, (len(basis) + 1, x.shape[2])))[0]


def _check_counts(counts, window: int) -> None:
    """Raise unless there are more bins than the history has, and, where known, all are whole numbers of at least 0."""
    if counts.shape[1] <= window:
        raise ValueError(f"counts has {counts.shape[1]} bins; a history of {window} bins takes at least {window + 1}.")
    if (values := known(counts)) is None:
        return
    for sequence, time, neuron in np.argwhere(~((values >= 0) & (values == np.floor(values)))).tolist():
        found = f"neuron {neuron} has the count {values[sequence, time, neuron]} in bin {time} of sequence {sequence}"
        raise ValueError(f"{found}; counts are whole numbers of at least 0.")


@typed
def gumbel_softmax_log_density(
    log_x: Float[Array, "... k"], log_weights: Float[Array, "... k"], temperature: float
) -> Float[Array, "..."]:
    """The log-density of a ~ GumbelSoftmax(ω, τ) on the simplex of k corners, at log x; infinite at a corner.

        log Γ(k) + (k − 1) log τ − k log Σ_i ω_i x_i^{−τ} + Σ_i (log ω_i − (τ + 1) log x_i)

    Raises:
      ValueError: `temperature` is not above 0; an entry of x is not inside (0, 1), where it is known.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; a Gumbel-softmax distribution takes a number above 0.")
    values = known(log_x)
    if values is not None and not ((values < 0) & np.isfinite(values)).all():
        wrong = np.argwhere(~((values < 0) & np.isfinite(values)))[0].tolist()
        raise ValueError(f"x at {wrong} is {np.exp(values[tuple(wrong)])}; entries of a point lie between 0 and 1.")
    k = log_x.shape[-1]
    normaliser = jax.nn.logsumexp(log_weights - temperature * log_x, axis=-1)
    slopes = (log_weights - (temperature + 1) * log_x).sum(axis=-1)
    return math.lgamma(k) + (k - 1) * math.log(temperature) - k * normaliser + slopes
