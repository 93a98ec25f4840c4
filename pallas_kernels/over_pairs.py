"""A fold over blocks of keys for every block of queries, or the other way round, for every sequence and head.

    for each batch b, head h, block i of the first:
        for each block j of the second that `meets` says:   carry = step(carry, first block, second block, i, j, clear)
        outputs[i] = finish(carry)

What matters is that pairs never leave the chip. A TPU walks through the pairs of blocks in its grid, the carry in its
vector memory; a program on a GPU loops over j.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .platforms import arithmetic_of_gpu, check_unchecked, head_for, tpu_parameters, triton_parameters
from .tiles import tile
from .within_chunk import WithinChunk

Arrays = dict[str, jax.Array]


class Span(NamedTuple):
    """Blocks from `start` to before `stop`, which are `clear` or not: what that means is the step's affair."""

    start: Any
    stop: Any
    clear: bool


class Fold(NamedTuple):
    """The parts of a fold. Blocks are `C W`; of width 1, columns `C 1` of the first and rows `1 C` of the second.

    `start(C)` is the carry of a block, `step(within, carry, first, second, i, j, clear)` the next one, and
    `finish(carry)` the outputs `C W` by name, with `outputs` their widths and dtypes. `meets(i, size)` are the spans
    of blocks of the second that a block meets, one after the other.
    """

    start: Callable[[int], Any]
    step: Callable
    finish: Callable[[Any], Arrays]
    outputs: dict[str, tuple[int, Any]]
    meets: Callable[[Any, int], list[Span]]


def over_pairs(fold: Fold, first: Arrays, second: Arrays) -> Arrays:
    """Outputs `B T H W` of a fold over `first`, `B T H W`, and `second`, `B S G W`, with G | H; heads may be 1 in both.

    Widths are 1 or those of `within_chunk.matrix_width`.

    Raises:
      NotImplementedError: as `platforms.check_unchecked`.
    """
    check_unchecked((first, second))
    on = lambda form, **options: partial(form, fold, **options)
    return lax.platform_dependent(first, second, cpu=on(on_tpu, interpret=True), tpu=on(on_tpu), cuda=on(on_gpu))


def _sizes(first: Arrays, second: Arrays):
    """Batch, heads of the outputs, and the lengths."""
    batch, length = next(iter(first.values())).shape[:2]
    heads = max(x.shape[2] for x in (*first.values(), *second.values()))
    return batch, heads, length, next(iter(second.values())).shape[1]


def _tile(platform: str, first: Arrays, second: Arrays) -> dict[str, int]:
    return tile("over_pairs", platform, max(x.shape[3] for x in (*first.values(), *second.values())))


def _filled(x, block: int):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))


def on_tpu(fold: Fold, first: Arrays, second: Arrays, *, interpret: Any = False) -> Arrays:
    from jax.experimental.pallas import tpu as pltpu

    batch, heads, length, other = _sizes(first, second)
    block = _tile("tpu", first, second)["block"]
    rows, columns = -(-length // block), -(-other // block)
    within = WithinChunk(lax.Precision.HIGHEST)

    def tiled(x):
        """A block is a tile of the last two axes; what has one channel lies along the lanes."""
        x = _filled(x, block).swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, 1, block) if x.shape[3] == 1 else x

    def spec(x, at):
        head = head_for(x.shape[1], heads)
        if x.ndim == 5:
            return pl.BlockSpec((None, None, None, 1, block), lambda b, h, i, j: (b, head(h), at(i, j), 0, 0))
        return pl.BlockSpec((None, None, block, x.shape[3]), lambda b, h, i, j: (b, head(h), at(i, j), 0))

    def met(i, j):
        """Block j, or the nearest one that is met: what is there already is not fetched again."""
        spans = fold.meets(i, block)
        return jnp.maximum(jnp.minimum(jnp.maximum(j, spans[0].start), jnp.minimum(spans[-1].stop, columns) - 1), 0)

    first, second = ({name: tiled(x) for name, x in of.items()} for of in (first, second))
    carry = jax.eval_shape(lambda: fold.start(block))
    leaves, structure = jax.tree.flatten(carry)
    shape = lambda width: (batch, heads, *((rows, 1, block) if width == 1 else (rows * block, width)))
    results = {name: jax.ShapeDtypeStruct(shape(width), dtype) for name, (width, dtype) in fold.outputs.items()}

    def kernel(first_refs, second_refs, outputs, *scratch):
        i, j = pl.program_id(2), pl.program_id(3)
        load = lambda: jax.tree.unflatten(structure, [ref[...] for ref in scratch])

        def store(carry):
            for ref, value in zip(scratch, jax.tree.leaves(carry), strict=True):
                ref[...] = value

        @pl.when(j == 0)
        def _():
            store(fold.start(block))

        def step(clear: bool):
            turned = lambda name, ref: ref[...].T if first[name].ndim == 5 else ref[...]
            here = {name: turned(name, ref) for name, ref in first_refs.items()}
            store(fold.step(within, load(), here, {name: ref[...] for name, ref in second_refs.items()}, i, j, clear))

        for span in fold.meets(i, block):
            pl.when((span.start <= j) & (j < span.stop))(partial(step, span.clear))

        @pl.when(j == columns - 1)
        def _():
            for name, value in fold.finish(load()).items():
                value = value.T if fold.outputs[name][0] == 1 else value
                outputs[name][...] = value.astype(outputs[name].dtype)

    outputs = pl.pallas_call(
        kernel,
        grid=(batch, heads, rows, columns),
        in_specs=[
            {name: spec(x, lambda i, j: i) for name, x in first.items()},
            {name: spec(x, met) for name, x in second.items()},
        ],
        out_specs={name: spec(x, lambda i, j: i) for name, x in results.items()},
        out_shape=results,
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in leaves],
        compiler_params=tpu_parameters("parallel", "parallel", "parallel", "arbitrary"),
        interpret=interpret,
    )(first, second)
    whole = lambda x: x.reshape(batch, heads, rows * block, -1).swapaxes(1, 2)[:, :length]
    return {name: whole(x) for name, x in outputs.items()}


def on_gpu(fold: Fold, first: Arrays, second: Arrays, *, interpret: Any = False) -> Arrays:
    batch, heads, length, other = _sizes(first, second)
    chosen = _tile("gpu", first, second)
    block = chosen["block"]
    rows, columns = -(-length // block), -(-other // block)
    within = arithmetic_of_gpu((first, second), interpret)
    first, second = ({name: _filled(x, block) for name, x in of.items()} for of in (first, second))
    head = lambda x: head_for(x.shape[2], heads)
    own = lambda x: pl.BlockSpec((None, block, None, x.shape[3]), lambda b, h, i: (b, i, head(x)(h), 0))
    all_of = lambda x: pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda b, h, i: (b, 0, head(x)(h), 0))
    results = {
        name: jax.ShapeDtypeStruct((batch, rows * block, heads, width), dtype)
        for name, (width, dtype) in fold.outputs.items()
    }

    def kernel(first_refs, second_refs, outputs):
        i = pl.program_id(2)
        here = {name: ref[...] for name, ref in first_refs.items()}

        def step(clear: bool, j, carry):
            turned = lambda name, value: value.T if second[name].shape[3] == 1 else value
            there = {name: turned(name, ref[pl.ds(j * block, block), :]) for name, ref in second_refs.items()}
            return fold.step(within, carry, here, there, i, j, clear)

        carry = fold.start(block)
        for span in fold.meets(i, block):
            bounds = jnp.maximum(span.start, 0), jnp.minimum(span.stop, columns)
            carry = lax.fori_loop(*bounds, partial(step, span.clear), carry)
        for name, value in fold.finish(carry).items():
            outputs[name][...] = value.astype(outputs[name].dtype)

    outputs = pl.pallas_call(
        kernel,
        grid=(batch, heads, rows),
        in_specs=[{name: own(x) for name, x in first.items()}, {name: all_of(x) for name, x in second.items()}],
        out_specs={name: own(x) for name, x in results.items()},
        out_shape=results,
        compiler_params=triton_parameters(chosen),
        interpret=interpret,
    )(first, second)
    return {name: x[:, :length] for name, x in outputs.items()}
