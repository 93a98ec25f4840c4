"""Programs that walk through time with W channels of a sequence each, and what they carry on the chip.

On a GPU a program has all of its sequence's time, on a TPU a block of time after the other, which comes while the one
before is worked on.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .platforms import tpu_parameters, triton_parameters
from .splits import how_many
from .tiles import tile


def whole(length: int) -> int:
    """What times are filled up to, by 15 tokens or a sixteenth: blocks of a TPU and splits of a GPU divide it."""
    unit = 1 << max(4, (length // 16).bit_length() - 1)
    return length + -length % unit


def stride(states: int) -> int:
    """Tokens between states that are kept, of so many states a channel: the states of a stride are in registers at once
    in the backward pass, and its code is straight."""
    return 16 if states == 1 else 8


class Programs(NamedTuple):
    """Those of a platform, compiled or interpreted."""

    platform: str
    interpret: Any = False

    def splits(self, name: str, batch: int, length: int, states: int, channels: int) -> int:
        """In how many parts a sequence is walked at once by the kernel of this name."""
        chosen = tile(name, self.platform, states)
        programs = batch * -(-channels // self._width(chosen, channels))
        return how_many(chosen.get("programs", 1), programs, length // stride(states), walks=2)

    def _width(self, chosen: dict[str, int], channels: int) -> int:
        """Channels of a program, no more than there are, and whole lanes of a TPU."""
        filled = -(-channels // 128) * 128 if self.platform == "tpu" else 1 << (channels - 1).bit_length()
        return min(chosen["width"], filled)

    def __call__(self, name: str, body: Callable, reverse: bool, carry, reads, writes):
        """`body(refs, refs to write, carry, over_strides) -> carry`, with the tiles of the kernel of this name."""
        *_, states, channels = jax.tree.leaves(carry)[0].shape
        chosen = tile(name, self.platform, states)
        W = self._width(chosen, channels)
        batch, length = next(iter(reads["rows"].values())).shape[:2]
        size, parts = stride(states), -(-channels // W)
        strides = length // size
        most = chosen.get("strides", strides)
        block = strides if strides <= most else math.gcd(strides, most)
        blocks, tokens = strides // block, block * size
        at = lambda i: blocks - 1 - i if reverse else i
        forms = {
            "rows": lambda x: pl.BlockSpec((None, tokens, W), lambda b, j, i: (b, at(i), j)),
            "shared": lambda x: pl.BlockSpec((None, tokens, x.shape[-1]), lambda b, j, i: (b, at(i), 0)),
            "partial": lambda x: pl.BlockSpec((None, None, tokens, x.shape[-1]), lambda b, j, i: (b, j, at(i), 0)),
            "kept": lambda x: pl.BlockSpec((None, block, x.shape[-2], W), lambda b, j, i: (b, at(i), 0, j)),
            "fixed": lambda x: pl.BlockSpec((x.shape[-2], W), lambda b, j, i: (0, j)),
            "carry": lambda x: pl.BlockSpec((None, x.shape[-2], W), lambda b, j, i: (b, 0, j)),
        }
        forms["d_outputs"] = forms["rows"]
        of_channels = forms.keys() - {"shared", "partial"}

        # A TPU keeps rows of narrow numbers in pairs, and does not take one of them.
        stored = lambda x: jax.tree.leaves(carry)[0].dtype if self.platform == "tpu" else x.dtype

        def filled(kind, x):
            fill = [(0, 0)] * (x.ndim - 1) + [(0, parts * W - channels)]
            return jnp.pad(x.astype(stored(x)), fill if kind in of_channels else 0)

        def result(kind, x):
            shape = {"partial": (batch, parts, *x.shape[1:])}.get(kind, (*x.shape[:-1], parts * W))
            return jax.ShapeDtypeStruct(shape, stored(x))

        def over_strides(read, step, carry):
            """`step(n, read(n), carry)` from stride to stride."""
            place = lambda n: block - 1 - n if reverse else n
            if chosen.get("ahead", 0) == 0:
                return lax.fori_loop(0, block, lambda n, carry: step(place(n), read(place(n)), carry), carry)

            def with_next(n, state):
                here, carry = state
                following = read(place(jnp.minimum(n + 1, block - 1)))  # on its way while the program works
                return following, step(place(n), here, carry)

            return lax.fori_loop(0, block, with_next, (read(place(0)), carry))[1]

        def kernel(start, refs, final, written):
            load = lambda refs: jax.tree.map(lambda ref: ref[...], refs)
            store = lambda refs, values: jax.tree.map(lambda ref, x: ref.__setitem__(..., x), refs, values)
            if blocks > 1:  # the last carry's place holds it from block to block

                @pl.when(pl.program_id(2) == 0)
                def _():
                    store(final, load(start))

            after = body(refs, written, load(final if blocks > 1 else start), over_strides)
            store(final, after)

        over = lambda tree, f: {kind: {name: f(kind, x) for name, x in arrays.items()} for kind, arrays in tree.items()}
        spec = lambda kind, x: forms[kind](x)
        at_carry = lambda f: jax.tree.map(lambda x: f("carry", x), carry)
        parameters = (
            tpu_parameters("parallel", "parallel", "arbitrary") if self.platform == "tpu" else triton_parameters(chosen)
        )
        final, written = pl.pallas_call(
            kernel,
            grid=(batch, parts, blocks),
            in_specs=[at_carry(spec), over(reads, spec)],
            out_specs=[at_carry(spec), over(writes, spec)],
            out_shape=[at_carry(result), over(writes, result)],
            compiler_params=parameters,
            interpret=self.interpret,
        )(at_carry(filled), over(reads, filled))
        cut = lambda kind, x: x[..., :channels] if kind in of_channels else x
        written = jax.tree.map(lambda x, like: x.astype(like.dtype), over(written, cut), writes)
        return jax.tree.map(lambda x: cut("carry", x), final), written
