"""The programs of kernels at the sizes of a config: what is timed, tuned, and compared with its definition."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import log_sigmoid, sigmoid, softplus

from pallas_kernels import mosaic_gpu

from .. import ops
from ..fields import check_counts
from ..layers.normalised import unit
from ..shapes import accumulator


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs, and how long to measure."""

    seed: int = 0
    """Seed of the inputs, drawn anew for every round, and of the order of calls in it."""
    tokens: int = 128
    """Tokens of all sequences together; longer ones come alone."""
    lengths: tuple[int, ...] = (128,)
    """Tokens of a sequence."""
    channels: int = 32
    """Channels of all heads together."""
    widths: tuple[int, ...] = (16,)
    """Channels of a head: of keys and of values."""
    states: int = 16
    """States a channel of the selective scan, and an eighth of those a head of SSD."""
    most_attended: int = 128
    """Longer sequences are left out of attention."""
    decoded: int = 2
    """Sequences that are decoded at once, by the ops whose names end in `step`."""
    steps: int = 4
    """Tokens of each of them, one call each."""
    error_length: int = 100
    """Tokens of the sequence that errors are measured on."""
    repeats: int = 2
    """Rounds over all programs of an op, after one to warm up; times are medians over all calls."""
    seconds: float = 0.01
    """A round calls each program for this long, once at least."""

    def __post_init__(self):
        check_counts(
            self, "tokens", "channels", "states", "most_attended", "decoded", "steps", "error_length", "repeats"
        )
        if wide := [width for width in self.widths if width < 1 or self.channels % width]:
            raise ValueError(f"widths={self.widths}: {wide[0]} does not divide channels={self.channels}.")


class Kernel(NamedTuple):
    """An op at one size, and the kernel it runs in: `width` is that of its heads, or the states of a channel.

    `flops` of a forward pass are those of matrix products, `carried` the bytes of states between calls. The first of
    the `forms` is what the others are compared with.
    """

    name: str
    length: int
    runs_in: tuple[str, ...]  # tables of pallas_kernels/tiles.json
    width: int
    op: Callable
    draw: Callable[[int, Any], tuple]  # (batch, key) -> inputs
    batch: int
    flops: float = 0.0
    peer: tuple[str, Callable] | None = None  # in fla.ops, or torch's own where "", and (function, inputs) -> output
    forms: tuple[str, ...] = ("chunked", "pallas")
    stages: tuple[str, ...] = ("forward", "training")
    carried: float = 0.0


def normals(key, *shapes):
    return [jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(shapes)]


def matrix_inputs(shape, key_width, gate, beta, key_heads, batch, key):
    """Bfloat16 tokens and float32 log decays, as strong as those of a layer early in training."""
    T, H, V = shape
    decays = {"key": (batch, T, H, key_width), "value": (batch, T, H, V), "head": (batch, T, H), None: (1,)}[gate]
    heads = (batch, T, key_heads or H, key_width)
    q, k, v, b, g = normals(key, heads, heads, (batch, T, H, V), (batch, T, H), decays)
    tokens = [x.astype(jnp.bfloat16) for x in (q, unit(k), v, sigmoid(b))]
    return *tokens[: 3 + beta], *([log_sigmoid(g + 3)] if gate else [])


def recurrence_inputs(T, D, batch, key):
    decay, inputs = normals(key, *[(batch, T, D)] * 2)
    return sigmoid(decay + 3), inputs


def selective_inputs(T, D, N, batch, key):
    x, dt, B, C = normals(key, *[(batch, T, D)] * 2, *[(batch, T, N)] * 2)
    A = -jnp.broadcast_to(jnp.arange(1.0, N + 1), (D, N))
    return x.astype(jnp.bfloat16), softplus(dt - 4), A, B.astype(jnp.bfloat16), C.astype(jnp.bfloat16)


def products(tokens, heads, key_width, value_width, corrections=0, chunk=64) -> float:
    """Of chunks: scores, their use, reading the state and writing to it; as much again for what a delta rule erases."""
    return 2.0 * tokens * heads * (1 + corrections) * (chunk * (key_width + value_width) + 2 * key_width * value_width)


def gated_linear_attention_by_value(q, k, v, g, impl):
    return ops.gated_linear_attention(q, k, v, g, decay_axis="value", impl=impl)


def dplr_recurrence(q, k, v, g, impl):
    return ops.dplr_recurrence(q, k, v, -k, 0.5 * k, g, impl=impl)


def rwkv7_of_fla(f, q, k, v, g):
    return f(q, g, k, v, -k, 0.5 * k, scale=q.shape[-1] ** -0.5)


#: Name: op, what decays (each channel of keys or of values, each head, nothing), whether there is a β, and who else has
#: a kernel for it.
MATRIX: dict[str, tuple[Callable, str | None, bool, tuple[str, Callable] | None]] = {
    "gla": (ops.gated_linear_attention, "key", False, ("gla:chunk_gla", lambda f, q, k, v, g: f(q, k, v, g))),
    "gla_by_value": (gated_linear_attention_by_value, "value", False, None),
    "retention": (
        ops.gated_linear_attention, None, False, ("simple_gla:chunk_simple_gla", lambda f, q, k, v: f(q, k, v)),
    ),
    "delta_rule": (ops.delta_rule, None, True, ("delta_rule:chunk_delta_rule", lambda f, q, k, v, b: f(q, k, v, b))),
    "gated_delta_rule": (
        ops.delta_rule, "head", True,
        ("gated_delta_rule:chunk_gated_delta_rule", lambda f, q, k, v, b, g: f(q, k, v, g, b)),
    ),
    "kda": (ops.delta_rule, "key", True, ("kda:chunk_kda", lambda f, q, k, v, b, g: f(q, k, v, g, b))),
    "dplr": (dplr_recurrence, "key", False, ("rwkv7:chunk_rwkv7", rwkv7_of_fla)),
}  # fmt: skip


def ssd_of_fla(f, q, k, v, g):
    """Which has no keys that heads share."""
    q, k = (x.expand(*v.shape[:3], -1).contiguous() for x in (q, k))
    return f(q, k, v, g)


def attention(q, k, v, impl):
    return ops.softmax_attention(q, k, v, impl=impl), None


def attention_of_torch(f, q, k, v):
    return f(*(x.swapaxes(1, 2) for x in (q, k, v)), is_causal=True).swapaxes(1, 2)


def decoding(op, *inputs, impl):
    """A call for every token: the state is read and written each time."""
    batch, _, heads, width = inputs[2].shape
    time_first = lambda x: x.swapaxes(0, 1)

    def step(S, token):
        o, S = op(*(x[:, None] for x in token), initial_state=S, impl=impl)
        return S, o[:, 0]

    start = jnp.zeros((batch, heads, inputs[1].shape[-1], width), accumulator(inputs[2].dtype))
    S, o = lax.scan(step, start, tuple(map(time_first, inputs)))
    return time_first(o), S


def table(op, gate) -> str:
    """The tiles that its kernel reads, of heads no wider than their keys; to a kernel no decay is one of each head."""
    return f"{op.__name__}_by_{gate or 'head'}" if op is ops.gated_linear_attention else op.__name__


def kernels(config: Sizes) -> Iterator[Kernel]:
    by_token, on_gpu = ("by_token", "by_token_backward"), jax.default_backend() == "gpu"
    by_mosaic = on_gpu and mosaic_gpu.compiles() and mosaic_gpu.fills(config.channels)
    elementwise = ("in_pipeline",) if by_mosaic else by_token
    D, fused = config.channels, ("fused",) * on_gpu
    for T in config.lengths:
        batch = max(1, config.tokens // T)
        tokens = batch * T
        for K in config.widths:
            shape, heads = (T, D // K, K), D // K
            for name, (op, gate, beta, peer) in MATRIX.items():
                inputs, flops = partial(matrix_inputs, shape, K, gate, beta, None), products(tokens, heads, K, K, beta)
                yield Kernel(f"{name}/{K}", T, (table(op, gate),), K, op, inputs, batch, flops, peer)
            if config.most_attended >= T:
                inputs, flops = partial(matrix_inputs, shape, K, None, False, None), tokens * T * 2.0 * D
                forms, peer = ("chunked", "pallas", *fused), ("", attention_of_torch)
                yield Kernel(f"attention/{K}", T, ("over_pairs",), K, attention, inputs, batch, flops, peer, forms)
        V, N = config.widths[0], 8 * config.states
        inputs, flops = partial(matrix_inputs, (T, D // V, V), N, "head", False, 1), products(tokens, D // V, N, V)
        peer = "simple_gla:chunk_simple_gla", ssd_of_fla
        op = ops.gated_linear_attention
        yield Kernel("ssd", T, (table(op, "head"),), max(N, V), op, inputs, batch, flops, peer)
        inputs = partial(selective_inputs, T, D, config.states)
        yield Kernel("selective_scan", T, by_token, config.states, ops.selective_scan, inputs, batch)
        inputs = partial(recurrence_inputs, T, D)
        yield Kernel("linear_recurrence", T, elementwise, 1, ops.linear_recurrence, inputs, batch)
    for K in config.widths:
        for name in ("gla", "gated_delta_rule"):
            op, gate, beta, _ = MATRIX[name]
            inputs = partial(matrix_inputs, (config.steps, D // K, K), K, gate, beta, None)
            yield Kernel(
                f"{name}_step/{K}", config.steps, ("one_token",), K, partial(decoding, op), inputs, config.decoded,
                forms=("sequential", "pallas"), stages=("forward",),
                carried=config.steps * config.decoded * 2.0 * 4 * D * K,
            )  # fmt: skip


# ---- programs: forward, and with every gradient ---------------------------------------------------------------------


def forward(op, impl, cotangent, *inputs):
    return op(*inputs, impl=impl)[0]


def training(op, impl, cotangent, *inputs):
    out, pull_back = jax.vjp(partial(forward, op, impl, None), *inputs)
    return out, pull_back(cotangent)


STAGES = {"forward": forward, "training": training}


class Torch:
    """A function of torch as a program: the same arrays, on its device, and done when it returns."""

    def __init__(self, call: Callable, stage: str):
        import torch

        self.torch, self.call, self.stage = torch, call, stage
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def prepare(self, *arrays):
        kinds = {"bfloat16": self.torch.bfloat16, "float32": self.torch.float32}
        there = lambda x: self.torch.from_numpy(np.array(x, np.float32)).to(self.device, kinds[x.dtype.name])
        cotangent, *inputs = map(there, arrays)
        return cotangent, *(x.requires_grad_(self.stage == "training") for x in inputs)

    def __call__(self, cotangent, *inputs):
        out = self.call(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        found = (out, self.torch.autograd.grad(out, inputs, cotangent)) if self.stage == "training" else out
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return jax.tree.map(lambda x: x.detach(), found)


def peer_of(kernel: Kernel) -> Callable | None:
    if kernel.peer is None or not importlib.util.find_spec("torch"):
        return None
    if not kernel.peer[0]:
        return partial(kernel.peer[1], importlib.import_module("torch.nn.functional").scaled_dot_product_attention)
    if not importlib.util.find_spec("fla"):
        return None
    module, name = kernel.peer[0].split(":")
    return partial(kernel.peer[1], getattr(importlib.import_module(f"fla.ops.{module}"), name))


def errors(config: Sizes, kernel: Kernel) -> dict[str, float]:
    """How far off each form is."""
    arguments, exact = reference(config, kernel)
    found = {impl: relative_error(jax.jit(trained(kernel, impl))(*arguments), exact) for impl in kernel.forms}
    if call := peer_of(kernel):
        program = Torch(call, "training")
        of_peer = jax.tree.map(lambda x: x.float().cpu().numpy(), program(*program.prepare(*arguments)))
        found["peer"] = relative_error(of_peer, exact)
    return found


def reference(config: Sizes, kernel: Kernel) -> tuple[tuple, list]:
    """A cotangent and inputs of one short sequence; output and gradients of the definition in float64 on these."""
    key = jax.random.key(config.seed)
    short = kernel.draw(1, key)
    short = tuple(x[:, : config.error_length] if x.ndim > 2 else x for x in short)
    out = forward_shape(kernel, short)
    arguments = jax.random.normal(key, out.shape, out.dtype), *short
    wide = [np.asarray(x, np.float64) for x in arguments]
    with jax.enable_x64(True):
        return arguments, jax.tree.leaves(jax.device_get(jax.jit(trained(kernel, "sequential"))(*wide)))


def relative_error(found, exact: list) -> float:
    """The largest among output and gradients."""
    apart = lambda a, b: float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))
    return max(map(apart, jax.tree.leaves(found), exact))


def trained(kernel: Kernel, impl: str) -> Callable:
    return partial(training, kernel.op, impl)


def forward_shape(kernel: Kernel, inputs):
    return jax.eval_shape(partial(forward, kernel.op, kernel.forms[0], None), *inputs)


def drawn(seed: int, kernel: Kernel) -> Callable[[int], tuple]:
    """The cotangent and the inputs of a round."""

    @jax.jit
    def draw(turn):
        key = jax.random.fold_in(jax.random.key(seed), turn)
        inputs = kernel.draw(kernel.batch, key)
        out = forward_shape(kernel, inputs)
        return jax.random.normal(jax.random.fold_in(key, 99), out.shape, out.dtype), *inputs

    return draw


def compiled(kernel: Kernel, impl: str, stage: str, arrays):
    return jax.jit(partial(STAGES[stage], kernel.op, impl)).lower(*arrays).compile()
