"""Time in splits, for a few long sequences on a GPU, which has processors for more programs than they are.

A step of time is an affine map of the state, h → units · h + zero. So a first walk through every split, from zero and
from unit states beside it, tells where all of them start, and then they are walked at once. Maps under which a matrix
would grow beyond all numbers within a split give NaN.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Affine(NamedTuple):
    """Where walks end that start from the unit states, and from zero."""

    units: Any
    zero: Any


#: Blocks of time of a split, at least.
SHORTEST = 8


def how_many(wanted: int, programs: int, blocks: int, walks: int) -> int:
    """How many splits make the programs that a device wants: a power of two that divides the blocks of time.

    They have to be more than the walks that they take for one.
    """
    most = max(1, min(wanted // programs, blocks // SHORTEST))
    number = math.gcd(1 << most.bit_length() - 1, blocks)
    return number if number > walks else 1


class Splits(NamedTuple):
    """So many runs of consecutive tokens of each sequence, as sequences of their own."""

    number: int
    reverse: bool

    def apart(self, arrays):
        """`B T …` → `B·splits T/splits …`."""
        return jax.tree.map(
            lambda x: x.reshape(x.shape[0] * self.number, x.shape[1] // self.number, *x.shape[2:]), arrays
        )

    def together(self, arrays):
        return jax.tree.map(
            lambda x: x.reshape(x.shape[0] // self.number, x.shape[1] * self.number, *x.shape[2:]), arrays
        )

    def _of_sequences(self, states):
        return jax.tree.map(lambda x: x.reshape(-1, self.number, *x.shape[1:]), states)

    def end(self, states):
        """`B·splits …` → `B …`, where the whole walk ends."""
        return jax.tree.map(lambda x: x[:, 0 if self.reverse else -1], self._of_sequences(states))

    def starts(self, walk: Callable[[Any], Affine], apply: Callable, compose: Callable, state):
        """The states that splits start from, where the first starts from `state`: `B …` → `B·splits …`.

        `walk` is given states of this shape, `apply(units, state)` is linear and `compose(second units, first units)`.
        """
        if self.number == 1:
            return state
        add = partial(jax.tree.map, jnp.add)
        ends = self._of_sequences(walk(jax.tree.map(lambda h: jnp.repeat(h, self.number, axis=0), state)))
        combine = lambda first, second: Affine(
            compose(second.units, first.units), add(apply(second.units, first.zero), second.zero)
        )
        ends = lax.associative_scan(combine, ends, axis=1, reverse=self.reverse)
        first = jax.tree.map(lambda h: h[:, None], state)
        ends = add(apply(ends.units, first), ends.zero)
        late = lambda h, end: jnp.concatenate([end[:, 1:], h] if self.reverse else [h, end[:, :-1]], axis=1)
        return jax.tree.map(lambda h, end: late(h, end).reshape(-1, *h.shape[2:]), first, ends)
