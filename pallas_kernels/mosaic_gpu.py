"""Mosaic for NVIDIA GPUs: a pipeline of blocks of time, and what has to be known to write for it.

It multiplies no plain arrays, and a sum over threads stops all of them. What is left is arithmetic of every channel for
itself, on rows `1 W`.
"""

from collections.abc import Callable
from math import prod

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import add_jaxvals_p, add_p

from .channel_blocks import Blocks, by_kind, load, store

#: Threads of a warp group, which have a channel each.
THREADS = 128
#: Bytes of shared memory for the blocks of a program: half of a Hopper's, so that a processor has two programs.
SHARED_MEMORY = 112 * 2**10


def compiles_here() -> bool:
    """Whether Mosaic compiles for the GPU there is: Hopper and later, and so for one that is elsewhere."""
    major, _, _ = getattr(jax.devices()[0], "compute_capability", "9.0").partition(".")
    return not major.isdigit() or int(major) >= 9  # AMD's are names, and for kernels of another platform


def with_known_sums(f: Callable) -> Callable:
    """`f` with `add` in place of `add_any`, by which JAX sums cotangents and which Mosaic has no rule for on a GPU.

    Those of `f` itself, not of functions jitted inside it: it is plain arithmetic.
    """

    def run(*args):
        traced, like = jax.make_jaxpr(f, return_shape=True)(*args)
        known = lambda eqn: eqn.replace(primitive=add_p) if eqn.primitive is add_jaxvals_p else eqn
        jaxpr = traced.jaxpr.replace(eqns=[known(eqn) for eqn in traced.jaxpr.eqns])
        values = jaxpr_as_fun(traced.replace(jaxpr=jaxpr))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(like), values)

    return run


def in_pipeline(body: Callable, blocks: Blocks, batch: int, reads, writes, *, steps: int, interpret):
    """A body of `channel_blocks` where so many blocks are in shared memory or on their way there, if they find room.

    Results are written to memory directly.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    size = lambda kind, x: prod(n or 1 for n in blocks.of(kind, x)[0]) * x.dtype.itemsize
    room = SHARED_MEMORY // sum(jax.tree.leaves(by_kind(size, reads)))

    def kernel(refs, written):
        b, j = lax.axis_index("sequence"), lax.axis_index("part")
        start, final = refs.pop("carry"), written.pop("carry")

        def incoming(kind, ref):
            shape, which = blocks.of(kind, ref)
            return plgpu.BlockSpec(shape, lambda i: which(b, j, i))

        def block(kind, ref, i):
            shape, which = blocks.of(kind, ref)
            at = zip(shape, which(b, j, i), strict=True)
            return ref.at[tuple(n if size is None else pl.ds(n * size, size) for size, n in at)]

        def step(indices, *come):
            *here, carry = come
            there = by_kind(lambda kind, ref: block(kind, ref, indices[0]), written)
            carry = body(jax.tree.unflatten(jax.tree.structure(refs), here), there, carry, blocks.over_strides)
            plgpu.commit_smem()  # all threads have read a block before another one comes into its place
            return carry

        own = lambda carry: jax.tree.map(lambda ref: block("carry", ref, 0), carry)
        walk = plgpu.emit_pipeline(
            step,
            grid=(blocks.number,),
            in_specs=jax.tree.leaves(by_kind(incoming, refs)),
            max_concurrent_steps=max(1, min(steps, room)),
            init_carry=load(own(start)),
        )
        store(own(final), walk(*jax.tree.leaves(refs)))

    return plgpu.kernel(
        kernel,
        out_type=writes,
        grid=(batch, blocks.parts),
        grid_names=("sequence", "part"),
        # Else Mosaic has threads wait for each other before and after each row that they write.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(reads)
