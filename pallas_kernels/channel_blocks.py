"""Blocks of time and of channels, and the grid of programs that walks over them.

A body works on one block of time: `body(refs, refs to write, carry, over_strides) -> carry`. Arrays come by kind:
`rows` and `d_outputs`, one a token; `shared`, rows that all channels have in common, and `partial`, what a part of the
channels adds to the gradient of these; `kept`, the states before each stride; what is `fixed` in time; the `carry`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

#: Kinds of arrays whose last axis is not that of the channels.
OF_ALL_CHANNELS = ("shared", "partial")


class Blocks(NamedTuple):
    """Channels in `parts` of `width`; time in `number` blocks of `strides` strides of `size` tokens, from its end on in
    `reverse`. Rows of the stride after are read `ahead` of a stride's arithmetic, or not."""

    parts: int
    width: int
    number: int
    strides: int
    size: int
    reverse: bool
    ahead: bool = False

    def of(self, kind: str, x) -> tuple[tuple[int | None, ...], Callable]:
        """What sequence b, part j of the channels and block i of time have of an array: its shape, and which it is."""
        tokens, W, at = self.strides * self.size, self.width, lambda i: self._place(i, self.number)
        rows = (None, tokens, W), lambda b, j, i: (b, at(i), j)
        return {
            "rows": rows,
            "d_outputs": rows,
            "shared": ((None, tokens, x.shape[-1]), lambda b, j, i: (b, at(i), 0)),
            "partial": ((None, None, tokens, x.shape[-1]), lambda b, j, i: (b, j, at(i), 0)),
            "kept": ((None, self.strides, x.shape[-2], W), lambda b, j, i: (b, at(i), 0, j)),
            "fixed": ((x.shape[-2], W), lambda b, j, i: (0, j)),
            "carry": ((None, x.shape[-2], W), lambda b, j, i: (b, 0, j)),
        }[kind]

    def over_strides(self, read, step, carry):
        """`step(n, read(n), carry)` from stride to stride."""
        place = lambda n: self._place(n, self.strides)
        if not self.ahead:
            return lax.fori_loop(0, self.strides, lambda n, carry: step(place(n), read(place(n)), carry), carry)

        def with_next(n, state):
            here, carry = state
            following = read(place(jnp.minimum(n + 1, self.strides - 1)))  # on its way while the program works
            return following, step(place(n), here, carry)

        return lax.fori_loop(0, self.strides, with_next, (read(place(0)), carry))[1]

    def _place(self, n, number: int):
        return number - 1 - n if self.reverse else n


def by_kind(f: Callable, arrays):
    """`f(kind, array)` of all arrays."""
    return {kind: jax.tree.map(partial(f, kind), of) for kind, of in arrays.items()}


def load(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def store(refs, values) -> None:
    jax.tree.map(lambda ref, x: ref.__setitem__(..., x), refs, values)


def in_grid(body: Callable, blocks: Blocks, batch: int, reads, writes, *, parameters, interpret):
    """A program for each block, on a TPU; or one of Triton's for all of them."""
    several = blocks.number > 1

    def kernel(refs, written):
        start, final = refs.pop("carry"), written.pop("carry")
        if several:  # the place of the last carry holds it from block to block

            @pl.when(pl.program_id(2) == 0)
            def _():
                store(final, load(start))

        store(final, body(refs, written, load(final if several else start), blocks.over_strides))

    spec = lambda kind, x: pl.BlockSpec(*blocks.of(kind, x))
    return pl.pallas_call(
        kernel,
        grid=(batch, blocks.parts, blocks.number),
        in_specs=[by_kind(spec, reads)],
        out_specs=by_kind(spec, writes),
        out_shape=writes,
        compiler_params=parameters,
        interpret=interpret,
    )(reads)
