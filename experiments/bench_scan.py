"""The forms of each op side by side in one process: time, temporary memory, compile time.

Claim   Chunked `gated_linear_attention` trains at least 5 times faster than its loop over time, in less memory than its
        scan over states; `linear_recurrence` is at least as fast as raw `lax.scan` and `lax.associative_scan`.
Source  GLA (arXiv 2312.06635), section 4; the raw scans, with automatic gradients, on the same inputs in the same run.
Expect  EXPECT
Run     python -m experiments.bench_scan [--preset cpu|gpu] [--lengths 256 2048] [--seconds 5]
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.nn import log_sigmoid, sigmoid, softplus
from matplotlib.figure import Figure

from jaxseq.ops import diagonal_state_space, gated_linear_attention, linear_recurrence, selective_scan, softmax_attention
from jaxseq.train import MetricsWriter, Run, main
from jaxseq.train.files import write_json


@dataclass(frozen=True)
class Config:
    """Sizes of the inputs, and how long to measure."""

    seed: int = 0
    """Seed of the inputs, which are drawn anew for every round of calls."""
    lengths: tuple[int, ...] = (256, 2048, 16384)
    """Time steps of linear_recurrence, in float32."""
    length: int = 2048
    """Time steps of the complex recurrence and of the ops with heads; the state space ops take half."""
    batch: int = 4
    """Sequences of linear_recurrence and of the state space ops; the ops with heads take half."""
    width: int = 256
    """Channels of linear_recurrence and of the state space ops."""
    states: int = 16
    """States a channel of the state space ops."""
    heads: int = 4
    """Heads of gated_linear_attention and softmax_attention."""
    head_width: int = 64
    """Width of keys and values."""
    window: int = 256
    """Keys a query sees in windowed attention."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Inputs of all ops but linear_recurrence, whose layers keep float32."""
    repeats: int = 5
    """Rounds at least; a round calls every form of an op in turn."""
    seconds: float = 3.0
    """Rounds go on until an op has taken this long; its times are medians."""
    tolerance: float = 0.05
    """Timing noise allowed to the claim on linear_recurrence: a form this much slower counts as equal."""

    def __post_init__(self):
        for name in ("length", "batch", "width", "states", "heads", "head_width", "window", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths} must be one or more numbers of at least 1.")


PRESETS = {
    "cpu": Config(),
    "gpu": Config(lengths=(512, 4096, 65536), length=8192, width=1024, heads=8, window=1024, dtype="bfloat16"),
}


class Case(NamedTuple):
    """An op on one kind of input; the first form is what the others are compared with."""

    op: str
    length: int
    draw: Callable[[jax.Array], tuple[jax.Array, ...]]
    forms: dict[str, Callable]


class Cost(NamedTuple):
    """Of one program: the median time of a call, the first form's over it, XLA's temporary memory, compile time."""

    ms: float
    speed: float
    mib: float
    compile_s: float


class Row(NamedTuple):
    op: str
    form: str
    length: int
    forward: Cost
    training: Cost  # forward and backward


def raw_scan(decay, inputs):
    def step(h, token):
        h = token[0] * h + token[1]
        return h, h

    _, states = lax.scan(step, jnp.zeros_like(inputs[:, 0]), (decay.swapaxes(0, 1), inputs.swapaxes(0, 1)))
    return states.swapaxes(0, 1)


def raw_associative_scan(decay, inputs):
    return lax.associative_scan(lambda e, f: (f[0] * e[0], f[0] * e[1] + f[1]), (decay, inputs), axis=1)[1]


RAW = {"lax.scan": raw_scan, "associative_scan": raw_associative_scan}


def peers() -> dict[str, Callable]:
    """Other libraries' forms of the recurrence, where they are installed."""
    try:
        from recurrentgemma.common import ScanType
        from recurrentgemma.jax.scan import linear_scan
    except ImportError:
        return {}
    return {"recurrentgemma": lambda decay, inputs: linear_scan(inputs, decay, scan_type=ScanType.LINEAR_NATIVE)}


def forms(op: Callable, *names: str | None, **options) -> dict[str, Callable]:
    return {str(name): partial(op, impl=name, **options) for name in names}


def normals(key, *shapes, dtype="float32"):
    return [jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i, shape in enumerate(shapes)]


def cases(config: Config) -> Iterator[Case]:
    """Every op, its forms, and inputs as strong as in a layer that has begun to train."""
    B, T, D, N, dtype = config.batch, config.length, config.width, config.states, config.dtype

    def real(length, key):
        decay, inputs = normals(key, *[(B, length, D)] * 2)
        return sigmoid(decay + 3), inputs

    def rotating(key):
        decay, angle, *inputs = normals(key, *[(B, T, D)] * 4)
        return sigmoid(decay + 3) * jnp.exp(1j * angle), lax.complex(*inputs)

    ours = forms(linear_recurrence, None, "in_place", "chunked", "parallel", "sequential")
    for length in config.lengths:
        yield Case("linear_recurrence", length, partial(real, length), RAW | peers() | ours)
    yield Case("linear_recurrence, complex", T, rotating, RAW | ours)

    half_batch, half_length = max(1, B // 2), max(1, T // 2)
    heads = (half_batch, T, config.heads)
    qkv = [(*heads, config.head_width)] * 3

    def attended(gate, key):
        q, k, v, *g = normals(key, *qkv, *gate, dtype=dtype)
        return q, k, v, *(log_sigmoid(x + 3) for x in g)

    gla = forms(gated_linear_attention, "sequential", "parallel", "chunked", None)
    for name, gate in {"vector gate": [(*heads, config.head_width)], "scalar gate": [heads], "no gate": []}.items():
        yield Case(f"gated_linear_attention, {name}", T, partial(attended, gate), gla)
    for name, window in {"softmax_attention": None, "softmax_attention, window": config.window}.items():
        attention = forms(softmax_attention, "parallel", "chunked", None, window=window)
        yield Case(name, T, partial(attended, []), attention)

    def selective(key):
        x, dt, B_t, C_t = normals(key, *[(B, half_length, D)] * 2, *[(B, half_length, N)] * 2, dtype=dtype)
        return x, softplus(dt - 4), -jnp.broadcast_to(jnp.arange(1.0, N + 1), (D, N)), B_t, C_t

    def diagonal(key):
        u, log_dt, *parts = normals(key, (B, half_length, D), (D, 1), *[(D, N)] * 4)
        log_A = jnp.exp(log_dt - 4) * lax.complex(-0.5, jnp.pi * jnp.arange(N))
        return u.astype(dtype), log_A, lax.complex(*parts[:2]), lax.complex(*parts[2:])

    yield Case("selective_scan", half_length, selective, forms(selective_scan, "sequential", "parallel", "chunked", None))
    yield Case("diagonal_state_space", half_length, diagonal, forms(diagonal_state_space, "chunked", "convolution", None))


def forward(form, cotangent, *inputs):
    del cotangent
    outputs = form(*inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs  # without the final state


def training(form, cotangent, *inputs):
    outputs, pull_back = jax.vjp(partial(forward, form, None), *inputs)
    return outputs, pull_back(cotangent)


def seconds(function: Callable, *arguments) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - started


def bench(case: Case, config: Config) -> list[Row]:
    """Compile every form, forward alone and with its gradient, then call all of them in turn."""
    first = next(iter(case.forms.values()))

    @jax.jit
    def draw(round):
        key, cotangent_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), round))
        inputs = case.draw(key)
        output = jax.eval_shape(partial(forward, first, None), *inputs)
        return jax.random.normal(cotangent_key, output.shape, output.dtype), *inputs

    arguments = draw(0)
    programs, compile_s = {}, {}
    for name, form in case.forms.items():
        for stage in (forward, training):
            started = time.perf_counter()
            programs[name, stage] = jax.jit(partial(stage, form)).lower(*arguments).compile()
            compile_s[name, stage] = time.perf_counter() - started
            seconds(programs[name, stage], *arguments)
    times: dict = {program: [] for program in programs}
    round, deadline = 1, time.perf_counter() + config.seconds
    while round <= config.repeats or time.perf_counter() < deadline:
        arguments = jax.block_until_ready(draw(round))
        for program, call in programs.items():
            times[program].append(seconds(call, *arguments))
        round += 1

    def cost(name, stage) -> Cost:
        ms, baseline = (1e3 * median(times[form, stage]) for form in (name, next(iter(case.forms))))
        mib = programs[name, stage].memory_analysis().temp_size_in_bytes / 2**20
        return Cost(ms, baseline / ms, mib, compile_s[name, stage])

    return [Row(case.op, name, case.length, cost(name, forward), cost(name, training)) for name in case.forms]
