"""Triples that add up to nothing: attention over pairs of keys finds them, attention over keys does not.

Claim   One layer of third-order attention tells which numbers have two partners with which they add up to a multiple
        of M, 0.95 right (balanced); one layer of softmax attention of as many parameters 0.8 at most. Four numbers a
        head suffice by hand. The polynomial form takes at most 2.4 times as long for twice the length, exact attention
        6 times or more. Its error is 50 times less at degree 4 than at 2 where entries are bounded by 1, at most 3
        times less where they reach 3, and never above `kronecker_polynomial_error`, which says nothing (2, as far as
        means of values in ±1 are ever apart) from entries of 1.07 on at degree 2, 1.22 at 4, 1.34 at 6.
Source  Kronecker computation (arXiv 2310.04064), theorems 1.3 and 1.4, which has no experiments; Match3 of arXiv
        2306.02896. The margins on accuracy, and the bound with its constants, are ours.
Expect  0.966 in the mean of three models after 3,000 steps (M = 51, 8 numbers), softmax attention of as many parameters
        0.793; exact attention takes 7.5 times as long or more where T doubles, the polynomial 1.9 to 2.2, and 4.1 where
        its temporaries leave the cache. Errors fall 329 and 1.6 times; where all scores are as large as they can be
        they come to 0.44 of the bound. 35 minutes on 2 very busy CPU cores. Models
        of the polynomial, which gpu has too, were never trained to their end.
Run     python -m experiments.higher_order_recall [--preset cpu|gpu|debug]
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseq.analysis import exponent, in_turns, num_parameters
from jaxseq.fields import check_counts, chosen
from jaxseq.layers import GatedMLP
from jaxseq.layers.self_attention import SelfAttention
from jaxseq.mixers import KroneckerAttention
from jaxseq.models import Tagger
from jaxseq.ops import kronecker_attention, kronecker_polynomial, kronecker_polynomial_error
from jaxseq.tasks import drawn_anew, match_sums
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main


@dataclass(frozen=True)
class Config:
    """The task, the model and its training, the same for all kinds of attention."""

    seed: int = 0
    """Seed of the numbers; models have this and the following ones."""
    seeds: int = 3
    """Models of each kind."""
    kinds: str = ""
    """Kinds of attention by name, with commas between them; all where none is given."""
    length: int = 8
    """Numbers of a sequence."""
    modulus: int = 51
    """M: the numbers are 0 … M − 1. Half of the labels are 1 where T (T + 1) / 2 is 0.7 M."""
    width: int = 64
    """Width of the model."""
    heads: int = 4
    """Its heads."""
    exact_lengths: tuple[int, ...] = (128, 256, 512)
    """Lengths at which exact attention is timed."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Lengths at which the polynomial is timed."""
    train: TrainConfig = TrainConfig(
        steps=3000, batch_size=256, learning_rate=3e-3, warmup_steps=100, final_learning_rate_ratio=0.0,
        weight_decay=0.01, betas=(0.9, 0.999), log_every=50,
    )  # fmt: skip
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "seeds", "length", "modulus", "width", "heads")
        self.names()

    def names(self) -> list[str]:
        return chosen("kinds", self.kinds, KINDS)


#: The one layer under test.
KINDS: dict[str, Callable] = {
    "pairs of keys": partial(KroneckerAttention, causal=False),
    "their polynomial": partial(KroneckerAttention, causal=False, degree=2),
    "keys": SelfAttention,
}

PRESETS = {
    "cpu": Config(kinds="pairs of keys,keys"),
    # The paper has no settings; the numbers of Match3 that half of the labels are 1 at.
    "gpu": Config(
        length=32, modulus=701, width=128, heads=8, exact_lengths=(128, 256, 512),
        lengths=(1024, 4096, 16384), train=replace(Config.train, steps=50_000, learning_rate=1e-3),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        seeds=1, length=4, modulus=11, width=8, heads=2, exact_lengths=(4, 8), lengths=(8, 16),
        train=TrainConfig(steps=3, batch_size=4, log_every=1),
    ),
}  # fmt: skip

LEAST, MOST = 0.95, 0.8
#: Of the polynomial, and the bounds β of the entries of queries and keys that it is measured at.
DEGREES, BOUNDS = (0, 2, 4, 6), (0.5, 1.0, 1.5, 2.0, 3.0)
#: How many times smaller errors become from degree 2 to 4, by β: at least, and at most.
FALLS = {1.0: 50.0, 3.0: 3.0}
#: The error that two means of values in ±1 never exceed.
TRIVIAL = 2.0
#: Times as long where the length doubles: at least, and at most.
CUBIC, LINEAR = 6.0, 2.4


def build(config: Config, kind: str) -> Tagger:
    """One layer and its MLP, which is as wide as gives all kinds the parameters of the largest; without positions."""
    usual = GatedMLP(config.width).width()

    def tagger(kind: str, hidden: int = usual) -> Tagger:
        layer, mlp = partial(KINDS[kind], num_heads=config.heads), partial(GatedMLP, hidden=hidden)
        return Tagger(config.modulus, 2, config.width, (layer,), mlp=mlp, remat=False)

    size = {kind: num_parameters(tagger(kind), jnp.zeros((1, 1), jnp.int32)) for kind in KINDS}
    return tagger(kind, usual + round((max(size.values()) - size[kind]) / (3 * config.width)))


def balanced_accuracy(logits, labels) -> float:
    right = logits.argmax(-1) == labels
    return float(np.mean([right[labels == label].mean() for label in (0, 1)]))


def by_hand(x: np.ndarray, modulus: int) -> np.ndarray:
    """The labels that a head of four channels finds: its scores are cos 2π (x_t + x_i + x_j) / M, 1 for a triple."""
    c, s = (f(2 * np.pi * x / modulus) for f in (np.cos, np.sin))
    stack = lambda *columns: jnp.asarray(np.stack(columns, axis=-1)[:, :, None], jnp.float32)
    sharp = 0.5 * modulus**2  # what separates one pair in T² from a score of cos 2π/M
    query, first, second = sharp * stack(c, -c, -s, -s), stack(c, s, c, s), stack(c, s, s, c)
    # Read the cosine of the pair's sum, and the sine: what the token needs to see its own complement.
    angles = [(stack(c, s), stack(c, c)), (stack(s, s), stack(-s, c))]
    read = sum(kronecker_attention(query, first, second, v, w, causal=False, scale=1.0) for v, w in angles)
    cosine, sine = np.asarray(read[:, :, 0, 0]), np.asarray(read[:, :, 0, 1])
    return (cosine * c - sine * s) > (1 + np.cos(2 * np.pi / modulus)) / 2


def errors_of_the_polynomial(seeds: int = 5) -> dict[str, dict[str, dict[str, float]]]:
    """Largest errors over 12 tokens of 4 channels by degree and by β, and what they are bounded by.

    "drawn" are medians over draws of keys and queries uniform in ±β and values in ±1. "worst" has all of its scores at
    ±R = ±β³, and values that tell the one from the other: one pair of the first sign, and more and more of the second.
    """
    drawn = np.random.default_rng(0).uniform(-1, 1, (5, seeds, 12, 1, 4))
    sign = np.where(np.arange(12) == 0, 1.0, -1.0)[None, :, None, None] * np.ones((2, 1, 1, 4))
    sign[1] *= -1  # what comes first is the likelier pair in one row, and the other one in the second
    ones = np.ones_like(sign)
    worst = np.stack([ones, ones, sign, ones, sign])
    errors: dict[str, dict[str, dict[str, float]]] = {}
    with jax.enable_x64(True):
        exact = jax.jit(kronecker_attention)
        for degree in DEGREES:
            polynomial = jax.jit(lambda *x, degree=degree: kronecker_polynomial(*x, degree=degree)[0])
            rows = errors[f"degree {degree}"] = {}
            for bound in BOUNDS:

                def largest(entries, bound=bound, polynomial=polynomial):
                    inputs = *(jnp.asarray(bound * x) for x in entries[:3]), *map(jnp.asarray, entries[3:])
                    return np.asarray(jnp.abs(polynomial(*inputs) - exact(*inputs)).max(axis=(1, 2, 3)))

                rows[str(bound)] = {
                    "drawn": float(np.median(largest(drawn))),
                    "largest drawn": float(largest(drawn).max()),
                    "worst": float(largest(worst).max()),
                    "bound": kronecker_polynomial_error(bound**3, degree),
                }
    return errors


def breaking_point(degree: int) -> float:
    """The β from which the bound on the error is no better than 2, which no two means of values in ±1 exceed."""
    useless = lambda beta: kronecker_polynomial_error(beta**3, degree) >= TRIVIAL
    return next(n / 1000 for n in itertools.count() if useless(n / 1000))


def measure(run: Run[Config]) -> None:
    config = run.config
    draw = partial(match_sums, length=config.length, modulus=config.modulus)
    batches, test = drawn_anew(draw, config.seed, config.train.batch_size, 4000)
    hand = balanced_accuracy(np.eye(2)[by_hand(test["inputs"], config.modulus).astype(int)], test["labels"])
    print(f"{test['labels'].mean():.2f} of the numbers have partners; by hand {hand:.4f} of them are found", flush=True)
    table, params = {}, {}
    for kind in config.names():
        model = build(config, kind)

        def loss(params, batch, key, model=model):
            return cross_entropy(model.apply(params, batch["inputs"]), batch["labels"])

        for seed in range(config.seed, config.seed + config.seeds):
            part = f"{kind.replace(' ', '_')}-{seed}"
            init = lambda key, model=model, seed=seed: model.init(jax.random.fold_in(key, seed), test["inputs"][:1])
            params[part] = run.fit(loss, init, batches, part=part).params

            def tested(model=model, part=part):
                outputs = np.asarray(jax.jit(model.apply)(params[part], test["inputs"]))
                accuracy = balanced_accuracy(outputs, test["labels"])
                run.record(config.train.steps, f"test/{part}", {"accuracy": accuracy})
                return {"accuracy": accuracy, "parameters": optax.tree.size(params[part])}

            table[part] = run.kept(part, tested)
            print(f"{part:<20}{table[part]['accuracy']:.4f}  {table[part]['parameters']:,} parameters", flush=True)
    verdict(run, table, hand, digest(params))


def growth(form: Callable, lengths: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Milliseconds of 16 channels by length, all lengths in turn; the exponent, and the factors where T doubles."""

    def program(length: int):
        run = jax.jit(form)
        call: Any = lambda *inputs: run(*inputs)
        call.prepare = lambda *inputs: jax.block_until_ready([x[:, :length] for x in inputs])
        return call

    def draw(turn: int):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), turn), 5)
        return tuple(jax.random.uniform(key, (1, max(lengths), 2, 8)) for key in keys)

    ms = in_turns({n: program(n) for n in lengths}, draw, seed=seed, repeats=5, seconds=0.2)
    pairs = itertools.pairwise(lengths)
    return {
        "ms": {str(n): ms[n] for n in lengths},
        "exponent": exponent(lengths, [ms[n] for n in lengths]),
        "doubling": [(ms[after] / ms[n]) ** (1 / math.log2(after / n)) for n, after in pairs],
    }


def verdict(run: Run[Config], table, hand: float, parameters_digest: str) -> None:
    config = run.config
    of = {
        kind: [row["accuracy"] for part, row in table.items() if part.startswith(kind.replace(" ", "_") + "-")]
        for kind in config.names()
    }
    mean = dict.fromkeys(KINDS, float("nan")) | {kind: float(np.mean(each)) for kind, each in of.items()}
    errors = errors_of_the_polynomial()
    gains = {beta: errors["degree 2"][str(beta)]["drawn"] / errors["degree 4"][str(beta)]["drawn"] for beta in FALLS}
    shares = [
        max(row["largest drawn"], row["worst"]) / row["bound"] for rows in errors.values() for row in rows.values()
    ]
    breaks = {f"degree {degree}": breaking_point(degree) for degree in DEGREES}
    timed = lambda name, form, lengths: run.kept(f"time, {name}", lambda: growth(form, lengths, config.seed))
    exact = timed("exact", kronecker_attention, config.exact_lengths)
    linear = timed("polynomial", lambda *x: kronecker_polynomial(*x)[0], config.lengths)
    show(errors, breaks, {"exact attention": exact, "its polynomial": linear})
    parts = {
        "pairs of keys": mean["pairs of keys"] >= LEAST,
        "keys": mean["keys"] <= MOST,
        "by hand": hand == 1.0,
        "the polynomial where entries are small": gains[1.0] >= FALLS[1.0],
        "the polynomial where they are not": gains[3.0] <= FALLS[3.0],
        "no error above its bound": max(shares) <= 1,
        "exact attention is cubic": min(exact["doubling"]) >= CUBIC,
        "its polynomial is linear": max(linear["doubling"]) <= LINEAR,
    }
    plot(run, errors, breaks, {"exact": exact["ms"], "polynomial": linear["ms"]})
    run.finish(
        claim="one layer of third-order attention finds triples, one of softmax attention of its size does not; the "
        "polynomial is linear in time, and within its bound",
        measured={kind: mean[kind] for kind in config.names() if kind != "keys"}
        | {"by hand": hand, "least growth, exact": min(exact["doubling"])}
        | {"largest growth, polynomial": max(linear["doubling"]), "largest share of the bound": max(shares)}
        | {f"error at degree 2 over 4, entries up to {beta}": gain for beta, gain in gains.items()}
        | {f"entries at which the bound says nothing, {degree}": beta for degree, beta in breaks.items()},
        baseline={"keys": mean["keys"]},
        threshold={"pairs of keys": LEAST, "keys": MOST, "errors": {str(beta): fall for beta, fall in FALLS.items()}}
        | {"exact": CUBIC, "polynomial": LINEAR},
        holds=parts,
        accuracies=of,
        errors=errors,
        times={"exact": exact, "polynomial": linear},
        parameters_digest=parameters_digest,
    )


def show(errors, breaks: dict[str, float], times: dict[str, dict[str, Any]]) -> None:
    print(f"{'entries up to':<16}" + "".join(f"{column:>14}" for column in next(iter(errors["degree 2"].values()))))
    for degree, rows in errors.items():
        print(f"{degree}: the bound says nothing from {breaks[degree]:.2f} on")
        for beta, row in rows.items():
            print(f"{beta:<16}" + "".join(f"{value:>14.1e}" for value in row.values()))
    for name, found in times.items():
        factors = ", ".join(f"{factor:.1f}" for factor in found["doubling"])
        print(f"{name} T^{found['exponent']:.2f}, {factors} times as long where T doubles", flush=True)


def plot(run: Run, errors, breaks: dict[str, float], times: dict[str, dict[str, float]]) -> None:
    """Errors of the polynomial below their bounds, and milliseconds by length."""
    with run.figure("kronecker", figsize=(10, 4)) as figure:
        left, right = figure.subplots(1, 2)
        colors = ("#999999", "#d1602f", "#3b6fb6", "#3f9b5f")
        for (degree, rows), color in zip(errors.items(), colors, strict=True):
            x = [float(beta) for beta in rows]
            of = lambda name, rows=rows: [row[name] for row in rows.values()]
            left.plot(x, of("drawn"), "o-", color=color, label=f"{degree}: bound breaks at {breaks[degree]:.2f}")
            left.plot(x, of("worst"), "v", color=color)
            left.plot(x, of("bound"), "--", color=color, linewidth=1)
        left.axhline(TRIVIAL, color="black", linewidth=1)
        left.set(xlabel="entries of queries and keys up to β", ylabel="error (▼ all at ±β, dashed: bound)")
        left.set(yscale="log", ylim=(1e-13, 1e3))
        for name, by_length in times.items():
            right.plot([int(n) for n in by_length], list(by_length.values()), "o-", label=name)
        right.set(xscale="log", yscale="log", xlabel="T", ylabel="ms")
        lengths = sorted({int(n) for by_length in times.values() for n in by_length})
        right.set_xticks(lengths, [f"{n:,}" for n in lengths])
        right.set_xticks([], minor=True)
        for axes in (left, right):
            axes.legend(frameon=False, fontsize="small")


if __name__ == "__main__":
    main("higher_order_recall", PRESETS, measure)
