"""What the kernels of a platform have in common."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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


def tpu_parameters(*semantics: Literal["parallel", "arbitrary"]):
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(dimension_semantics=semantics)


def triton_parameters(chosen: dict[str, int]):
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=chosen["warps"], num_stages=chosen.get("stages", 1))
