"""h_t = (log_decay_t + h_{t-1}) ⊕ log_inputs_t, elementwise: running sums of exponentials, and running maxima."""

from functools import partial

import jax.numpy as jnp

from .. import scan
from ..monoid import LogAffine, log_affine, max_affine
from ..segments import segment_starts
from ..shapes import Array, Float, Int, accumulator, typed, zeros_from
from ..sharded import across_devices, own
from .dispatch import dispatch
from .log_matmul import Semiring

SEMIRINGS = {"log_sum_exp": log_affine, "max_plus": max_affine}


@typed
def log_recurrence(
    log_decay: Float[Array, "B T *D"] | None,
    log_inputs: Float[Array, "B T *D"],
    *,
    initial_state: Float[Array, "B *D"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    semiring: Semiring = "log_sum_exp",
    impl: str | None = None,
) -> tuple[Float[Array, "B T *D"], Float[Array, "B *D"]]:
    """All states of an elementwise linear recurrence over a semiring, and the last one.

        h_t = (log_decay_t + h_{t-1}) ⊕ log_inputs_t

    ⊕ is log (exp + exp): the logs of `linear_recurrence` on positive numbers, at any magnitude; or max for "max_plus".
    Without decay (None, all zeros) h is the running log Σ exp, or the running maximum. `initial_state` is h_0, and −∞,
    a sum of nothing, when None; at a change of `segment_ids` the state restarts from there. Inputs may be −∞: values
    and gradients stay without NaN. States have the dtype of the inputs; sums and the final state are kept in at least
    float32.

    Raises:
      ValueError: shapes disagree, T = 0, or `semiring` is none of the two.
      NotImplementedError: `impl` is none of the forms.
    """
    if log_inputs.shape[1] == 0:
        raise ValueError(f"log_inputs has shape {log_inputs.shape}; log_recurrence takes at least one step of time.")
    if semiring not in SEMIRINGS:
        raise ValueError(f"semiring={semiring!r}; log_recurrence takes {' or '.join(map(repr, SEMIRINGS))}.")
    dtype, monoid = accumulator(log_inputs.dtype), SEMIRINGS[semiring]
    inputs = log_inputs.astype(dtype)
    decay = jnp.zeros_like(inputs) if log_decay is None else log_decay.astype(dtype)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)
        decay = jnp.where(starts.reshape(*starts.shape, *(1,) * (inputs.ndim - 2)), -jnp.inf, decay)
    start = jnp.full(inputs[:, 0].shape, -jnp.inf) if initial_state is None else initial_state
    decay, inputs, state = own((decay, inputs, zeros_from(inputs, start.shape, dtype, plus=start)))
    forms = {
        name: partial(form, monoid, LogAffine(decay, inputs))
        for name, form in {"sequential": scan.sequential, "parallel": scan.parallel, "chunked": scan.chunked}.items()
    }
    run = dispatch("log_recurrence", impl, forms, {"cpu": "sequential", "default": "parallel"})
    total = lambda: LogAffine(jnp.sum(decay, axis=1), run(jnp.full_like(state, -jnp.inf))[1])
    states, final = across_devices(monoid, total, run, state)
    return states.astype(log_inputs.dtype), final
