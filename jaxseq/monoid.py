"""The algebra under every mixer: elements are maps on a state, and maps compose.

A `Monoid` is three pure functions. `combine(earlier, later)` composes two elements and is associative;
`identity(like)` is the neutral element, shaped as the element `like`; `act(element, state)` applies an element, and
`act(combine(e, f), s) == act(f, act(e, s))`. All three take arrays with any leading axes, so one call serves a step
(`B …`), a whole sequence (`B T …`) or a state that broadcasts over time (`B 1 …`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .exact import einsum, matmul
from .shapes import Array, Bool, Float, Inexact, Int


class Monoid(NamedTuple):
    combine: Callable[[Any, Any], Any]
    identity: Callable[[Any], Any]
    act: Callable[[Any, Any], Any]


class Affine(NamedTuple):
    """The map h ↦ decay ⊙ h + inputs. `decay` may have size 1 where it is shared."""

    decay: Inexact[Array, "..."]
    inputs: Inexact[Array, "..."]


affine = Monoid(
    combine=lambda e, f: Affine(f.decay * e.decay, f.decay * e.inputs + f.inputs),
    identity=lambda like: Affine(jnp.ones_like(like.decay), jnp.zeros_like(like.inputs)),
    act=lambda e, h: e.decay * h + e.inputs,
)


class Expansion(NamedTuple):
    """A number as a sum of two: `low` holds what rounding takes from `high`."""

    high: Float[Array, "..."]
    low: Float[Array, "..."]


def _add_exactly(e: Expansion, f: Expansion) -> Expansion:
    """Knuth's sum of two floats, whose rounding error is a float."""
    high = e.high + f.high
    added = high - e.high
    return Expansion(high, e.low + f.low + ((e.high - (high - added)) + (f.high - added)))


#: Sums whose differences are exact to rounding, however large they have grown.
expansion = Monoid(
    combine=_add_exactly,
    identity=lambda like: jax.tree.map(jnp.zeros_like, like),
    act=lambda e, state: _add_exactly(state, e),
)


class MatrixAffine(NamedTuple):
    """The map h ↦ matrix · h + inputs."""

    matrix: Inexact[Array, "... N N"]
    inputs: Inexact[Array, "... N"]


matrix_affine = Monoid(
    combine=lambda e, f: MatrixAffine(matmul(f.matrix, e.matrix), _apply(f.matrix, e.inputs) + f.inputs),
    identity=lambda like: MatrixAffine(_eye_like(like.matrix, 1, 0), jnp.zeros_like(like.inputs)),
    act=lambda e, h: _apply(e.matrix, h) + e.inputs,
)


class MatrixMap(NamedTuple):
    """The map S ↦ matrix · S + update on matrix states."""

    matrix: Inexact[Array, "... K K"]
    update: Inexact[Array, "... K V"]


matrix_map = Monoid(
    combine=lambda e, f: MatrixMap(matmul(f.matrix, e.matrix), matmul(f.matrix, e.update) + f.update),
    identity=lambda like: MatrixMap(_eye_like(like.matrix, 1, 0), jnp.zeros_like(like.update)),
    act=lambda e, S: matmul(e.matrix, S) + e.update,
)


class OuterProduct(NamedTuple):
    """The map S ↦ diag(exp log_decay) S + update on matrix states; one token's update is the rank-one k vᵀ."""

    log_decay: Float[Array, "... K"]
    update: Float[Array, "... K V"]

    @classmethod
    def from_token(cls, log_decay, key, value) -> "OuterProduct":
        return cls(log_decay, key[..., :, None] * value[..., None, :])


def _decay_and_update(e: OuterProduct, S):
    return jnp.exp(e.log_decay)[..., None] * S + e.update


outer_product = Monoid(
    combine=lambda e, f: OuterProduct(e.log_decay + f.log_decay, _decay_and_update(f, e.update)),
    identity=lambda like: OuterProduct(jnp.zeros_like(like.log_decay), jnp.zeros_like(like.update)),
    act=_decay_and_update,
)


class Softmax(NamedTuple):
    """A softmax average in progress: the largest logit, Σ exp(logit − maximum), and the sum weighted so."""

    maximum: Float[Array, "..."]
    normaliser: Float[Array, "..."]
    weighted_sum: Float[Array, "... V"]

    @classmethod
    def from_token(cls, logit, value) -> "Softmax":
        return cls(logit, jnp.isfinite(logit).astype(logit.dtype), jnp.where(jnp.isfinite(logit)[..., None], value, 0))

    def average(self) -> Float[Array, "... V"]:
        """The softmax-weighted mean; zero where nothing was seen."""
        return self.weighted_sum / jnp.where(self.normaliser > 0, self.normaliser, 1)[..., None]


def _merge_softmax(e: Softmax, f: Softmax) -> Softmax:
    maximum = jax.lax.stop_gradient(jnp.maximum(e.maximum, f.maximum))
    finite = jnp.where(jnp.isfinite(maximum), maximum, 0)  # nothing seen yet: −∞ − (−∞) would be NaN
    a, b = jnp.exp(e.maximum - finite), jnp.exp(f.maximum - finite)
    return Softmax(
        maximum, a * e.normaliser + b * f.normaliser, a[..., None] * e.weighted_sum + b[..., None] * f.weighted_sum
    )


softmax = Monoid(
    combine=_merge_softmax,
    identity=lambda like: Softmax(
        jnp.full_like(like.maximum, -jnp.inf), jnp.zeros_like(like.normaliser), jnp.zeros_like(like.weighted_sum)
    ),
    act=lambda e, state: _merge_softmax(state, e),
)


class Runs(NamedTuple):
    """The map (S_0, …, S_{M−1}) ↦ decay · (sums of runs of 1, 2, 4 … tokens, merged up to bit `carried`) + sums.

    A counter of the tokens has the runs as its bits (a Fenwick tree): where it counts on to bit c, all lower runs
    become one of bit c. `carried` is −1 where nothing merges.
    """

    decay: Float[Array, "..."]
    carried: Int[Array, "..."]
    sums: Float[Array, "... M N"]


def _merge_runs(e: Runs, state):
    bits, carried = state.shape[-2], e.carried[..., None]
    bit = jax.lax.broadcasted_iota(carried.dtype, (*carried.shape[:-1], bits), carried.ndim - 1)
    into = jax.nn.one_hot(jnp.maximum(bit, carried), bits, dtype=state.dtype)
    return e.decay[..., None, None] * einsum("...ml,...mn->...ln", into, state) + e.sums


runs = Monoid(
    combine=lambda e, f: Runs(e.decay * f.decay, jnp.maximum(e.carried, f.carried), _merge_runs(f, e.sums)),
    identity=lambda like: Runs(jnp.ones_like(like.decay), jnp.full_like(like.carried, -1), jnp.zeros_like(like.sums)),
    act=_merge_runs,
)


def semiring_matrix(add: Callable, zero: float = -jnp.inf) -> Monoid:
    """Matrices over a semiring whose product is + and whose sum is `add(array, axis)`, acting on row vectors."""
    combine = lambda e, f: add(e[..., :, :, None] + f[..., None, :, :], -2)
    return Monoid(
        combine=combine,
        identity=lambda like: _eye_like(like, 0, zero),
        act=lambda e, s: add(s[..., :, None] + e, -2),
    )


def log_sum(x, axis=-1):
    """log Σ exp x: −∞, with gradient zero, where all of x is −∞."""
    empty = jnp.all(x == -jnp.inf, axis=axis, keepdims=True)  # log has no slope at zero
    return jnp.where(jnp.squeeze(empty, axis), -jnp.inf, jax.nn.logsumexp(jnp.where(empty, 0, x), axis=axis))


log_sum_exp = semiring_matrix(log_sum)
max_plus = semiring_matrix(lambda x, axis: jnp.max(x, axis=axis))


class LogAffine(NamedTuple):
    """The map h ↦ (log_decay + h) ⊕ log_input, ⊕ the sum of a semiring: `Affine`, its numbers as logs."""

    log_decay: Float[Array, "..."]
    log_input: Float[Array, "..."]


def semiring_affine(add: Callable) -> Monoid:
    """Elementwise affine maps over a semiring whose product is + and whose sum is `add(array, axis)`, zero −∞."""
    act = lambda e, h: add(jnp.stack([e.log_decay + h, e.log_input]), 0)
    return Monoid(
        combine=lambda e, f: LogAffine(e.log_decay + f.log_decay, act(f, e.log_input)),
        identity=lambda like: LogAffine(jnp.zeros_like(like.log_decay), jnp.full_like(like.log_input, -jnp.inf)),
        act=act,
    )


log_affine = semiring_affine(log_sum)
max_affine = semiring_affine(lambda x, axis: jnp.max(x, axis=axis))


# A map on 0 … N−1 as the table of its values, `… N`; it acts on indices `…`.
index_map = Monoid(
    combine=lambda e, f: jnp.take_along_axis(f, e, axis=-1),
    identity=lambda like: jnp.broadcast_to(jnp.arange(like.shape[-1], dtype=like.dtype), like.shape),
    act=lambda e, i: jnp.take_along_axis(e, i[..., None], axis=-1)[..., 0],
)


class Segmented(NamedTuple):
    """`element`, after forgetting everything earlier where `start` is set."""

    start: Bool[Array, "..."]
    element: Any


def zeros(state):
    return jax.tree.map(jnp.zeros_like, state)


def segmented(monoid: Monoid, empty: Callable[[Any], Any] = zeros) -> Monoid:
    """The same monoid with resets: at a start the state is `empty(state)` before the element acts.

    A start flag has the leading axes of the elements, so packed sequences need nothing but a flag per token.
    """

    def combine(e: Segmented, f: Segmented) -> Segmented:
        return Segmented(e.start | f.start, _choose(f.start, f.element, monoid.combine(e.element, f.element)))

    def act(e: Segmented, state):
        return monoid.act(e.element, _choose(e.start, empty(state), state))

    return Monoid(combine, lambda like: Segmented(like.start & False, monoid.identity(like.element)), act)


def _choose(flag, chosen, other):
    return jax.tree.map(
        lambda x, y: jnp.where(jax.lax.expand_dims(flag, range(flag.ndim, y.ndim)), x, y), chosen, other
    )


def _apply(matrix, vector):
    return einsum("...ij,...j->...i", matrix, vector)


def _eye_like(matrix, one, zero):
    return jnp.broadcast_to(jnp.where(jnp.eye(matrix.shape[-1], dtype=bool), one, zero), matrix.shape).astype(
        matrix.dtype
    )
