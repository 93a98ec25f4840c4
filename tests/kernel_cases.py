"""The ops that have kernels, inputs of theirs, and what each is compared with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from families import assert_close, cast, log_decays, normals, segments

from jaxseq import ops

MATRIX = {
    "gla per channel": (ops.gated_linear_attention, "B T H K"),
    "gla per head": (ops.gated_linear_attention, "B T H"),
    "gla no decay": (ops.gated_linear_attention, None),
    "gla per value": (partial(ops.gated_linear_attention, decay_axis="value"), "B T H V"),
    "delta_rule": (ops.delta_rule, None),
    "delta_rule per head": (ops.delta_rule, "B T H"),
    "delta_rule per channel": (ops.delta_rule, "B T H K"),
    "dplr_recurrence": (ops.dplr_recurrence, "B T H K"),
}
#: Whose tiles they have.
TABLES = {name: op.__name__ for name, (op, _) in MATRIX.items() if not name.startswith("gla")}
TABLES |= {"gla per channel": "gated_linear_attention_by_key", "gla per value": "gated_linear_attention_by_value"}
TABLES |= dict.fromkeys(("gla per head", "gla no decay"), "gated_linear_attention_by_head")
#: To a kernel no decay is one of each head.
DISTINCT = [name for name in MATRIX if name not in ("gla no decay", "delta_rule")]
CHANNELS = {
    "linear_recurrence": (ops.linear_recurrence, False),
    "linear_recurrence complex": (ops.linear_recurrence, True),
    "selective_scan": (ops.selective_scan, False),
}


ATTENTION = {
    "attention": dict(),
    "attention window": dict(window=40),
    "attention both ways": dict(causal=False, window=20, logit_softcap=2.0),
}


def matrix_inputs(op, length, decay="B T H K", dtype=np.float32, K=32, V=32, B=2, H=2, strength="strong", seed=0):
    """Arguments of a matrix-state op; transitions grow nothing."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    draw = lambda *shape: rng.standard_normal(shape)
    inputs = dict(query=draw(B, length, H, K), key=unit(draw(B, length, H, K)), value=draw(B, length, H, V))
    shape = {"B T H K": (B, length, H, K), "B T H V": (B, length, H, V), "B T H": (B, length, H)}.get(decay)
    inputs |= {"log_decay": log_decays(rng, shape, strength)} if shape else {}
    if op is ops.delta_rule:
        inputs |= {"beta": rng.uniform(0, 1, (B, length, H))}
    if op is ops.dplr_recurrence:
        inputs |= {"a": -inputs["key"], "b": rng.uniform(0, 1, (B, length, H, 1)) * inputs["key"]}
    inputs |= {"initial_state": draw(B, H, K, V)}
    return cast(inputs, dtype), jnp.asarray(segments(rng, B, length)) if length > 1 else None


def shared(inputs):
    """One head of queries and keys, and of what is made of them."""
    return {k: x[:, :, :1] if k in ("query", "key", "a", "b") else x for k, x in inputs.items()}


def channel_inputs(op, length, dtype=np.float32, B=2, D=40, N=4, complex_=False):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if complex_ else 0)
    ids = jnp.asarray(segments(rng, B, length))
    if op is ops.linear_recurrence:
        decay = 0.6 * draw(B, length, D)
        inputs = dict(decay=decay / (1 + abs(decay)), inputs=draw(B, length, D), initial_state=draw(B, D))
        return cast(inputs, dtype), ids
    moving = {name: draw(B, length, N) for name in "BC"}
    inputs = dict(x=draw(B, length, D), dt=-log_decays(rng, (B, length, D), "strong"), A=-rng.uniform(0, 2, (D, N)))
    return cast(inputs | moving | {"initial_state": draw(B, D, N)}, dtype), ids


def attention_inputs(length, dtype=np.float32, B=2, H=4, groups=2, K=32, V=24, past=0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape)
    inputs = dict(query=draw(B, length, H, K), key=draw(B, past + length, groups, K))
    return cast(inputs | {"value": draw(B, past + length, groups, V)}, dtype)


def everything(op, ids, impl):
    """Inputs → values, final state and every gradient."""

    def run(inputs):
        options = {} if ids is None else {"segment_ids": ids}
        values, pull = jax.vjp(lambda inputs: op(**inputs, **options, impl=impl), inputs)
        rng = np.random.default_rng(1)
        return values, pull(jax.tree.map(lambda c, v: jnp.asarray(c, v.dtype), normals(rng, values), values))

    return jax.jit(run)


def check(op, inputs, ids, tolerance="float32 strong"):
    """The kernel in float32 or bfloat16 against `sequential` in float64, on the numbers that the kernel sees."""
    with jax.enable_x64(True):
        expected = jax.device_get(everything(op, ids, "sequential")(cast(inputs, np.float64)))
    assert_close(everything(op, ids, "pallas")(inputs), expected, tolerance)
