"""Recurrent networks whose initial weights have a low rank, or a high one: how far learning takes their kernels.

Claim   After training to like accuracy the tangent kernel of networks that began with weights of rank 1 is less aligned
        with what it was, by 0.15, than of those that began with full rank and the same norm: they learn richly. The
        exception: weights of rank 1 along what a trained network learned are lazy again, by 0.2 over others of rank 1
        and their norm. With gpu the rank also correlates with both alignments, and full rank moves weights less.
Source  How connectivity structure shapes rich and lazy learning (arXiv 2310.08513), whose results are plots; thresholds
        are of a reproduction in little.
Expect  Mean kernel alignment of 0.30 (rank 1), 0.52 (3), 0.49 (10), 0.55 (30), 0.58 (100) of five seeds, at like loss
        0.36 and 0.67 at the ends; along what was learned 0.79, others as small 0.55. Representations 0.58 to 0.73 by
        rank, 0.83 aligned; change of weights 1.43 to 1.35, 0.95 aligned. Ten minutes on 2 busy CPU cores, in parts. gpu
        is not yet measured.
Run     python -m experiments.rich_lazy [--preset cpu|gpu] [--task choice|match]
        python -m experiments.rich_lazy --task digits --data.path FOLDER   (the four idx files of MNIST, row after row)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

from jaxseq.analysis import effective_rank, gram_alignment, representation_alignment, tangent_kernel
from jaxseq.data import mnist
from jaxseq.fields import check_counts
from jaxseq.layers.initialisers import low_rank
from jaxseq.ops import nonlinear_recurrence
from jaxseq.tasks import delayed_match, two_choices
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main, read_metrics
from jaxseq.train.ensemble import ensemble_loss, members, per_member, stacked
from jaxseq.train.plots import points_and_mean
from jaxseq.train.rows import grouped, mean_of


@dataclass(frozen=True)
class DataConfig:
    """Digits."""

    path: Path | None = None
    """The folder of MNIST's files, for --task digits."""


@dataclass(frozen=True)
class Config:
    """The task, the networks and their training by gradient descent with momentum 0.9."""

    seed: int = 0
    """Seed of networks and data."""
    seeds: int = 5
    """Networks of each rank."""
    task: str = "choice"
    """choice: which of two noisy channels has the larger mean. match: whether a stimulus comes again. digits: MNIST."""
    ranks: tuple[int, ...] = (1, 3, 10, 30, 100)
    """Ranks of the initial recurrent weights; the last counts as full. Aligned weights, of rank 1, lie along what the
    networks of the first learned."""
    width: int = 100
    """Units."""
    gain: float = 1.25
    """Initial recurrent weights are normal with the variance gain² / width."""
    probes: int = 64
    """Inputs that kernels are of."""
    test: int = 2000
    """Inputs that loss and accuracy are of."""
    least_correlation: float | None = None
    """What is asked of the rank correlations of effective rank and alignments."""
    least_aligned: float = 0.2
    """By how much kernels of aligned networks of rank 1 are to be more aligned than of others as small."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(steps=2500, batch_size=32, learning_rate=3e-3, evaluate_every=125, log_every=25)
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "seeds", "width", "probes", "test")
        if self.task not in CLASSES:
            raise ValueError(f"task={self.task!r}; choose {', '.join(CLASSES)}.")
        if (self.task == "digits") != (self.data.path is not None):
            raise ValueError(f"task={self.task} with data.path={self.data.path}: digits, and they alone, take a path.")
        if len(self.ranks) < 2 or min(self.ranks) < 1 or list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"ranks={self.ranks}; give two or more, each larger than the one before.")
        if self.ranks[-1] > self.width:
            raise ValueError(f"ranks={self.ranks} end above width={self.width}.")


CLASSES = {"choice": 2, "match": 2, "digits": 10}

PRESETS = {
    "cpu": Config(),
    # The authors' width, gain and training. Run it for two tasks.
    "gpu": Config(
        width=300, ranks=(1, 30, 100, 300), least_correlation=0.5,
        train=TrainConfig(steps=10_000, batch_size=32, learning_rate=3e-3, evaluate_every=500, log_every=100),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        seeds=2, ranks=(1, 6), width=6, probes=4, test=20,
        train=TrainConfig(steps=4, batch_size=4, evaluate_every=2, log_every=1),
    ),
}  # fmt: skip

MEASURES = ("kernel alignment", "representation alignment", "same signs", "weight change")
#: Weights of rank 1 along what was learned, and others of their norm.
SMALL = ("aligned", "unaligned")
#: By how much the tangent kernels of full rank are more aligned; the least accuracy of all networks.
GAP, ACCURACY = 0.15, 0.9


class Network(nn.Module):
    """h_t = relu(h_{t-1} W + x_t W_in), read where the sequence ends: `(logits, h_T)`."""

    width: int
    rank: int
    gain: float
    classes: int

    @nn.compact
    def __call__(self, x):
        start = low_rank(nn.initializers.normal(self.gain / self.width**0.5), self.rank)
        W = self.param("recurrent", start, (self.width, self.width))
        drive = nn.Dense(self.width, use_bias=False, name="input")(x)
        cell = lambda h, u: jax.nn.relu(h @ W + u)
        h = nonlinear_recurrence(cell, drive, jnp.zeros((len(x), self.width)))[1]
        return nn.Dense(self.classes, use_bias=False, name="output")(h), h


class Task(NamedTuple):
    draw: Callable
    """`key, count -> (inputs, labels)`, for training."""
    test: tuple[Any, Any]
    probes: Any


def task(config: Config) -> Task:
    keys = jax.random.split(jax.random.key(config.seed), 2)
    if config.data.path is None:
        of: Any = {"choice": two_choices, "match": delayed_match}[config.task]
        draw: Any = lambda key, count: of(key, num_examples=count)
        return Task(draw, draw(keys[0], config.test), draw(keys[1], config.probes)[0])
    by_rows = lambda pixels: pixels.reshape(len(pixels), math.isqrt(pixels.shape[1]), -1)
    train, test = (x._replace(inputs=by_rows(x.inputs)) for x in jax.device_put(mnist(config.data.path)))
    return Task(train.draw, (test.inputs[: config.test], test.labels[: config.test]), test.inputs[-config.probes :])


def measure(run: Run[Config]) -> None:
    config, of = run.config, task(run.config)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), config.seeds)

    def random(_):
        """A rank after the other; those of a seed are alike but for the recurrent weights' rank."""
        by_rank = [jax.vmap(lambda key, n=rank: network(config, n).init(key, of.probes))(keys) for rank in config.ranks]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *by_rank)

    seeds = range(config.seeds)
    names = [f"rank {rank}, {seed}" for rank in config.ranks for seed in seeds]
    before, after = trained(run, of, "random", random, names)
    lowest = (members(networks)[: config.seeds] for networks in (before, after))
    pairs = zip(*[along(*pair) for pair in zip(*lowest, strict=True)], strict=True)
    small = stacked([network for kind in pairs for network in kind])
    names = [f"{kind}, {seed}" for kind in SMALL for seed in seeds]
    start, end = trained(run, of, "aligned", lambda _: small, names)
    verdict(run, members(before) + members(start), digest([after, end]))


def network(config: Config, rank: int = 1) -> Network:
    return Network(config.width, rank, config.gain, CLASSES[config.task])


def along(before, after):
    """A network as it began, but for recurrent weights of rank 1: along what it learned, and along what it began with.

    Both have the norm of what was learned. At the norm that it began with, ten times as large, weights along what was
    learned make activity explode; and the leading singular vectors that it ended with are still those it began with.
    """
    start, end = (params["params"]["recurrent"] for params in (before, after))
    aligned = low_rank(lambda *_: end - start, 1)(None, start.shape)
    unaligned = start * jnp.linalg.norm(aligned) / jnp.linalg.norm(start)
    return [{"params": before["params"] | {"recurrent": W}} for W in (aligned, unaligned)]


def trained(run: Run[Config], of: Task, part: str, init, names: list[str]):
    """All networks at once, before and after; what learning does to each is measured on the way."""
    config, apply = run.config, network(run.config).apply

    def loss(params, batch, key):
        inputs, labels = of.draw(key, config.train.batch_size)
        return cross_entropy(apply(params, inputs)[0], labels)

    def state(params):
        """Test metrics, the tangent kernel in the recurrent weights, and the last states."""
        kernel = tangent_kernel(lambda params, x: apply(params, x[None])[0], params, of.probes, "recurrent")
        return cross_entropy(apply(params, of.test[0])[0], of.test[1])[1], kernel, apply(params, of.probes)[1]

    states = jax.jit(lambda params: jax.lax.map(state, params))
    before = jax.jit(init)(None)
    _, kernels, firsts = states(before)

    def evaluate(params):
        metrics, kernels_now, lasts = states(params)
        changes = params["params"]["recurrent"] - before["params"]["recurrent"]
        return {
            f"test/{name}": jax.tree.map(float, row)
            | {
                "kernel alignment": gram_alignment(kernels[n], kernels_now[n]),
                "representation alignment": representation_alignment(firsts[n], lasts[n]),
                "same signs": float(np.mean(((firsts[n] > 0) == (lasts[n] > 0)).all(axis=0))),
                "weight change": float(np.linalg.norm(changes[n])),
            }
            for n, (name, row) in enumerate(zip(names, members(metrics), strict=True))
        }

    optimizer = per_member(optax.sgd(config.train.learning_rate, momentum=0.9))
    fitted = run.fit(ensemble_loss(loss), init, lambda step: {}, part=part, optimizer=optimizer, evaluate=evaluate)
    return before, fitted.params


def verdict(run: Run[Config], starts: list[Any], parameters_digest: str) -> None:
    config = run.config
    splits = grouped(read_metrics(run.folder), "split")
    rows = {split.split("/")[1]: of for split, of in splits.items() if split.startswith("test/")}
    # What the slowest ends with: all are compared where they first come to it.
    level, table = max(of[-1]["loss"] for of in rows.values()), {}
    for (name, of), start in zip(rows.items(), starts, strict=True):
        then = next(row for row in of if row["loss"] <= level)
        table[name] = {"effective rank": effective_rank(np.asarray(start["params"]["recurrent"]))}
        table[name] |= {column: of[-1][column] for column in ("accuracy", "loss", *MEASURES)}
        table[name] |= {"step of equal loss": then["step"]}
        table[name] |= {f"{column} then": then[column] for column in ("accuracy", *MEASURES)}
    kinds = {
        kind: [f"{kind}, {seed}" for seed in range(config.seeds)]
        for kind in (*(f"rank {rank}" for rank in config.ranks), *SMALL)
    }
    columns = ("effective rank", "accuracy", *MEASURES, "step of equal loss", "kernel alignment then")
    mean = {kind: {c: mean_of([table[n] for n in names], c) for c in columns} for kind, names in kinds.items()}
    for kind, row in mean.items():
        print(f"{kind:<10}" + "  ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    drawn = [row for name, row in table.items() if name.startswith("rank")]
    correlation = {
        measure: float(spearmanr([row["effective rank"] for row in drawn], [row[measure] for row in drawn])[0])
        for measure in MEASURES
    }
    low, high = (mean[f"rank {rank}"]["kernel alignment"] for rank in (config.ranks[0], config.ranks[-1]))
    aligned, unaligned = (mean[kind]["kernel alignment"] for kind in SMALL)
    parts = {
        "low rank is richer": high - low >= GAP,
        "aligned weights are lazy": aligned - unaligned >= config.least_aligned,
        "all have learned": min(row["accuracy"] for row in table.values()) >= ACCURACY,
    }
    if config.least_correlation is not None:
        parts |= {f"rank and {measure}": correlation[measure] >= config.least_correlation for measure in MEASURES[:2]}
        moved = [mean[f"rank {rank}"]["weight change"] for rank in config.ranks]
        parts["low rank moves weights more"] = moved[0] > moved[-1]
    draw(run, table, {kind: [row for name in names for row in rows[name]] for kind, names in kinds.items()})
    run.finish(
        claim="networks that began with recurrent weights of low rank learn richly, those of full rank lazily",
        measured={f"kernel alignment, {kind}": row["kernel alignment"] for kind, row in mean.items()}
        | {f"rank correlation, {measure}": value for measure, value in correlation.items()}
        | {"least accuracy": min(row["accuracy"] for row in table.values())},
        baseline={"kernel alignment, full rank": high, "kernel alignment, unaligned": unaligned},
        threshold={"gap": GAP, "accuracy": ACCURACY}
        | {"correlation": config.least_correlation, "aligned": config.least_aligned},
        holds=parts,
        mean=mean,
        table=table,
        parameters_digest=parameters_digest,
    )


def draw(run: Run, table, rows_of) -> None:
    """Alignments against effective rank, and on the way."""
    with run.figure("rich_lazy", figsize=(13, 4)) as figure:
        *scatter, way = figure.subplots(1, 3)
        for axes, measure in zip(scatter, MEASURES[:2], strict=True):
            for label, marker in (("rank", "o"), *zip(SMALL, "^v", strict=True)):
                of = [row for name, row in table.items() if name.startswith(label)]
                axes.plot(
                    [row["effective rank"] for row in of], [row[measure] for row in of], marker, label=label, alpha=0.7
                )
            axes.set(xscale="log", xlabel="effective rank of the initial recurrent weights", ylabel=measure)
        for kind, of in rows_of.items():
            points_and_mean(way, of, "step", MEASURES[0], label=kind)
        way.set(xlabel="training step", ylabel=f"{MEASURES[0]}, mean")
        for axes in (*scatter, way):
            axes.legend(frameon=False, fontsize="x-small")


if __name__ == "__main__":
    main("rich_lazy", PRESETS, measure)
