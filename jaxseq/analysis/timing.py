"""Forms of one function side by side: time, temporary memory and compile time, forward and with the gradient."""

import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np


class Case(NamedTuple):
    """A function on one kind of input; the first form is what the others are compared with.

    `own` are arguments of single forms, such as parameters, that come before what `draw` gives.
    """

    op: str
    length: int
    draw: Callable[[jax.Array], tuple[jax.Array, ...]]
    forms: Mapping[str, Callable]
    own: Mapping[str, tuple] = MappingProxyType({})


class Timing(NamedTuple):
    """One form: training is both passes, speeds are relative to the first form, MiB are XLA's temporary memory."""

    op: str
    form: str
    length: int
    forward_ms: float
    training_ms: float
    forward_speed: float
    training_speed: float
    forward_mib: float
    training_mib: float
    forward_compile_seconds: float
    training_compile_seconds: float


def side_by_side(
    case: Case, *, seed: int = 0, repeats: int = 5, seconds: float = 0.1, most_mib: float | None = None
) -> list[Timing]:
    """Compile every form, forward alone and with its gradient, then call all of them in turn on fresh inputs.

    Times are medians of `repeats` rounds, after one to warm up, in each of which a form is called for so many
    `seconds`, once at least. A program that wants more temporary memory than `most_mib` is not run: its times are NaN.
    """
    first = next(iter(case.forms))

    @jax.jit
    def draw(turn):
        key = jax.random.fold_in(jax.random.key(seed), turn)
        inputs = case.draw(key)
        output = jax.eval_shape(partial(_forward, case.forms[first], None), *case.own.get(first, ()), *inputs)
        return jax.random.normal(jax.random.fold_in(key, 99), output.shape, output.dtype), *inputs

    cotangent, *inputs = draw(0)
    programs: dict[tuple, Any] = {}
    compiling, mib = {}, {}
    for name, form in case.forms.items():
        own = case.own.get(name, ())
        for stage in (_forward, _training):
            started = time.perf_counter()
            program: Any = jax.jit(partial(stage, form)).lower(cotangent, *own, *inputs).compile()
            compiling[name, stage] = time.perf_counter() - started
            mib[name, stage] = program.memory_analysis().temp_size_in_bytes / 2**20
            if most_mib is None or mib[name, stage] <= most_mib:
                programs[name, stage] = partial(_with_own, program, own)
    times = in_turns(programs, draw, seed=seed, repeats=repeats, seconds=seconds)
    ms = {key: times.get(key, float("nan")) for key in mib}

    def row(name) -> Timing:
        both = (name, _forward), (name, _training)
        speeds = [ms[first, stage] / ms[name, stage] for _, stage in both]
        numbers = [*(ms[key] for key in both), *speeds, *(mib[key] for key in both), *(compiling[key] for key in both)]
        return Timing._make([case.op, name, case.length, *numbers])

    return [row(name) for name in case.forms]


def in_turns(
    programs: dict[Any, Callable], draw: Callable[[int], tuple], *, seed: int, repeats: int, seconds: float
) -> dict[Any, float]:
    """Median milliseconds of each program, all called in every round, on what `draw(round)` gives; one to warm up.

    A program with an attribute `prepare` is called with `prepare(*arguments)`, which is not timed.
    """
    times: dict[Any, list[float]] = {key: [] for key in programs}
    shuffled = random.Random(seed)
    for turn in range(1 + repeats):
        arguments = jax.block_until_ready(draw(turn))
        # What a form leaves behind, in caches or in memory to be freed, slows down the next one: so the order changes.
        for key in shuffled.sample(list(programs), len(programs)):
            prepared = getattr(programs[key], "prepare", lambda *arguments: arguments)(*arguments)
            calls = timed(programs[key], prepared, seconds)
            times[key] += calls if turn else []
    return {key: median(calls) for key, calls in times.items()}


def exponent(lengths, values) -> float:
    """The slope of log value over log length, by least squares: 1 is linear. NaN with fewer than two values."""
    known = [(n, v) for n, v in zip(lengths, values, strict=True) if v > 0]
    if len({n for n, _ in known}) < 2:
        return float("nan")
    n, v = np.log(np.asarray(known, float).T)
    return float(np.polyfit(n, v, 1)[0])


def _with_own(program, own, cotangent, *inputs):
    return program(cotangent, *own, *inputs)


def _forward(form, cotangent, *inputs):
    outputs = form(*inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs  # without the final state


def _training(form, cotangent, *inputs):
    outputs, pull_back = jax.vjp(partial(_forward, form, None), *inputs)
    return outputs, pull_back(cotangent)


def timed(program: Callable, arguments, seconds: float) -> list[float]:
    """Milliseconds of calls one after the other, for so many seconds, one at least."""
    times: list[float] = []
    while sum(times) <= 1e3 * seconds:
        started = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(1e3 * (time.perf_counter() - started))
    return times
