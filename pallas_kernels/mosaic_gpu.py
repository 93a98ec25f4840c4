"""Mosaic for NVIDIA GPUs: a pipeline of blocks of time, and what has to be known to write for it.

It multiplies what lies in shared memory in layouts of its own, and no plain arrays, and a sum over threads stops all of
them. What is left is arithmetic of every channel for itself, on rows `1 W`.
"""

from collections.abc import Callable
from math import prod

import jax
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import add_jaxvals_p, add_p

from .channel_blocks import Blocks, by_kind, load, store

#: Threads of a warp group, which have a channel each.
THREADS = 128
#: Bytes of shared memory for the blocks of a program: half of a Hopper's, so that a processor has two programs.
SHARED_MEMORY = 112 * 2**10


#: What the kinds of devices are called that Mosaic compiles for, Hopper and Blackwell of data centres.
KINDS = ("H100", "H200", "B200", "B300")


def compiles() -> bool:
    """Whether Mosaic compiles for the GPU there is, or for the one that the program is lowered for by name."""
    here, named = jax.devices()[0], jax.sharding.get_abstract_mesh().abstract_device
    if named is not None and named.device_kind != here.device_kind:
        return any(kind in named.device_kind for kind in KINDS)
    return getattr(here, "compute_capability", "").partition(".")[0] in ("9", "10")


def fills(channels: int) -> bool:
    """Whether no more than a fifth of the threads would have nothing to do."""
    return -(-channels // THREADS) * THREADS <= 1.25 * channels


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
        program = lax.axis_index("program")  # one axis: others may not be as long as there are sequences
        b, j = lax.div(program, np.int32(blocks.parts)), lax.rem(program, np.int32(blocks.parts))
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
        grid=(batch * blocks.parts,),
        grid_names=("program",),
        # Else Mosaic has threads wait for each other before and after each row that they write.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
    )(reads)
