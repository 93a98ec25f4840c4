"""A step over blocks of time, with a matrix carried from one to the next, for every sequence and head.

    for each batch b, head h:   for each block i of `size` tokens (from the last one, in reverse):
        carry, outputs[i] = step(carry, blocks of tokens, matrices of the block)

A TPU walks through the blocks one after the other, the carry in its vector memory, while the next block is on its way.
A GPU has too many processors for that: it goes through time once for the carries alone, each program with some columns
of them, and then makes the outputs of all blocks at once. What a step computes and nobody reads costs nothing: the
compiler leaves it out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .lanes import Affine, Lanes, lanes
from .tiles import tile
from .within_chunk import WithinChunk, matrix_width

Arrays = dict[str, jax.Array]
#: carry `K V`, tokens `C W`, matrices `K V` → carry, outputs `C W`.
Step = Callable[[WithinChunk, jax.Array, Arrays, Arrays], tuple[jax.Array, Arrays]]


class Walk(NamedTuple):
    """What is walked over, and how: tokens `B T H W`, matrices `B N H K V` of N = T / size blocks, a carry `B H K V`.

    Tokens may have fewer heads, each for a run of those of the carry. `outputs` are widths and dtypes of outputs
    `B T H W`, or of one row a block, as the tokens of that name are. `columns` names the tokens and outputs that lie
    along the columns of the carry; all others are sums over these.
    With `keep` the carries before each block are returned, in the form of matrices; where the carries of all blocks are
    in memory at once they are `kept` in this dtype. A step that takes derivatives `differentiates`.
    """

    size: int
    outputs: dict[str, tuple[int, Any]]
    columns: tuple[str, ...] = ()
    reverse: bool = False
    keep: bool = False
    differentiates: bool = False
    kept: Any = None

    def place(self, i, blocks: int):
        return blocks - 1 - i if self.reverse else i


Result = tuple[jax.Array, Arrays, jax.Array | None]  # carry, outputs, carries


class Walker(NamedTuple):
    """`walk(step, path, carry, tokens, matrices)` is what this file is about.

    Where it pays to make beforehand what no carry is needed for, `each(step, size, channels, tokens, differentiates)`
    are the outputs of a step without one, `step(within, tokens)` of so many channels, of all blocks at once. An output
    of one row is one of its block: an array `B N H W`, which goes with the tokens then.
    """

    walk: Callable[..., Result]
    each: Callable[..., Arrays] | None = None


def on_platforms(f: Callable, table: str, length: int, size: int | None, *arrays):
    """`f(walker, block size, *arrays)` on the platform the program is lowered for; a CPU interprets the TPU's kernel.

    `table` is the one that tiles are chosen from. A walker's `step` is called with the arithmetic of the platform
    first. A block is a power of two, 16 at least.

    Raises:
      NotImplementedError: as `check_unchecked`.
    """
    check_unchecked(arrays)
    widest = max(x.shape[-1] for x in jax.tree.leaves(arrays))
    block = lambda platform: matrix_width(size or min(tile(table, platform, widest)["block"], length))
    on = lambda platform, walker: partial(f, walker, block(platform))
    cpu, tpu, gpu = Walker(partial(on_tpu, interpret=True)), Walker(on_tpu), walker_of_gpu(table)
    return lax.platform_dependent(*arrays, cpu=on("tpu", cpu), tpu=on("tpu", tpu), cuda=on("gpu", gpu))


def head_for(own: int, heads: int) -> Callable:
    """Which of its `own` heads an array has for each of all heads."""
    return lambda h: h if own == heads else lax.div(h, np.int32(heads // own))


def check_unchecked(arrays) -> None:
    """Raise inside a `jax.shard_map` that tracks which axes its values vary over.

    Raises:
      NotImplementedError: an interpreted kernel, which is traced whatever the platform, loses track.
    """
    varying = {axis for x in jax.tree.leaves(arrays) for axis in jax.typeof(x).manual_axis_type.varying}
    if varying:
        axes = ", ".join(sorted(varying))
        raise NotImplementedError(f"impl='pallas' inside jax.shard_map over {axes} takes check_vma=False there.")


def _filled_up(walked: Callable, fit: Callable, walk: Walk, carry, tokens: Arrays, matrices: Arrays) -> Result:
    """What is `walked`, with heads that are as wide as `fit` makes of their width: channels of zeros, cut off again."""
    K, V = carry.shape[2:]

    def width(name, own: int) -> int:  # one channel that all others share stays one
        shared = own == 1 and (V if name in walk.columns else K) > 1
        return own if shared else fit(own)

    fill = lambda x, *widths: jnp.pad(x, [(0, 0)] * (x.ndim - len(widths)) + [(0, w) for w in widths])
    filled = lambda x: fill(x, fit(K) - K, fit(V) - V)
    carry, matrices = filled(carry), {name: filled(x) for name, x in matrices.items()}
    tokens = {name: fill(x, width(name, x.shape[3]) - x.shape[3]) for name, x in tokens.items()}
    wide = walk._replace(outputs={name: (width(name, w), dtype) for name, (w, dtype) in walk.outputs.items()})
    final, outputs, carries = walked(wide, carry, tokens, matrices)
    cut = {name: outputs[name][..., :width] for name, (width, _) in walk.outputs.items()}
    return final[..., :K, :V], cut, None if carries is None else carries[..., :K, :V]


# ---- TPU ------------------------------------------------------------------------------------------------------------


def on_tpu(step: Step, walk: Walk, carry, tokens: Arrays, matrices: Arrays, *, interpret: Any = False) -> Result:
    more_than_one = lambda width: max(width, 2)  # Mosaic makes a sum of a product over one channel, in its own dtype
    walked = partial(_on_tpu, step, interpret=interpret)
    return _filled_up(walked, more_than_one, walk, carry, tokens, matrices)


def _on_tpu(step: Step, walk: Walk, carry, tokens: Arrays, matrices: Arrays, *, interpret: Any) -> Result:
    from jax.experimental.pallas import tpu as pltpu

    batch, heads, K, V = carry.shape
    length = next(iter(tokens.values())).shape[1]
    blocks, size = length // walk.size, walk.size
    within = WithinChunk(lax.Precision.HIGHEST, walk.differentiates)

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


# ---- GPU ------------------------------------------------------------------------------------------------------------


def walker_of_gpu(table: str, interpret: bool = False) -> Walker:
    return Walker(partial(_on_gpu, table, interpret), partial(_each_on_gpu, table, interpret))


def _on_gpu(table: str, interpret: bool, step: Step, walk: Walk, carry, tokens: Arrays, matrices: Arrays) -> Result:
    step = partial(step, arithmetic_of_gpu((carry, tokens), interpret, walk.differentiates))

    def walked(walk: Walk, carry, tokens: Arrays, matrices: Arrays) -> Result:
        chosen = tile(table, "gpu", max(carry.shape[2:]))
        final, carries = _in_lanes(step, walk, chosen, carry, tokens, matrices, interpret)
        outputs: Arrays = {}
        for some in _groups(walk, chosen["sums"]):
            outputs |= _outputs(step, some, chosen, carry.dtype, carries, tokens, matrices, interpret)
        return final, outputs, carries if walk.keep else None

    return _filled_up(walked, matrix_width, walk, carry, tokens, matrices)


def _groups(walk: Walk, most: int) -> list[Walk]:
    """Walks of at most so many outputs that are sums over columns: a program has registers for no more."""
    along = {name: x for name, x in walk.outputs.items() if name in walk.columns}
    sums = [item for item in walk.outputs.items() if item[0] not in along]
    size = -(-len(sums) // -(-len(sums) // most)) if sums else 1
    groups = [dict(sums[i : i + size]) for i in range(0, len(sums), size)] or [{}]
    groups[0] |= along
    return [walk._replace(outputs=outputs) for outputs in groups if outputs]


def _each_on_gpu(
    table: str, interpret: bool, step: Callable, size: int, channels: int, tokens: Arrays, differentiates: bool = False
) -> Arrays:
    """Widths of outputs are filled up as those of tokens are."""
    batch, length, _, _ = max((x.shape for x in tokens.values()), key=lambda shape: shape[1])
    heads, blocks = max(x.shape[2] for x in tokens.values()), length // size
    # One channel that all others share stays one.
    wide = lambda width: width if width == 1 < channels else matrix_width(width)
    tokens = {name: jnp.pad(x, ((0, 0),) * 3 + ((0, wide(x.shape[3]) - x.shape[3]),)) for name, x in tokens.items()}
    step = partial(step, arithmetic_of_gpu(tokens, interpret, differentiates))
    rows = lambda x: x.shape[1] // blocks
    found = jax.eval_shape(step, {k: jax.ShapeDtypeStruct((rows(x), x.shape[3]), x.dtype) for k, x in tokens.items()})

    def spec(rows: int, width: int, own: int = heads):
        serving = head_for(own, heads)
        return pl.BlockSpec((None, rows, None, width), lambda b, h, i: (b, i, serving(h), 0))

    def kernel(refs, outputs):
        for name, value in step({name: ref[...] for name, ref in refs.items()}).items():
            outputs[name][...] = value

    return pl.pallas_call(
        kernel,
        grid=(batch, heads, blocks),
        in_specs=[{name: spec(rows(x), x.shape[3], x.shape[2]) for name, x in tokens.items()}],
        out_specs={name: spec(*x.shape) for name, x in found.items()},
        out_shape={
            name: jax.ShapeDtypeStruct((batch, blocks * x.shape[0], heads, x.shape[1]), x.dtype)
            for name, x in found.items()
        },
        compiler_params=triton_parameters({"warps": tile(table, "gpu", channels)["warps_before"]}),
        interpret=interpret,
    )(tokens)


def arithmetic_of_gpu(arrays, interpret: Any, differentiates: bool = False) -> WithinChunk:
    wide = interpret or any(x.dtype == jnp.float64 for x in jax.tree.leaves(arrays))
    exact = lax.Precision.HIGHEST if wide else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return WithinChunk(exact, differentiates)


def _in_lanes(step, walk: Walk, chosen, carry, tokens: Arrays, matrices: Arrays, interpret):
    """The last carry and, of every block, the one before it."""
    batch, heads, K, V = carry.shape
    blocks = max(x.shape[1] for x in tokens.values()) // walk.size
    programs = batch * heads * (V // min(chosen["columns"], V))
    some = Lanes(lanes(chosen["programs"], programs, blocks // 8, walks=3), walk.reverse)
    tokens, matrices = some.apart((tokens, matrices))
    run = partial(_carries, step, walk, chosen)

    def ends(zero):
        """Columns know nothing of one another: those of the unit matrix are walked as others are, without inputs."""
        unit = jnp.broadcast_to(jnp.eye(K, dtype=carry.dtype), (*zero.shape[:3], K))
        none = lambda x: jnp.zeros((*x.shape[:-1], K), x.dtype)
        of_unit = {name: none(x) if name in walk.columns else x for name, x in tokens.items()}
        units, _ = run(unit, of_unit, jax.tree.map(none, matrices), interpret, keep=False)
        return Affine(units, run(zero, tokens, matrices, interpret, keep=False)[0])

    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    starts = some.starts(lambda like: ends(jnp.zeros_like(like)), product, product, carry)
    final, carries = run(starts, tokens, matrices, interpret)
    return some.end(final), some.together(carries)


def _carries(step, walk: Walk, chosen, carry, tokens: Arrays, matrices: Arrays, interpret, keep: bool = True):
    """A loop over time for some of the columns."""
    batch, heads, K, V = carry.shape
    blocks, part = max(x.shape[1] for x in tokens.values()) // walk.size, min(chosen["columns"], V)
    rows = {name: x.shape[1] // blocks for name, x in tokens.items()}

    def token(name):
        _, length, own, width = tokens[name].shape
        serving = head_for(own, heads)
        if name in walk.columns:
            return pl.BlockSpec((None, length, None, part), lambda b, h, j: (b, 0, serving(h), j))
        return pl.BlockSpec((None, length, None, width), lambda b, h, j: (b, 0, serving(h), 0))

    matrix = pl.BlockSpec((None, blocks, None, K, part), lambda b, h, j: (b, 0, h, 0, j))
    state = pl.BlockSpec((None, None, K, part), lambda b, h, j: (b, h, 0, j))

    def kernel(start, token_refs, matrix_refs, final, carries):
        def block(i, S):
            i = walk.place(i, blocks)
            if keep:
                carries[i] = S.astype(carries.dtype)
            here = {name: ref[pl.ds(i * rows[name], rows[name]), :] for name, ref in token_refs.items()}
            return step(S, here, {name: ref[i] for name, ref in matrix_refs.items()})[0]

        final[...] = lax.fori_loop(0, blocks, block, start[...])

    return pl.pallas_call(
        kernel,
        grid=(batch, heads, V // part),
        in_specs=[state, {name: token(name) for name in tokens}, {name: matrix for name in matrices}],
        out_specs=[state, matrix if keep else None],
        out_shape=[
            jax.ShapeDtypeStruct(carry.shape, carry.dtype),
            jax.ShapeDtypeStruct((batch, blocks, heads, K, V), walk.kept or carry.dtype) if keep else None,
        ],
        compiler_params=triton_parameters(chosen),
        interpret=interpret,
    )(carry, tokens, matrices)


def _outputs(step, walk: Walk, chosen, dtype, carries, tokens: Arrays, matrices: Arrays, interpret) -> Arrays:
    """The outputs of all blocks, each from the carry before it.

    Some columns of the carry at a time: outputs that lie along them are written so, others are sums over all of them.
    """
    batch, blocks, heads, K, V = carries.shape
    part = min(chosen["columns"], V)
    rows = {name: x.shape[1] // blocks for name, x in tokens.items()}
    rows |= {name: rows.get(name, walk.size) for name in walk.outputs}

    def spec(name: str, width: int, own: int = heads):
        serving = head_for(own, heads)
        return pl.BlockSpec((None, rows[name], None, width), lambda b, h, i: (b, i, serving(h), 0))

    matrix = pl.BlockSpec((None, None, None, K, V), lambda b, h, i: (b, i, h, 0, 0))

    def kernel(carry, token_refs, matrix_refs, outputs):
        def columns(j, totals):
            here = pl.ds(j * part, part)
            of = lambda name, ref: ref[:, here] if name in walk.columns else ref[...]
            beside = {name: ref[:, here] for name, ref in matrix_refs.items()}
            _, found = step(
                carry[:, here].astype(dtype), {name: of(name, ref) for name, ref in token_refs.items()}, beside
            )
            for name in outputs.keys() - totals.keys():
                outputs[name][:, here] = found[name].astype(outputs[name].dtype)
            return {name: total + found[name].astype(total.dtype) for name, total in totals.items()}

        sums = {
            name: jnp.zeros((rows[name], width), dtype)
            for name, (width, _) in walk.outputs.items()
            if name not in walk.columns
        }
        for name, total in lax.fori_loop(0, V // part, columns, sums).items():
            outputs[name][...] = total.astype(outputs[name].dtype)

    return pl.pallas_call(
        kernel,
        grid=(batch, heads, blocks),
        in_specs=[
            matrix,
            {name: spec(name, x.shape[3], x.shape[2]) for name, x in tokens.items()},
            {name: matrix for name in matrices},
        ],
        out_specs={name: spec(name, width) for name, (width, _) in walk.outputs.items()},
        out_shape={
            name: jax.ShapeDtypeStruct((batch, blocks * rows[name], heads, width), dtype)
            for name, (width, dtype) in walk.outputs.items()
        },
        compiler_params=triton_parameters(chosen),
        interpret=interpret,
    )(carries, tokens, matrices)


def tpu_parameters(*semantics: Literal["parallel", "arbitrary"]):
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(dimension_semantics=semantics)


def triton_parameters(chosen: dict[str, int]):
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=chosen["warps"], num_stages=chosen.get("stages", 1))
