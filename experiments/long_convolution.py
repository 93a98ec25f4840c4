"""What a token costs a long convolution: tiles of all sizes beside a window over the past at every step.

Claim   Decoding T tokens one by one, by a mixer and by a language model of two, equals one call to 1e-4 of its largest
        value, and takes time that grows slower than T^1.3 up to 16,384 tokens, where a window each step grows as T^2.
Source  Flash Inference (arXiv 2410.12982), whose tiles these are; Hyena (2302.10866) and long convolutions (2302.06646)
        are what decodes.
Expect  Exponents of 1.0 to 1.25, the window's 2.0, in three minutes on 2 CPU cores.
Run     python -m experiments.long_convolution [--preset cpu|gpu] [--lengths 1024 4096 16384]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxseq.analysis.timing import exponent, in_turns
from jaxseq.fields import check_counts
from jaxseq.mixers import Hyena, LongConv
from jaxseq.models import LanguageModel
from jaxseq.train import Run, main

MOST, ERROR = 1.3, 1e-4


@dataclass(frozen=True)
class Config:
    """What is decoded."""

    seed: int = 0
    """Seed of weights and inputs."""
    width: int = 64
    """Channels."""
    batch: int = 1
    """Sequences."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """Tokens decoded, as many as the filter has taps."""
    window_length: int = 4096
    """The most tokens decoded by a window: the baseline."""
    repeats: int = 3
    """Rounds, in which each runs in turn; the median counts."""

    def __post_init__(self):
        check_counts(self, "width", "batch", "window_length", "repeats")
        if len(set(self.lengths)) < 2 or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths}; give two or more that differ, each of 2 tokens or more.")
        if sum(length <= self.window_length for length in set(self.lengths)) < 2:
            raise ValueError(f"window_length={self.window_length}; two of lengths={self.lengths} are to be within it.")


PRESETS = {
    "cpu": Config(),
    "gpu": Config(width=1024, batch=8),
    # Seconds: to see that everything works.
    "debug": Config(width=4, lengths=(16, 32), window_length=32, repeats=1),
}
#: Of a width and as many taps.
DECODERS = {
    "hyena": lambda width, taps: Hyena(width, max_length=taps),
    "longconv": lambda width, taps: LongConv(width, max_length=taps),
    "language model": lambda width, taps: LanguageModel(width, width, (partial(Hyena, max_length=taps),) * 2),
}


def read(name: str, x):
    """What it is called with: of a language model the largest channel is the token."""
    return jnp.argmax(x, -1) if name == "language model" else x


def by_steps(module, params, x):
    step = lambda state, x: module.apply(params, x, state, method="step")[::-1]
    return lax.scan(step, module.init_state(len(x)), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def by_window(kernel, x):
    """All taps times all of the past at each step; the rest of the layer, which costs no more with T, is left out."""

    def step(past, x):
        past = jnp.concatenate([past[:, 1:], x[:, None]], axis=1)
        return past, jnp.einsum("btd,td->bd", past, kernel[::-1])

    return lax.scan(step, jnp.zeros_like(x), x.swapaxes(0, 1))[1].swapaxes(0, 1)


def measure(run: Run[Config]) -> None:
    config = run.config
    milliseconds: dict[str, dict[int, float]] = {}
    errors: dict[str, float] = {}
    for length in config.lengths:
        draw = lambda n, length=length: (
            jax.random.normal(jax.random.key(config.seed + n), (config.batch, length, config.width)),
        )
        (x,) = draw(0)
        programs: dict[str, Callable] = {}
        for name, build in DECODERS.items():
            module = build(config.width, length)
            params = jax.jit(module.init)(jax.random.key(config.seed), read(name, x))
            # Weights as large as trained ones: at the start a model's logits hardly depend on what its mixers do.
            noise = optax.tree.random_like(jax.random.key(config.seed), params)
            params = optax.tree.add_scale(params, 0.2, noise)
            step_by_step = jax.jit(partial(by_steps, module))
            programs[name] = lambda x, name=name, run=step_by_step, params=params: run(params, read(name, x))
            whole = jax.jit(module.apply)(params, read(name, x))
            error = float(jnp.abs(programs[name](x) - whole).max() / jnp.abs(whole).max())
            errors[name] = max(error, errors.get(name, 0.0))
        if length <= config.window_length:
            programs["window"] = jax.jit(partial(by_window, draw(-1)[0][0]))
        found = in_turns(programs, draw, seed=config.seed, repeats=config.repeats, seconds=0.2)
        for name, time in found.items():
            milliseconds.setdefault(name, {})[length] = time
        print(f"T = {length:>6,}: " + "  ".join(f"{name} {found[name]:,.1f} ms" for name in sorted(found)), flush=True)
    exponents = {name: round(exponent(points, points.values()), 3) for name, points in milliseconds.items()}
    plot(run, milliseconds, exponents)
    mine = {name: exponents[name] for name in DECODERS}
    run.finish(
        claim="decoding grows slower than T^1.3 and equals one call",
        measured={f"exponent, {name}": value for name, value in mine.items()}
        | {f"largest error, {name}": value for name, value in errors.items()},
        baseline={f"exponent, {name}": value for name, value in exponents.items() if name not in DECODERS},
        threshold={"exponent": MOST, "largest error": ERROR},
        holds={f"growth, {name}": value < MOST for name, value in mine.items()}
        | {f"equality, {name}": value <= ERROR for name, value in errors.items()},
        milliseconds={name: {str(length): s for length, s in points.items()} for name, points in milliseconds.items()},
    )


def plot(run: Run, milliseconds: dict[str, dict[int, float]], exponents: dict[str, float]) -> None:
    with run.figure("milliseconds", figsize=(6, 4)) as figure:
        axes = figure.subplots()
        for name, points in milliseconds.items():
            axes.plot(list(points), list(points.values()), "o-", label=f"{name}, T^{exponents[name]:.2f}")
        axes.set(xscale="log", yscale="log", xlabel="tokens decoded one by one", ylabel="milliseconds")
        axes.legend(frameon=False)


if __name__ == "__main__":
    main("long_convolution", PRESETS, measure)
