"""Axis letters, the same in every annotation and einsum string, and the decorator that checks them.

B batch · T time · D model width · H heads · K key width per head · V value width per head · N state size ·
W window · C chunk.  Arrays lead with batch and time, heads follow time.
"""

import functools
import inspect
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import AbstractArray, Array, Bool, Complex, Float, Inexact, Int, jaxtyped

__all__ = [
    "Array",
    "Bool",
    "Complex",
    "Float",
    "Inexact",
    "Int",
    "accumulator",
    "check_width",
    "known",
    "promoted",
    "typed",
    "zeros_from",
]


def typed(function):
    """Check array arguments and results against their jaxtyping annotations, at trace time.

    Axes bind across arguments: `"B T H K"` twice means the same four sizes. NumPy arrays are taken as JAX arrays.
    The error names the argument, its shape and dtype, what is allowed, and the sizes already seen.

    Raises:
      TypeError: an argument is no array, or its dtype is of another kind.
      ValueError: an argument has another rank, or a size that disagrees with an earlier argument.
    """
    signature = inspect.signature(function)
    annotated = {n: p.annotation for n, p in signature.parameters.items() if _array_types(p.annotation)}
    results = signature.return_annotation
    results = get_args(results) if getattr(results, "__origin__", None) is tuple else (results,)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        with jaxtyped("context"):
            seen: list[str] = []
            for name, annotation in annotated.items():
                value = bound.arguments.get(name)
                if isinstance(value, np.ndarray | np.generic):
                    value = bound.arguments[name] = jnp.asarray(value)
                if name in bound.arguments and not isinstance(value, annotation):
                    raise _mismatch(function.__qualname__, name, value, annotation, seen)
                if isinstance(value, jax.Array):
                    seen.append(f"{name} {value.shape}")
            result = function(*bound.args, **bound.kwargs)
            values = result if len(results) > 1 else (result,)
            for i, (value, annotation) in enumerate(zip(values, results, strict=False)):
                if _array_types(annotation) and not isinstance(value, annotation):
                    raise _mismatch(function.__qualname__, f"result {i}", value, annotation, seen)
        return result

    checked.is_typed = True  # type: ignore[attr-defined]
    return checked


def _array_types(annotation) -> list[Any]:
    """The jaxtyping array types among the members of an annotation."""
    return [t for t in (get_args(annotation) or (annotation,)) if isinstance(t, type) and issubclass(t, AbstractArray)]


def _mismatch(function: str, name: str, value, annotation, seen: list[str]) -> Exception:
    allowed = " or ".join(f"{t.__name__.split('[')[0]} {t.dim_str!r}" for t in _array_types(annotation))
    where = f" beside {', '.join(seen)}" if seen else ""
    if not isinstance(value, jax.Array):
        return TypeError(f"{name}={value!r} is no array; {function} takes {allowed}{where}.")
    found = f"{name} has shape {value.shape} and dtype {value.dtype}"
    kind = all(not jnp.issubdtype(value.dtype, _kind(t)) for t in _array_types(annotation))
    return (TypeError if kind else ValueError)(f"{found}; {function} takes {allowed}{where}.")


def _kind(array_type) -> type:
    kinds = {"Float": jnp.floating, "Int": jnp.integer, "Bool": jnp.bool_, "Complex": jnp.complexfloating}
    return kinds.get(array_type.__name__.split("[")[0], jnp.inexact)


def check_width(x: Array, d_model: int, owner: str) -> None:
    """Raise unless x `B T …` has one sequence or more, of one step or more, of this width."""
    for axis, least in enumerate(("sequence", "step of time")):
        if x.shape[axis] == 0:
            raise ValueError(f"x has shape {x.shape}; {owner} takes at least one {least}.")
    if x.shape[-1] != d_model:
        raise ValueError(f"x has width {x.shape[-1]}; {owner}(d_model={d_model}) takes inputs of width {d_model}.")


def known(x) -> np.ndarray | None:
    """The values of an array, for checks; None while it is traced, or where there is none."""
    return None if x is None or isinstance(x, jax.core.Tracer) else np.asarray(x)


def check_log_decay(log_decay, owner: str) -> None:
    """Raise where log decays are known and above zero, or no numbers."""
    if (values := known(log_decay)) is not None and not (values <= 0).all():
        raise ValueError(f"log_decay holds {values[~(values <= 0)][0]}; {owner} takes natural logs of 0 or less.")


def promoted(*dtypes) -> jnp.dtype:
    """The dtype that holds them all, also where JAX is told to promote nothing of itself."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def accumulator(*dtypes) -> jnp.dtype:
    """The dtype sums and states of these dtypes are kept in: at least float32."""
    return promoted(jnp.float32, *dtypes)


def zeros_from(array: Array, shape: tuple[int, ...], dtype, plus: Array | None = None) -> Array:
    """Zeros, or `plus`, that vary over the mesh axes of `array`, as a scan's carry inside `shard_map` has to."""
    never = (array.reshape(-1)[0] == 0) & False  # of the array's axes, and zero also where it is NaN
    return (jnp.zeros(shape, dtype) if plus is None else plus.astype(dtype)) + never.astype(dtype)
