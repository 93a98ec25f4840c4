"""Blocks of time one after the other, the carry in vector memory, while the next block is on its way."""

from functools import partial
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl

from .platforms import head_for, tpu_parameters
from .walk import Arrays, Result, Step, Walk, filled_up
from .within_chunk import WithinChunk


def on_tpu(step: Step, walk: Walk, carry, tokens: Arrays, matrices: Arrays, *, interpret: Any = False) -> Result:
    more_than_one = lambda width: max(width, 2)  # Mosaic makes a sum of a product over one channel, in its own dtype
    walked = partial(_on_tpu, step, interpret=interpret)
    return filled_up(walked, more_than_one, walk, carry, tokens, matrices)


def _on_tpu(step: Step, walk: Walk, carry, tokens: Arrays, matrices: Arrays, *, interpret: Any) -> Result:
    from jax.experimental.pallas import tpu as pltpu

    batch, heads, K, V = carry.shape
    length = next(iter(tokens.values())).shape[1]
    blocks, size = length // walk.size, walk.size
    within = WithinChunk(lax.Precision.HIGHEST, walk.differentiated)

    # A block is a tile of the last two axes; tokens of one channel lie along the lanes.
    tile_of = lambda x: (blocks, 1, size) if x.shape[3] == 1 else x.shape[1::2]
    tiled = lambda x: x.swapaxes(1, 2).reshape(batch, x.shape[2], *tile_of(x))
    shape = lambda width: (batch, heads, *((blocks, 1, size) if width == 1 else (length, width)))
    untiled = lambda x: x.reshape(batch, heads, length, -1).swapaxes(1, 2)
    at = lambda i: walk.place(i, blocks)

    def spec(width: int, own: int = heads):
        serving = head_for(own, heads)
        if width == 1:
            return pl.BlockSpec((None, None, None, 1, size), lambda b, h, i: (b, serving(h), at(i), 0, 0))
        return pl.BlockSpec((None, None, size, width), lambda b, h, i: (b, serving(h), at(i), 0))

    matrix = lambda x: pl.BlockSpec((None, None, None, *x.shape[3:]), lambda b, h, i: (b, at(i), h, 0, 0))
    whole = pl.BlockSpec((None, None, K, V), lambda b, h, i: (b, h, 0, 0))

    def kernel(start, token_refs, matrix_refs, final, outputs, carries, scratch):
        i = pl.program_id(2)

        @pl.when(i == 0)
        def _():
            scratch[...] = start[...]

        if walk.keep:
            carries[...] = scratch[...]
        read = lambda name: token_refs[name][...].T if tokens[name].shape[3] == 1 else token_refs[name][...]
        here = {name: read(name) for name in tokens}
        after, out = step(within, scratch[...], here, {name: ref[...] for name, ref in matrix_refs.items()})
        scratch[...] = after
        for name, (width, _) in walk.outputs.items():
            value = out[name].T if width == 1 else out[name]
            outputs[name][...] = value.astype(outputs[name].dtype)

        @pl.when(i == blocks - 1)
        def _():
            final[...] = after

    kept = jax.ShapeDtypeStruct((batch, blocks, heads, K, V), carry.dtype)
    final, outputs, carries = pl.pallas_call(
        kernel,
        grid=(batch, heads, blocks),
        in_specs=[
            whole,
            {name: spec(x.shape[3], x.shape[2]) for name, x in tokens.items()},
            {name: matrix(x) for name, x in matrices.items()},
        ],
        out_specs=[
            whole,
            {name: spec(width) for name, (width, _) in walk.outputs.items()},
            matrix(kept) if walk.keep else None,
        ],
        out_shape=[
            jax.ShapeDtypeStruct(carry.shape, carry.dtype),
            {name: jax.ShapeDtypeStruct(shape(width), dtype) for name, (width, dtype) in walk.outputs.items()},
            kept if walk.keep else None,
        ],
        scratch_shapes=[pltpu.VMEM((K, V), carry.dtype)],
        compiler_params=tpu_parameters("parallel", "parallel", "arbitrary"),
        interpret=interpret,
    )(carry, {name: tiled(x) for name, x in tokens.items()}, matrices)
    return final, {name: untiled(x) for name, x in outputs.items()}, carries
