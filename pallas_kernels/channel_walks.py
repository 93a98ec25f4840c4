"""How programs walk through time with the channels that they have: in a grid of blocks, or along a pipeline.

A body works on one block of time: `body(refs, refs to write, carry, over_strides) -> carry`, where
`over_strides(read, step, carry)` is `step(n, read(n), carry)` from stride to stride.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Blocks(NamedTuple):
    """`parts` of `width` channels; `number` of so many `strides` of `size` tokens."""

    parts: int
    width: int
    number: int
    strides: int
    size: int
    reverse: bool

    def part(self, kind: str, x) -> tuple[tuple[int | None, ...], Callable]:
        """What sequence b, part j of the channels and block i of time have of an array: its shape, and which it is."""
        tokens, W, at = self.strides * self.size, self.width, lambda i: self._place(i, self.number)
        return {
            "rows": ((None, tokens, W), lambda b, j, i: (b, at(i), j)),
            "d_outputs": ((None, tokens, W), lambda b, j, i: (b, at(i), j)),
            "shared": ((None, tokens, x.shape[-1]), lambda b, j, i: (b, at(i), 0)),
            "partial": ((None, None, tokens, x.shape[-1]), lambda b, j, i: (b, j, at(i), 0)),
            "kept": ((None, self.strides, x.shape[-2], W), lambda b, j, i: (b, at(i), 0, j)),
            "fixed": ((x.shape[-2], W), lambda b, j, i: (0, j)),
            "carry": ((None, x.shape[-2], W), lambda b, j, i: (b, 0, j)),
        }[kind]

    def over_strides(self, ahead: int) -> Callable:
        place = lambda n: self._place(n, self.strides)

        def one_after_the_other(read, step, carry):
            return lax.fori_loop(0, self.strides, lambda n, carry: step(place(n), read(place(n)), carry), carry)

        def with_next(read, step, carry):
            def both(n, state):
                here, carry = state
                following = read(place(jnp.minimum(n + 1, self.strides - 1)))  # on its way while the program works
                return following, step(place(n), here, carry)

            return lax.fori_loop(0, self.strides, both, (read(place(0)), carry))[1]

        return with_next if ahead else one_after_the_other

    def _place(self, n, number: int):
        return number - 1 - n if self.reverse else n


def over(tree, f):
    """f(kind, array) of arrays by kind and name."""
    return {kind: {name: f(kind, x) for name, x in arrays.items()} for kind, arrays in tree.items()}


def in_grid(body: Callable, blocks: Blocks, arguments, results, ahead: int, parameters, interpret):
    """A program for every block, for a TPU; or of all blocks, by Triton."""
    from_block_to_block, over_strides = blocks.number > 1, blocks.over_strides(ahead)

    def kernel(start, refs, final, written):
        if from_block_to_block:  # in the last carry's place

            @pl.when(pl.program_id(2) == 0)
            def _():
                _store(final, _load(start))

        _store(final, body(refs, written, _load(final if from_block_to_block else start), over_strides))

    spec = lambda kind, x: pl.BlockSpec(*blocks.part(kind, x))
    specs = lambda carry, arrays: [jax.tree.map(partial(spec, "carry"), carry), over(arrays, spec)]
    return pl.pallas_call(
        kernel,
        grid=(_sequences(arguments), blocks.parts, blocks.number),
        in_specs=specs(*arguments),
        out_specs=specs(*results),
        out_shape=list(results),
        compiler_params=parameters,
        interpret=interpret,
    )(*arguments)


def in_pipeline(body: Callable, blocks: Blocks, arguments, results, steps: int, interpret):
    """By Mosaic for GPUs: `steps` blocks are on their way to shared memory or there, and a thread has its channels.

    What is written goes to memory as it is found. It knows elementwise arithmetic of rows `1 W`, and no sums over them.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def kernel(start, refs, final, written):
        b, j = lax.axis_index("sequence"), lax.axis_index("part")

        def coming(kind, ref):
            shape, which = blocks.part(kind, ref)
            return plgpu.BlockSpec(shape, lambda i: which(b, j, i))

        def place(kind, ref, i):
            shape, which = blocks.part(kind, ref)
            at = zip(shape, which(b, j, i), strict=True)
            return ref.at[tuple(n if size is None else pl.ds(n * size, size) for size, n in at)]

        def step(indices, *block):
            *here, carry = block
            there = over(written, lambda kind, ref: place(kind, ref, indices[0]))
            carry = body(jax.tree.unflatten(jax.tree.structure(refs), here), there, carry, blocks.over_strides(0))
            plgpu.commit_smem()  # all threads have read a block before another one comes into its place
            return carry

        own = lambda carry: jax.tree.map(lambda ref: place("carry", ref, 0), carry)
        walk = plgpu.emit_pipeline(
            step,
            grid=(blocks.number,),
            in_specs=jax.tree.leaves(over(refs, coming)),
            max_concurrent_steps=steps,
            init_carry=_load(own(start)),
        )
        _store(own(final), walk(*jax.tree.leaves(refs)))

    return plgpu.kernel(
        kernel,
        out_type=results,
        grid=(_sequences(arguments), blocks.parts),
        grid_names=("sequence", "part"),
        # Else Mosaic has threads wait for each other before and after each row that they write.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret or None,
    )(*arguments)


def _sequences(arguments) -> int:
    return jax.tree.leaves(arguments)[0].shape[0]


def _load(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _store(refs, values) -> None:
    jax.tree.map(lambda ref, x: ref.__setitem__(..., x), refs, values)
