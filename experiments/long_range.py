"""State spaces on sequences of hundreds and thousands of steps, against one another, an LSTM and a transformer.

Claim   How A starts decides what a diagonal state space learns: on pooled digits the mean of S4D-Lin, -Inv and -LegS
        is 8 points of accuracy above S4D-Real's and 4 above S4D-Random's, and S4D-LegS at most a point below S4, which
        starts alike; the rule of discretisation is worth 2 at most. On all 784 pixels S4D-Lin gets 0.98, the mean a
        point more than Real. On raw speech S4D-Lin gets 0.9, and loses 10 points at most at half the sampling rate with
        dt doubled, 20 or more without. What is asked is what a run trained.
Source  S4D (arXiv 2206.11893), tables 3 and 4, on digits read pixel after pixel; the peers in the same run: DSS
        (2203.14343), S5 (2208.04933), LRU (2303.06349), Mamba (2312.00752).
Expect  On digits pooled to 196 steps 0.76 to 0.80, Real 0.45 and Random 0.71 after 500 steps, means of three seeds of
        these and S4 in 4 minutes on 2 CPU cores; a point is 20 digits of the test there, less than one seed differs
        from the next. On all 784 pixels, pixels, S4D-Lin alone 0.9936 in 35 minutes. On spoken digits at 4 kHz,
        speech-cpu, S4D-Lin alone 0.91 in 8 minutes, at 2 kHz 0.86 with dt doubled and 0.12 without. On short trees,
        listops-cpu, 0.41 to 0.45 of all models, in 27 minutes beside other jobs. Of gpu, speech, listops and pathfinder
        nothing is measured yet.
Run     python -m experiments.long_range --data.path FOLDER [--models s4d-lin,s4,lstm]
        [--preset cpu|pixels|gpu|speech-cpu|speech|listops-cpu|listops|pathfinder]
        FOLDER holds the four idx files of MNIST; for speech the npz of the spoken digits; listops and
        pathfinder need none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseq import S4D, Attention, Classifier, Mamba
from jaxseq.data import Labelled, listops_table, mnist, spoken_digits
from jaxseq.fields import check_counts, chosen
from jaxseq.layers import GatedMLP
from jaxseq.mixers import DSS, LRU, S4, S5
from jaxseq.tasks import listops, pathfinder
from jaxseq.tasks.listops import PADDING
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main, make_optimizer
from jaxseq.train.evaluation import mean_metrics
from jaxseq.train.optimizer import STATE_SPACE


def curves(examples: int, pixels: int) -> Labelled:
    """Pathfinder at 32 × 32 pixels, and as Path-X with longer curves of longer dashes in larger images."""
    size = math.isqrt(pixels)
    large: dict[str, Any] = dict(dashes=14, distractors=8, dash=4.0, gap=3.0) if size >= 128 else {}
    images, labels = pathfinder(0, examples, size=size, **large)
    return Labelled(images, labels, np.full(examples, size**2, np.int32))


def trees(examples: int, longest: int) -> Labelled:
    return Labelled(*listops(0, examples, lengths=(longest // 4, longest)))


#: Made, not read.
GENERATED = {"listops": trees, "pathfinder": curves}


@dataclass(frozen=True)
class DataConfig:
    """The sequences."""

    task: Literal["mnist", "spoken_digits", "listops", "pathfinder"] = "mnist"
    """Digits as pixels, spoken digits as raw samples, nested operations on digits, or dashed curves as pixels."""
    path: Path | None = None
    """A folder with the idx files, the npz of the recordings, or a table of ListOps; trees and curves are generated."""
    pool: int = 2
    """Pixels are means of pool × pool first: 784 / pool² steps."""
    length: int = 8192
    """Samples of a recording; the longest tree that is generated; pixels of the images of curves."""
    keep_every: int = 1
    """Samples of a recording whose mean is one step: a lower rate than its 8 kHz."""
    examples: int = 20_000
    """Sequences to train on, at most; those that are generated, a tenth of them for the test."""
    test_examples: int = 2_000
    """Sequences to test on, at most."""

    def __post_init__(self):
        check_counts(self, "pool", "length", "keep_every", "examples", "test_examples", section="data.")
        if self.task in GENERATED and self.path is None and self.examples < 10:
            raise ValueError(f"data.examples={self.examples}; a tenth of them is the test: give 10 or more.")
        if self.keep_every > 1 and self.task != "spoken_digits":
            raise ValueError(f"data.keep_every={self.keep_every}; of data.task={self.task} every step is kept: give 1.")
        if self.task == "pathfinder" and (self.path is not None or math.isqrt(self.length) ** 2 != self.length):
            raise ValueError(
                f"data.length={self.length}, data.path={self.path}; pathfinder takes a square, and no file."
            )

    def steps(self) -> int:
        """Of the longest sequence."""
        return (28 // self.pool) ** 2 if self.task == "mnist" else -(-self.length // self.keep_every)

    def read(self, slower: int = 1) -> tuple[Labelled, Labelled]:
        """Train and test; recordings at a rate `slower` times as low."""
        if self.task in GENERATED and self.path is None:
            made = GENERATED[self.task](self.examples, self.length)
            cut = self.examples - self.examples // 10
            splits = made.take(slice(cut)), made.take(slice(cut, None))
        elif self.path is None:
            raise ValueError(f"data.path is needed for data.task={self.task}.")
        elif self.task == "mnist":
            splits = mnist(self.path, pool=self.pool)
        elif self.task == "spoken_digits":
            splits = spoken_digits(self.path, length=self.length, keep_every=slower * self.keep_every)
        else:
            splits = listops_table(self.path)
        train, test = splits
        return train.take(slice(self.examples)), test.take(slice(self.test_examples))


@dataclass(frozen=True)
class Config:
    """Data, model and training, the same for all unless `papers` is set."""

    seed: int = 0
    """The first seed of weights, of the order of the data and of dropout."""
    seeds: int = 1
    """Seeds of each model that the claim compares; its peers are trained with the first."""
    models: str = ""
    """Models by name, with commas between them; all where none is given."""
    papers: bool = False
    """Whether states, learning rates, decay and norm of a model are those of its paper; width and depth are here."""
    width: int = 32
    """Width of the model."""
    depth: int = 2
    """Layers."""
    states: int = 32
    """States a channel, or of the layer in S5 and LRU; Mamba has 16."""
    heads: int = 4
    """Heads of the transformer."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm of the layers."""
    prenorm: bool = True
    """Whether a layer begins with its norm, not ends in it."""
    dropout: float = 0.0
    """Share of the channels dropped in training."""
    bidirectional: bool = False
    """Whether S4, S4D, DSS and S5 look both ways."""
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig(
        steps=500, batch_size=32, learning_rate=5e-3, state_space_learning_rate=1e-3, warmup_steps=50,
        final_learning_rate_ratio=0.0, weight_decay=0.01, log_every=20,
    )  # fmt: skip
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "seeds", "width", "depth", "states", "heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be 0 or more and below 1.")
        self.names()

    def names(self) -> list[str]:
        return chosen("models", self.models, MODELS)

    def runs(self) -> list[tuple[str, int]]:
        """Models and seeds."""
        return [(name, self.seed + i) for name in self.names() for i in range(self.seeds if name in COMPARED else 1)]


class LSTM(nn.Module):
    """flax's own, as a slot of a model."""

    d_model: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, segment_ids=None):
        return nn.RNN(nn.OptimizedLSTMCell(self.d_model, dtype=self.dtype, param_dtype=self.param_dtype))(x)


def s4d(start: str, c: Config, **fields) -> Callable[..., nn.Module]:
    return partial(S4D, state_size=c.states, initialisation=start, bidirectional=c.bidirectional, **fields)


STARTS = ("lin", "inv", "legs", "quad", "real", "random")
MODELS: dict[str, Callable[[Config], Callable[..., nn.Module]]] = {
    **{f"s4d-{name}": partial(s4d, name) for name in STARTS},
    "s4d-lin-bilinear": partial(s4d, "lin", discretisation="bilinear"),
    "s4": lambda c: partial(S4, state_size=c.states, bidirectional=c.bidirectional),
    "dss": lambda c: partial(DSS, state_size=max(1, c.states // 2), bidirectional=c.bidirectional),
    "dss-softmax": lambda c: partial(
        DSS, state_size=max(1, c.states // 2), version="softmax", length=c.data.steps(), bidirectional=c.bidirectional
    ),
    "s5": lambda c: partial(S5, state_size=c.states, output="full_glu", bidirectional=c.bidirectional),
    "lru": lambda c: partial(LRU, state_size=c.states, r_min=0.9, r_max=0.999),
    "mamba": lambda c: partial(Mamba, num_layers=c.depth),
    "lstm": lambda c: LSTM,
    "transformer": lambda c: partial(Attention, num_heads=c.heads),
}
GOOD = ("s4d-lin", "s4d-inv", "s4d-legs")
COMPARED = (*GOOD, "s4d-lin-bilinear", "s4d-real", "s4d-random", "s4")

#: The lead that the claim asks of the mean of GOOD, task by task, of S4D-LegS over S4, which starts alike, and of
#: S4D-Lin an accuracy. Of Random there are no more than scores 4 points apart on pooled digits, of ListOps no
#: ablation.
LEADS = {
    "mnist": {"s4d-real": 0.08, "s4d-random": 0.04, "s4": -0.01},
    "pixels": {"s4d-real": 0.01, "s4d-random": 0.0, "s4": -0.01},
    "spoken_digits": {"s4d-real": 0.0, "s4d-random": 0.0, "s4": -0.01},
    "listops": {"s4": -0.01},
    "pathfinder": {"s4": -0.01},
}
LEAST = {"pixels": 0.98, "spoken_digits": 0.9}


class Own(NamedTuple):
    """What a model has otherwise than the config says: fields of its mixer, of the classifier, of the training."""

    mixer: dict[str, Any] = {}
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}


#: Nobody trains these on the tasks; at the rates of S4 they would be poor baselines.
PEERS = dict.fromkeys(("mamba", "lstm", "transformer"), Own({}, dict(prenorm=True), dict(learning_rate=1e-3)))
#: S5 and LRU of the long range arena, whose images stand for digits, and S5 of speech commands.
PAPERS = {
    "mnist": PEERS | {
        "s5": Own(
            dict(state_size=384, num_blocks=3), dict(prenorm=True), dict(learning_rate=4.5e-3, weight_decay=0.07)
        ),
        "lru": Own(
            dict(state_size=384), dict(prenorm=True), dict(state_space_learning_rate=2.5e-3, weight_decay=0.05)
        ),
    },
    "spoken_digits": PEERS | {
        "s5": Own(
            dict(state_size=128, num_blocks=16, bidirectional=True), dict(dropout=0.1),
            dict(learning_rate=8e-3, state_space_learning_rate=2e-3, weight_decay=0.04),
        ),
    },
    "listops": PEERS | {
        "s5": Own(dict(state_size=16, num_blocks=8), dict(prenorm=True), dict(learning_rate=3e-3, weight_decay=0.04)),
        "lru": Own(
            dict(state_size=256, r_min=0.0, r_max=0.99), dict(prenorm=True), dict(state_space_learning_rate=5e-3)
        ),
    },
    "pathfinder": PEERS | {
        "s5": Own(
            dict(state_size=256, num_blocks=8), dict(prenorm=True, dropout=0.05),
            dict(learning_rate=4.5e-3, state_space_learning_rate=9e-4, weight_decay=0.03),
        ),
    },
}  # fmt: skip
#: On ListOps S4's authors let the step sizes learn at the full rate.
SLOW = {"listops": r"^(?!.*/log_dt$).*" + STATE_SPACE}

#: The settings of S4D's authors, but for batch norm, which is a layer norm here, and the gate, which their ablation
#: leaves out: "gpu" is its row of images read pixel after pixel, "speech" of speech commands, "listops" the arena's.
PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        models="s4d-lin,s4d-inv,s4d-legs,s4d-real,s4d-random,s4,dss,s5,lru,mamba,lstm,transformer",
        seeds=3, papers=True, width=128, depth=4, states=64,
        norm="layer", prenorm=False, dropout=0.1, bidirectional=True,
        data=DataConfig(pool=1, examples=60_000, test_examples=10_000),
        train=TrainConfig(
            steps=24_000, batch_size=50, learning_rate=1e-2, state_space_learning_rate=1e-3, warmup_steps=900,
            final_learning_rate_ratio=0.0, weight_decay=0.01,
        ),
    ),
    "speech": Config(
        models="s4d-lin,s4d-inv,s4d-legs,s4d-real,s4d-random,s4,dss,s5,lru,mamba",
        papers=True, width=128, depth=4, states=64, norm="layer",
        data=DataConfig(task="spoken_digits"),
        train=TrainConfig(
            steps=4_000, batch_size=32, learning_rate=4e-3, state_space_learning_rate=1e-3, warmup_steps=200,
            final_learning_rate_ratio=0.0, weight_decay=0.0,
        ),
    ),
    "listops": Config(
        papers=True, width=128, depth=8, states=64, norm="layer", prenorm=False, bidirectional=True,
        data=DataConfig(task="listops", length=2000, examples=98_000),
        train=TrainConfig(
            steps=80_000, batch_size=50, learning_rate=1e-2, state_space_learning_rate=1e-3, warmup_steps=1000,
            final_learning_rate_ratio=0.0, weight_decay=0.05,
        ),
    ),
    # 160,000 curves, of 32 × 32 pixels; of Path-X with --data.length 16384.
    "pathfinder": Config(
        papers=True, width=256, depth=6, states=64, norm="layer", bidirectional=True,
        data=DataConfig(task="pathfinder", length=1024, examples=178_000, test_examples=17_800),
        train=TrainConfig(
            steps=500_000, batch_size=64, learning_rate=4e-3, state_space_learning_rate=1e-3, warmup_steps=2500,
            final_learning_rate_ratio=0.0, weight_decay=0.03,
        ),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        width=8, depth=1, states=4, data=DataConfig(task="listops", length=40, examples=200),
        train=TrainConfig(steps=4, batch_size=8, learning_rate=5e-3, log_every=1),
    ),
}  # fmt: skip
# "gpu" within an hour of a CPU: one model, half as wide, for a fifth of the steps.
PRESETS["pixels"] = replace(
    PRESETS["gpu"], models="s4d-lin", seeds=1, width=64,
    train=replace(PRESETS["gpu"].train, steps=4_800, warmup_steps=400),
)  # fmt: skip
# "speech" in minutes: samples at 4 kHz, the first half a second.
PRESETS["speech-cpu"] = replace(
    PRESETS["speech"], models="s4d-lin", papers=False, width=64, depth=2, states=32,
    data=DataConfig(task="spoken_digits", length=4096, keep_every=2),
    train=replace(PRESETS["speech"].train, steps=1_200, warmup_steps=100),
)  # fmt: skip
# "listops" of trees up to a hundred tokens.
PRESETS["listops-cpu"] = replace(
    PRESETS["listops"], models="s4d-lin,s4d-inv,s4d-legs,s4,mamba,lstm,transformer", width=64, depth=4, states=32,
    data=DataConfig(task="listops", length=100, examples=42_000, test_examples=4_200),
    train=replace(PRESETS["listops"].train, steps=1_500, learning_rate=5e-3, warmup_steps=150),
)  # fmt: skip


def own(config: Config, name: str) -> Own:
    return PAPERS[config.data.task].get(name, Own()) if config.papers else Own()


def build(config: Config, name: str, **fields) -> Classifier:
    """The model of a name; `fields` go to its mixers."""
    slot = partial(MODELS[name](config), **own(config, name).mixer, **fields)
    tokens = PADDING + 1 if config.data.task == "listops" else None
    mlp = GatedMLP if name == "transformer" else None
    options = {key: getattr(config, key) for key in ("norm", "prenorm", "dropout")} | own(config, name).model
    classes = 2 if config.data.task == "pathfinder" else 10
    return Classifier(classes, config.width, (slot,) * config.depth, mlp, vocab_size=tokens, **options)


def optimizer(config: Config, name: str) -> optax.GradientTransformation:
    slow = SLOW.get(config.data.task, STATE_SPACE) if config.papers else STATE_SPACE
    return make_optimizer(replace(config.train, **own(config, name).train), state_space=slow)


def accuracy(model: Classifier, params, test: Labelled) -> dict[str, float]:
    return mean_metrics(partial(classify, model), params, test.batch, len(test.labels))


def classify(model: Classifier, params, batch, key):
    """Its loss: with dropout in training, where there is a key."""
    rngs = None if key is None else {"dropout": key}
    return cross_entropy(model.apply(params, batch["inputs"], batch["lengths"], rngs=rngs), batch["labels"])


def measure(run: Run[Config]) -> None:
    config = run.config
    train, test = config.data.read()
    slower = config.data.read(slower=2)[1] if config.data.task == "spoken_digits" else None
    for name in config.names():  # what cannot be built is told before anything is trained
        jax.eval_shape(build(config, name).init, jax.random.key(0), *map(jnp.asarray, train.take(slice(1))[::2]))
    majority = float(np.mean(test.labels == np.bincount(train.labels).argmax()))
    found: dict[str, list[float]] = {}
    half_rate: dict[str, list[float]] = {}
    params = {}
    for name, seed in config.runs():
        model, part = build(config, name), f"{name}-{seed}"
        init = lambda key, m=model: m.init(key, jnp.asarray(train.inputs[:1]), jnp.asarray(train.lengths[:1]))
        batches = train.batches(config.train.batch_size, seed)
        # In the folder of this run, where a part that is finished is found and not trained again.
        seeded = Run(replace(config, seed=seed), run.experiment, run.folder)
        fitted = seeded.fit(partial(classify, model), init, batches, optimizer=optimizer(config, name), part=part)
        params[part] = fitted.params
        metrics = accuracy(model, params[part], test)
        found.setdefault(name, []).append(metrics["accuracy"])
        if slower is not None and (name.startswith(("s4", "s5")) or name == "dss"):  # softmax is of one length
            for rate in (1.0, 2.0):
                scaled = accuracy(build(config, name, rate=rate), params[part], slower)
                half_rate.setdefault(f"{name}, dt × {rate:g}", []).append(scaled["accuracy"])
        print(f"{part:<20}{metrics['accuracy']:.4f}", flush=True)
        run.record(config.train.steps, f"test/{part}", metrics)
    run.plot()
    plot(run, found, majority)
    means = lambda scores: {name: float(np.mean(values)) for name, values in scores.items()}
    margins = asked(config, means(found), means(half_rate))
    run.finish(
        claim=f"S4D-Lin, -Inv and -LegS by the thresholds, LegS beside S4: {', '.join(margins) or 'none to compare'}",
        measured=means(found),
        baseline={"majority": majority} | {n: v for n, v in means(found).items() if n in ("lstm", "transformer")},
        threshold={name: least for name, (_, least) in margins.items()},
        holds={name: value >= least for name, (value, least) in margins.items()},
        parameters_digest=digest(params),
        margins={name: value for name, (value, _) in margins.items()},
        seeds=found,
        half_rate=means(half_rate),
    )


def asked(config: Config, mean: dict[str, float], half_rate: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Value and least value of all that the claim asks of the models that were trained, means over seeds."""
    task = "pixels" if config.data.task == "mnist" and config.data.pool == 1 else config.data.task
    pairs: dict[str, tuple[float, float]] = {}
    if set(GOOD) <= set(mean):
        good = sum(mean[name] for name in GOOD) / len(GOOD)
        leads = {name: (mean["s4d-legs"] if name == "s4" else good, least) for name, least in LEADS[task].items()}
        pairs |= {f"over {name}": (of - mean[name], least) for name, (of, least) in leads.items() if name in mean}
    if {"s4d-lin", "s4d-lin-bilinear"} <= set(mean):
        pairs["bilinear as good"] = (-abs(mean["s4d-lin"] - mean["s4d-lin-bilinear"]), -0.02)
    if task in LEAST and "s4d-lin" in mean:
        pairs["s4d-lin"] = (mean["s4d-lin"], LEAST[task])
    if half_rate.keys() >= {"s4d-lin, dt × 1", "s4d-lin, dt × 2"}:
        same, doubled = (mean["s4d-lin"] - half_rate[f"s4d-lin, dt × {rate}"] for rate in (1, 2))
        pairs |= {"lost with dt × 1": (same, 0.2), "kept with dt × 2": (-doubled, -0.1)}
    return {name: (round(value, 6), least) for name, (value, least) in pairs.items()}


def plot(run: Run, found: dict[str, list[float]], majority: float) -> None:
    """Means as bars, seeds as points."""
    with run.figure("accuracy", figsize=(8, 4)) as figure:
        axes = figure.subplots()
        for place, (name, values) in enumerate(reversed(found.items())):
            axes.barh(name, np.mean(values), color="C0")
            axes.plot(values, [place] * len(values), "k.", markersize=4)
        axes.axvline(majority, color="black", linestyle=":", label="majority class")
        axes.set_xlabel("test accuracy")
        axes.legend()


if __name__ == "__main__":
    main("long_range", PRESETS, measure)
