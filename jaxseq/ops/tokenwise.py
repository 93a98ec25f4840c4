"""Recurrences of every channel for itself in a kernel: `pallas_kernels.by_token` with its gradient."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.by_token import Inputs, by_token, pulled_back
from pallas_kernels.channel_programs import whole


def tokenwise(token: Callable, outputs: tuple[str, ...], inputs: Inputs, idle: dict[str, float], reverse: bool = False):
    """The last states and the outputs `B T D` of a recurrence; rows of `idle` values, else zeros, change no state."""
    length = next(iter(inputs.rows.values())).shape[1]

    def fill(name, x):  # at the end, where time is reversed before the first token
        return jnp.pad(x, ((0, 0), (0, whole(length) - length), (0, 0)), constant_values=idle.get(name, 0))

    over_time = ("rows", "shared", "flags")
    filled = {kind: {name: fill(name, x) for name, x in getattr(inputs, kind).items()} for kind in over_time}
    state, out = _run(token, outputs, reverse, inputs._replace(**filled))
    return state, {name: y[:, :length] for name, y in out.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(token, outputs, reverse, inputs):
    return by_token(token, outputs, reverse, False, inputs)[:2]


def _forward(token, outputs, reverse, inputs):
    state, out, kept = by_token(token, outputs, reverse, True, inputs)
    return (state, out), (inputs, kept)


def _backward(token, outputs, reverse, residuals, cotangents):
    return (pulled_back(token, reverse, *residuals, *cotangents),)


_run.defvjp(_forward, _backward)
