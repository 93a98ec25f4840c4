"""Hidden Markov models: likelihood, filter, smoother and best path, each a product over a semiring.

    p(z_1 = i) = exp log_start[i]        p(z_{t+1} = j | z_t = i) = exp log_transition[i, j]
    p(x_t | z_t = i) = exp log_emissions[t, i]

Bin t is the matrix E_t[i, j] = log p(x_t | i) + log p(j | i): log_start ⊗ E_1 ⊗ … ⊗ E_t = log p(x_1 … x_t, z_{t+1}).
Every function takes these arrays and `lengths`, the bins that count in each sequence (None: all); −∞ is allowed. A
transition that moves with time has T matrices, the t-th leads out of bin t. Values are checked where they are known,
not traced.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import scan
from ..monoid import index_map, log_sum, log_sum_exp
from ..shapes import Array, Float, Int, accumulator, known, typed
from ..sharded import check_whole
from .dispatch import dispatch
from .log_matmul import Semiring, log_matmul

Start = Float[Array, "S"] | Float[Array, "B S"]
Transition = Float[Array, "S S"] | Float[Array, "B T S S"]
Emissions = Float[Array, "B T S"]
Lengths = Int[Array, "B"] | None


class HiddenMarkovPosterior(NamedTuple):
    """What a whole sequence says about its states; zero after its end."""

    log_likelihood: Float[Array, "B"]
    states: Float[Array, "B T S"]
    """γ_t[i] = p(z_t = i | x)."""
    transitions: Float[Array, "B T-1 S S"]
    """ξ_t[i, j] = p(z_t = i, z_{t+1} = j | x)."""


class _Chain(NamedTuple):
    """The arguments of every function, checked, in one dtype, with batch and time axes."""

    start: Float[Array, "B S"]
    transition: Float[Array, "_ _ S S"]
    emissions: Float[Array, "B T S"]  # the largest of a bin is 0, which keeps sums over long sequences small
    peaks: Float[Array, "B T"]  # what was taken off
    counted: Array  # B T

    def elements(self) -> Float[Array, "B T S S"]:
        """E_t; the last bin that counts stays in its state, and later ones change nothing."""
        stay = jnp.where(jnp.eye(self.start.shape[-1], dtype=bool), 0.0, -jnp.inf).astype(self.start.dtype)
        leaves = jnp.pad(self.counted[:, 1:], ((0, 0), (0, 1)))[..., None, None]
        return self.emissions[..., None] + jnp.where(leaves, self.transition, stay[None, None])

    def last_transition(self) -> Float[Array, "_ S S"]:
        """The one that leads out of the last bin that counts."""
        if self.transition.shape[1] == 1:
            return self.transition[:, 0]
        last = self.counted.sum(axis=1)[:, None, None, None] - 1
        return jnp.take_along_axis(self.transition, last, axis=1)[:, 0]

    def forward(self, elements, impl, semiring: Semiring = "log_sum_exp"):
        """log p(x_1 … x_{t-1}, z_t) for every bin, and log p(x, z_T)."""
        states, final = log_matmul(elements, initial_state=self.start, semiring=semiring, impl=impl)
        return jnp.concatenate([self.start[:, None], states[:, :-1]], axis=1), final

    def total(self, final) -> Float[Array, "B"]:
        return final + self.peaks.sum(axis=1)


def _chain(log_start, log_transition, log_emissions, lengths) -> _Chain:
    check_whole("a hidden Markov model", "split the batch")
    batch, length, size = log_emissions.shape
    if length == 0 or size == 0:
        raise ValueError(f"log_emissions has shape {log_emissions.shape}; at least one bin and one state are needed.")
    _check_values(log_start, log_transition, log_emissions, lengths)
    lengths = jnp.full(batch, length) if lengths is None else lengths
    counted = jnp.arange(length)[None] < lengths[:, None]
    dtype = accumulator(log_emissions.dtype)
    start, transition, emissions = (x.astype(dtype) for x in (log_start, log_transition, log_emissions))
    emissions = jnp.where(counted[..., None], emissions, 0)
    peaks = lax.stop_gradient(emissions.max(axis=-1))
    peaks = jnp.where(jnp.isfinite(peaks), peaks, 0)
    transition = transition[None, None] if transition.ndim == 2 else transition
    return _Chain(jnp.broadcast_to(start, (batch, size)), transition, emissions - peaks[..., None], peaks, counted)


@typed
def hidden_markov_log_likelihood(
    log_start: Start, log_transition: Transition, log_emissions: Emissions, *, lengths: Lengths = None,
    impl: str | None = None,
) -> Float[Array, "B"]:  # fmt: skip
    """log p(x). Its gradients are the posteriors: γ by the emissions, Σ_t ξ_t by the transition, γ_1 by the start.

    Raises:
      ValueError: shapes disagree, probabilities do not sum to 1, an emission is NaN, a length is not in 1 … T.
      NotImplementedError: `impl` is no form of `log_matmul`.
    """
    chain = _chain(log_start, log_transition, log_emissions, lengths)
    return chain.total(log_sum(chain.forward(chain.elements(), impl)[1]))


@typed
def hidden_markov_filter(
    log_start: Start, log_transition: Transition, log_emissions: Emissions, *, lengths: Lengths = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T S"], Float[Array, "B T"], Float[Array, "B S"]]:  # fmt: skip
    """`(log p(z_t | x_1 … x_t), log p(x_t | x_1 … x_{t-1}), log p(z_{T+1} | x))`, as the observations come in.

    The last of the three is the `log_start` under which a sequence goes on: two parts are the whole, one bin a step.
    After the end of a shorter sequence the first repeats, and the second is zero.
    """
    chain = _chain(log_start, log_transition, log_emissions, lengths)
    predicted, final = chain.forward(chain.elements(), impl)
    joint = predicted + chain.emissions
    total = log_sum(joint)  # log p(x_1 … x_t)
    before = jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
    evidence = jnp.where(total == -jnp.inf, total, total - _or_zero(before)) + chain.peaks
    following = log_sum_exp.act(chain.last_transition(), final - _or_zero(log_sum(final))[:, None])
    return joint - _or_zero(total)[..., None], evidence, following


@typed
def hidden_markov_smoother(
    log_start: Start, log_transition: Transition, log_emissions: Emissions, *, lengths: Lengths = None,
    impl: str | None = None,
) -> HiddenMarkovPosterior:  # fmt: skip
    """The posteriors given the whole sequence, by a forward and a backward pass over the same matrices."""
    chain = _chain(log_start, log_transition, log_emissions, lengths)
    elements = chain.elements()
    predicted, final = chain.forward(elements, impl)
    remaining, _ = log_matmul(elements, reverse=True, impl=impl)  # log p(x_t … x_T | z_t)
    states = predicted + remaining
    transitions = predicted[:, :-1, :, None] + elements[:, :-1] + remaining[:, 1:, None, :]
    return HiddenMarkovPosterior(
        chain.total(log_sum(final)),
        jnp.where(chain.counted[..., None], _distribution(states, (-1,)), 0),
        jnp.where(chain.counted[:, 1:, None, None], _distribution(transitions, (-2, -1)), 0),
    )


@typed
def viterbi(
    log_start: Start, log_transition: Transition, log_emissions: Emissions, *, lengths: Lengths = None,
    impl: str | None = None,
) -> tuple[Int[Array, "B T"], Float[Array, "B"]]:  # fmt: skip
    """The most probable path of states, and its joint log-probability with x; the last state repeats after the end."""
    chain = _chain(log_start, log_transition, log_emissions, lengths)
    elements = chain.elements()
    predicted, final = chain.forward(elements, impl, "max_plus")
    best_before = jnp.argmax(predicted[..., :, None] + elements, axis=-2)
    forms = {"sequential": scan.sequential, "parallel": scan.parallel, "chunked": scan.abreast}
    follow = {name: partial(form, index_map, reverse=True) for name, form in forms.items()}
    best = {"cpu": "sequential", "default": "chunked"}
    path, _ = dispatch("viterbi", impl, follow, best)(best_before, jnp.argmax(final, axis=-1))
    return path, chain.total(final.max(axis=-1))


def _or_zero(x):
    """x, with 0 for −∞: what may be subtracted."""
    return jnp.where(x == -jnp.inf, 0, x)


def _distribution(logits, axes):
    """exp logits, normalised; zero where all are −∞."""
    return jnp.exp(logits - jnp.expand_dims(_or_zero(log_sum(logits, axes)), axes))


def _check_values(log_start, log_transition, log_emissions, lengths) -> None:
    """Raise a ValueError for a NaN, for probabilities that do not sum to 1, for a length outside 1 … T."""
    for name, array in (("log_start", known(log_start)), ("log_transition", known(log_transition))):
        if array is None:
            continue
        with np.errstate(over="ignore"):
            sums = np.exp(array.astype(np.float64)).sum(-1)
        # A logarithm rounded to bfloat16 is off by a half per cent of itself.
        wrong = np.argwhere(~(np.abs(sums - 1) < (1e-3 if array.dtype.itemsize >= 4 else 3e-2)))
        if len(wrong):
            at = tuple(wrong[0].tolist())
            row = f" at {list(at)}" if at else ""
            raise ValueError(f"the probabilities of {name}{row} sum to {sums[at]:.4g}; every row has to sum to 1.")
    emissions = known(log_emissions)
    if emissions is not None and np.isnan(emissions).any():
        at = np.argwhere(np.isnan(emissions))[0].tolist()
        raise ValueError(f"log_emissions is NaN at [batch, bin, state] = {at}; every entry is a log-probability.")
    counts, length = known(lengths), log_emissions.shape[1]
    for sequence, count in enumerate(() if counts is None else counts.tolist()):
        if not 1 <= count <= length:
            raise ValueError(f"lengths[{sequence}]={count}; a sequence of {length} bins has 1 to {length} that count.")
