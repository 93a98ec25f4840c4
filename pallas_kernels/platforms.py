"""What the kernels of a platform have in common."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.extend.core.primitives import add_jaxvals_p, add_p

from .within_chunk import WithinChunk


def check_unchecked(arrays) -> None:
    """Raise inside a `jax.shard_map` that tracks which axes its values vary over.

    Raises:
      NotImplementedError: an interpreted kernel, which is traced whatever the platform, loses track.
    """
    varying = {axis for x in jax.tree.leaves(arrays) for axis in jax.typeof(x).manual_axis_type.varying}
    if varying:
        axes = ", ".join(sorted(varying))
        raise NotImplementedError(f"impl='pallas' inside jax.shard_map over {axes} takes check_vma=False there.")


def head_for(own: int, heads: int) -> Callable:
    """Which of its `own` heads an array has for each of all heads."""
    return lambda h: h if own == heads else lax.div(h, np.int32(heads // own))


def arithmetic_of_gpu(arrays, interpret: Any, differentiates: bool = False) -> WithinChunk:
    wide = interpret or any(x.dtype == jnp.float64 for x in jax.tree.leaves(arrays))
    exact = lax.Precision.HIGHEST if wide else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return WithinChunk(exact, differentiates)


def has_mosaic_gpu() -> bool:
    """Whether the GPU there is takes Mosaic's kernels: a Hopper or what came later, as one that is not there does."""
    major, _, _ = getattr(jax.devices()[0], "compute_capability", "9.0").partition(".")
    return not major.isdigit() or int(major) >= 9


def with_known_sums(f: Callable) -> Callable:
    """f, whose cotangents and tangents are summed by `add`: Mosaic GPU does not know the primitive that JAX has."""

    def run(*args):
        traced, like = jax.make_jaxpr(f, return_shape=True)(*args)
        known = lambda eqn: eqn.replace(primitive=add_p) if eqn.primitive is add_jaxvals_p else eqn
        jaxpr = traced.jaxpr.replace(eqns=[known(eqn) for eqn in traced.jaxpr.eqns])
        values = jaxpr_as_fun(traced.replace(jaxpr=jaxpr))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(like), values)

    return run


def tpu_parameters(*semantics: Literal["parallel", "arbitrary"]):
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(dimension_semantics=semantics)


def triton_parameters(chosen: dict[str, int]):
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=chosen["warps"], num_stages=chosen.get("stages", 1))
