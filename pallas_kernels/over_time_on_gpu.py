"""All blocks of time at once, but for the carries.

What no carry is needed for is prepared first. Then programs go through time for the carries alone, each with some
columns of them, and where these are few time is split. Last come the outputs of all blocks. What a step computes and
nobody reads costs nothing: the compiler leaves it out.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .platforms import arithmetic_of_gpu, head_for, triton_parameters
from .splits import Affine, Splits, how_many
from .walk import Arrays, Result, Step, Sweep, Walk, Walker, filled_up, filled_width
from .within_chunk import matrix_width


def walker_of_gpu(chosen: dict[str, int], interpret: bool = False) -> Walker:
    """With these tiles."""
    return Walker(partial(_walk, chosen, interpret), partial(_each, chosen, interpret))


def _walk(chosen, interpret: bool, step: Step, walk: Walk, carry, tokens: Arrays, matrices: Arrays) -> Result:
    step = partial(step, arithmetic_of_gpu((carry, tokens), interpret, walk.differentiated))

    def walked(walk: Walk, carry, tokens: Arrays, matrices: Arrays) -> Result:
        final, carries = _in_splits(step, walk, chosen, carry, tokens, matrices, interpret)
        outputs: Arrays = {}
        for some in _groups(walk, chosen.get("sums", len(walk.outputs))):
            outputs |= _outputs(step, some, chosen, carry.dtype, carries, tokens, matrices, interpret)
        return final, outputs, carries if walk.keep else None

    return filled_up(walked, matrix_width, walk, carry, tokens, matrices)


def _groups(walk: Walk, most: int) -> list[Walk]:
    """Walks of at most so many outputs that are sums over columns: a program has registers for no more."""
    along = {name: x for name, x in walk.outputs.items() if name in walk.columns}
    sums = [item for item in walk.outputs.items() if item[0] not in along]
    size = -(-len(sums) // -(-len(sums) // most)) if sums else 1
    groups = [dict(sums[i : i + size]) for i in range(0, len(sums), size)] or [{}]
    groups[0] |= along
    return [walk._replace(outputs=outputs) for outputs in groups if outputs]


def _each(
    chosen, interpret: bool, sweeps: list[Sweep], size: int, channels: int, tokens: Arrays, whole: tuple[str, ...] = ()
) -> Arrays:
    """Widths of outputs are filled up as those of tokens are."""
    batch, length, _, _ = max((x.shape for x in tokens.values()), key=lambda shape: shape[1])
    heads, blocks = max(x.shape[2] for x in tokens.values()), length // size
    within, known = arithmetic_of_gpu(tokens, interpret), {name: tokens[name] for name in whole}
    more = lambda x: filled_width(x.shape[3], channels, matrix_width) - x.shape[3]
    fill = lambda x: jnp.pad(x, ((0, 0),) * 3 + ((0, more(x)),))
    moving = {name: fill(x) for name, x in tokens.items() if name not in whole}
    rows = lambda x: x.shape[1] // blocks
    block = lambda x: jax.ShapeDtypeStruct((rows(x), x.shape[3]), x.dtype)
    found = jax.eval_shape(partial(_at_once, within, sweeps), *jax.tree.map(block, (moving, known)))

    def spec(rows: int, width: int, own: int = heads):
        serving = head_for(own, heads)
        return pl.BlockSpec((None, rows, None, width), lambda b, h, i: (b, i, serving(h), 0))

    def kernel(refs, known_refs, outputs):
        known = {name: ref[...] for name, ref in known_refs.items()}
        for sweep in sweeps:
            finished = _swept(within, sweep, chosen["channels"], refs, known, outputs)
            known = known | finished
        for name, x in finished.items():
            outputs[name][...] = x

    return pl.pallas_call(
        kernel,
        grid=(batch, heads, blocks),
        in_specs=jax.tree.map(lambda x: spec(rows(x), x.shape[3], x.shape[2]), [moving, known]),
        out_specs={name: spec(*x.shape) for name, x in found.items()},
        out_shape={
            name: jax.ShapeDtypeStruct((batch, blocks * x.shape[0], heads, x.shape[1]), x.dtype)
            for name, x in found.items()
        },
        compiler_params=triton_parameters({"warps": chosen["warps_before"]}),
        interpret=interpret,
    )(moving, known)


def _at_once(within, sweeps: list[Sweep], moving: Arrays, known: Arrays) -> Arrays:
    """The outputs, of all channels in one part."""
    for sweep in sweeps:
        found = sweep.step(within, moving | known)
        finished = sweep.finish(within, {name: found.pop(name) for name in sweep.sums}, known)
        known = known | finished
    return found | finished


def _swept(within, sweep: Sweep, most: int, refs, known: Arrays, outputs) -> Arrays:
    """What is finished of the sums over parts of at most so many channels: registers hold no more.

    Other outputs of a part are written at once. A token of one channel is not parted, nor are those beside it.
    """
    narrowest, K = (fit(ref.shape[1] for ref in refs.values()) for fit in (min, max))
    part = min(most, K) if narrowest == K else K

    def add(j, totals):
        columns = pl.ds(j * part, part) if part < K else slice(None)
        found = sweep.step(within, {name: ref[:, columns] for name, ref in refs.items()} | known)
        totals = {name: total + found.pop(name) for name, total in totals.items()}
        for name, x in found.items():
            outputs[name][:, columns] = x
        return totals

    block = lambda ref: jax.ShapeDtypeStruct((ref.shape[0], min(ref.shape[1], part)), ref.dtype)
    like = jax.eval_shape(partial(sweep.step, within), {name: block(ref) for name, ref in refs.items()} | known)
    zeros = {name: jnp.zeros(like[name].shape, like[name].dtype) for name in sweep.sums}
    return sweep.finish(within, lax.fori_loop(0, K // part, add, zeros) if part < K else add(0, zeros), known)


def _in_splits(step, walk: Walk, chosen, carry, tokens: Arrays, matrices: Arrays, interpret):
    """The last carry and, of every block, the one before it."""
    batch, heads, K, V = carry.shape
    blocks = max(x.shape[1] for x in tokens.values()) // walk.size
    programs = batch * heads * (V // min(chosen["columns"], V))
    splits = Splits(how_many(chosen["programs"], programs, blocks, walks=3), walk.reverse)
    tokens, matrices = splits.apart((tokens, matrices))
    run = partial(_carries, step, walk, chosen)

    def ends(zero):
        """Columns know nothing of one another: those of the unit matrix are walked as others are, without inputs."""
        unit = jnp.broadcast_to(jnp.eye(K, dtype=carry.dtype), (*zero.shape[:3], K))
        none = lambda x: jnp.zeros((*x.shape[:-1], K), x.dtype)
        of_unit = {name: none(x) if name in walk.columns else x for name, x in tokens.items()}
        units, _ = run(unit, of_unit, jax.tree.map(none, matrices), interpret, keep=False)
        return Affine(units, run(zero, tokens, matrices, interpret, keep=False)[0])

    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    starts = splits.starts(lambda like: ends(jnp.zeros_like(like)), product, product, carry)
    final, carries = run(starts, tokens, matrices, interpret)
    return splits.end(final), splits.together(carries)


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
            jax.ShapeDtypeStruct((batch, blocks, heads, K, V), walk.carries_dtype or carry.dtype) if keep else None,
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
