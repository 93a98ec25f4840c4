"""Hidden brain states from spike trains: do priors that the states share find couplings and states from little data?

Claim   With 2 training sequences the Gaussian prior predicts held-out spikes better than the plain HMM-GLM by 0.02 nats
        a bin or more, with at most 0.8 of its error in the couplings (the one-hot prior 0.7), and finds more of the
        states; it also predicts and finds couplings better than the GLM. With 8 sequences it has little to add.
Source  One-hot HMM-GLM (arXiv 2310.15263), its simulation at a smaller size; or --data.path, a table of spike times.
Expect  0.046 nats, 0.73 and 0.52 of the error, means over 4 networks, in five minutes on 2 CPU cores; see
        experiments/README.md for every model, and for recorded spike trains.
Run     python -m experiments.switching_glm [--preset cpu|gpu|spikes] [--data.path spikes.csv.gz]
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseq.analysis import matched_states
from jaxseq.data import spike_counts
from jaxseq.fields import check_counts, check_positive
from jaxseq.learn import best_fit, expectation_maximisation, gradient_ascent, hidden_markov_start
from jaxseq.models import SwitchingGLM, one_hot_parameters
from jaxseq.models.switching_glm import THRESHOLD
from jaxseq.ops import hidden_markov_filter, hidden_markov_smoother
from jaxseq.tasks import switching_spikes
from jaxseq.train import MetricsWriter, Run, digest, main
from jaxseq.train.files import read_arrays, write_arrays

Link = Literal["sigmoid", "softplus"]


@dataclass(frozen=True)
class DataConfig:
    """Simulated spikes, unless a path to recorded ones is given."""

    path: Path | None = None
    """A CSV table of spike times, neuron,trial,time_s (may be gzipped); the sequences are its trials."""
    bin_seconds: float = 0.02
    """Width of a bin of recorded spikes."""
    seconds: float | None = None
    """Length of a recorded trial; None: to the last spike."""
    neurons: int = 10
    """Simulated neurons."""
    length: int = 800
    """Simulated bins in a sequence."""
    test_sequences: int = 8
    """Sequences held out."""

    def __post_init__(self):
        check_counts(self, "neurons", "length", "test_sequences", section="data.")


@dataclass(frozen=True)
class FitConfig:
    """Every model is fitted alike."""

    steps: int = 100
    """Rounds of expectation-maximisation, or as many of the gradient."""
    inner_steps: int = 5
    """Steps of Adam in a round."""
    learning_rate: float = 0.01
    """Of Adam."""
    starts: int = 4
    """Random couplings to begin at; after a quarter of the rounds the likeliest goes on."""

    def __post_init__(self):
        check_positive(self, *vars(self), section="train.")


@dataclass(frozen=True)
class Config:
    """Networks, models and how much the models see."""

    seed: int = 0
    """The first seed, of networks, splits and initial parameters."""
    seeds: int = 4
    """How many networks, or splits of recorded trials."""
    training: tuple[int, ...] = (2, 8)
    """Training sequences: the regime of little data, which the claim is about, and others."""
    states: int = 3
    """Hidden states."""
    link: Link = "sigmoid"
    """From drive to expected count; sigmoid keeps it below 1."""
    scale: float = 1 / 3
    """Standard deviation of the Gaussian prior."""
    temperature: float = 0.5
    """Of the Gumbel-softmax."""
    data: DataConfig = DataConfig()
    train: FitConfig = FitConfig()

    def __post_init__(self):
        check_counts(self, "seeds", "states")
        if not self.training or min(self.training) < 1:
            raise ValueError(f"training={self.training} must be one or more numbers of at least 1.")


PRESETS = {
    "cpu": Config(),
    # The size of the paper's simulation.
    "gpu": Config(
        seeds=2, training=(2, 30), states=5, data=DataConfig(neurons=20, length=2000, test_sequences=20),
        train=FitConfig(steps=200),
    ),
    # Recorded spikes, given by --data.path.
    "spikes": Config(link="softplus", data=DataConfig(test_sequences=5)),
}  # fmt: skip


class Data(NamedTuple):
    train: np.ndarray
    test: np.ndarray
    states: np.ndarray | None = None
    """True states of the test sequences."""
    weights: np.ndarray | None = None


class Fit(NamedTuple):
    weights: np.ndarray
    bias: np.ndarray
    log_transition: np.ndarray


class Row(NamedTuple):
    """A model on held-out sequences; what needs the truth is NaN without it."""

    nats_per_bin: float
    state_accuracy: float = math.nan
    weight_error: float = math.nan
    """Mean absolute error."""
    sign_accuracy: float = math.nan
    """Connections whose sign, or absence, is right; without a one-hot prior none is absent."""

    def __str__(self):
        return f"{self.nats_per_bin:10.4f}" + "".join(f"{v:8.3f}" for v in self[1:] if not math.isnan(v))


SIZES = ("num_sequences", "length", "num_states", "num_neurons")
simulated: Any = jax.jit(switching_spikes, static_argnames=(*SIZES, "link"))


@lru_cache(maxsize=1)
def dataset(config: Config, seed: int) -> Data:
    data, count = config.data, max(config.training) + config.data.test_sequences
    if data.path is None:
        sizes = dict(num_sequences=count, length=data.length, num_states=config.states, num_neurons=data.neurons)
        drawn = jax.device_get(simulated(jax.random.key(seed), **sizes, link=config.link))
        held_out = data.test_sequences
        return Data(drawn.counts[held_out:], drawn.counts[:held_out], drawn.states[:held_out], drawn.weights)
    counts, trials, _ = spike_counts(data.path, bin_seconds=data.bin_seconds, seconds=data.seconds)
    if len(trials) < count:
        raise ValueError(f"{data.path} has {len(trials)} trials; training and test take {count}: lower one of them.")
    counts = counts[np.random.default_rng(seed).permutation(len(trials))]
    return Data(counts[data.test_sequences :], counts[: data.test_sequences])


@cache
def tools(config: Config, neurons: int, states: int, prior: Any, rule: Callable):
    """A model, its optimizer and its jitted round, compiled once for all seeds."""
    model = SwitchingGLM(states, neurons, prior, config.link, scale=config.scale, temperature=config.temperature)
    optimizer = optax.adam(config.train.learning_rate)
    return model, optimizer, jax.jit(rule(model, optimizer, config.train.inner_steps))


def fitted(config: Config, counts, seed: int, earlier: dict[str, Fit], *, states=None, prior="none",
           rule=expectation_maximisation, start: str | None = None) -> Fit:  # fmt: skip
    """A model fitted from the couplings of an earlier fit, or from the best of several small random ones."""
    model, optimizer, step = tools(config, counts.shape[2], states or config.states, prior, rule)

    def begun(key):
        params = one_hot_parameters(*earlier[start][:2]) if start else model.init(key, counts)
        state = hidden_markov_start(params, optimizer, model.num_states, key, transition=rule is gradient_ascent)
        return state._replace(log_transition=jnp.asarray(earlier[start].log_transition)) if start else state

    starts = 1 if start or model.num_states == 1 else config.train.starts
    begins = [begun(key) for key in jax.random.split(jax.random.key(seed), starts)]
    state = best_fit(step, begins, counts, config.train.steps)
    return Fit(*jax.device_get((_weights(model, state.params), state.params["params"]["bias"], state.log_transition)))


def rounded(config: Config, counts, seed: int, earlier: dict[str, Fit]) -> Fit:
    """Where the one-hot prior's fit begins: the Gaussian's couplings, the small ones set to zero. Nothing is fitted."""
    weights = earlier["gaussian"].weights
    return earlier["gaussian"]._replace(weights=np.where(np.abs(weights) > THRESHOLD, weights, 0))


def constant(config: Config, counts, seed: int, earlier: dict[str, Fit]) -> Fit:
    """No couplings and no states: each neuron's mean count."""
    rate = np.clip(counts.mean((0, 1)), 1e-6, 1 - 1e-6 if config.link == "sigmoid" else None)
    bias = np.log(rate / (1 - rate)) if config.link == "sigmoid" else np.log(np.expm1(rate))
    neurons = counts.shape[2]
    return Fit(np.zeros((1, neurons, neurons), np.float32), bias.astype(np.float32), np.zeros((1, 1), np.float32))


def _weights(model, params):
    return model.apply(params, method="weights")


MODELS: dict[str, Callable[..., Fit]] = {
    "constant rates": constant,
    "glm": partial(fitted, states=1),
    "hmm-glm": fitted,
    "gaussian": partial(fitted, prior="gaussian"),
    "gaussian by gradient": partial(fitted, prior="gaussian", rule=gradient_ascent),
    "gaussian, rounded": rounded,
    "one-hot": partial(fitted, prior="one_hot", start="gaussian"),
}


def kept(path: Path, fit: Callable[[], Fit]) -> Fit:
    """The fit of an earlier start, or a new one."""
    if not path.exists():
        write_arrays(path, fit()._asdict())
    return Fit(**read_arrays(path))


@cache
def inference(link: Link):
    @jax.jit
    def run(fit: Fit, counts):
        states, neurons = fit.weights.shape[:2]
        params = {"params": {"weight": fit.weights, "bias": fit.bias}}
        emissions = SwitchingGLM(states, neurons, link=link).apply(params, counts)
        arrays = jnp.full((states,), -jnp.log(states)), fit.log_transition, emissions
        return hidden_markov_filter(*arrays)[1].mean(), hidden_markov_smoother(*arrays).states.argmax(axis=-1)

    return run


def score(config: Config, fit: Fit, data: Data) -> Row:
    """Held-out nats a bin given the past, and, after the best matching of states, how near the truth is."""
    nats, guessed = jax.device_get(inference(config.link)(jax.tree.map(jnp.asarray, fit), data.test))
    if data.states is None or data.weights is None:
        return Row(float(nats))
    found, accuracy = matched_states(data.states, guessed, config.states)
    weights = fit.weights[found] if len(fit.weights) > 1 else fit.weights
    signs = (np.sign(weights) == np.sign(data.weights)).mean()
    error = np.abs(weights - data.weights).mean()
    return Row(float(nats), accuracy, float(error), float(signs))


def draw(run: Run, table: dict[tuple[str, int], Row]) -> None:
    """Every model's means, side by side for each number of training sequences."""
    known = [
        m
        for m in ("nats_per_bin", "state_accuracy", "weight_error")
        if not any(math.isnan(getattr(row, m)) for row in table.values())
    ]
    with run.figure("models", figsize=(2 + 3 * len(known), 3.2)) as figure:
        panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
        for metric, axes in zip(known, panels, strict=True):
            for sequences, marker in zip(sorted({n for _, n in table}), itertools.cycle("os^D"), strict=False):
                axes.plot(
                    [getattr(table[name, sequences], metric) for name in MODELS], list(MODELS), marker,
                    label=f"{sequences} training sequences",
                )  # fmt: skip
            axes.set(xlabel=metric.replace("_per_", " a ").replace("_", " "))
            axes.grid(color="0.92")
        panels[0].invert_yaxis()
        panels[0].legend(frameon=False, fontsize="small")


def measure(run: Run[Config]) -> None:
    config = run.config
    rows: dict[tuple[str, int], list[Row]] = {}
    fits: dict[str, Fit] = {}
    run.require_same(spikes=hashlib.sha256(dataset(config, config.seed).test.tobytes()).hexdigest()[:16])
    with MetricsWriter(run.folder, step=0) as writer:
        for seed, sequences in itertools.product(range(config.seed, config.seed + config.seeds), config.training):
            data = dataset(config, seed)
            for name, model in MODELS.items():
                path = run.checkpoints / f"{name}-{sequences}-{seed}-{config.train.steps}.npz".replace(" ", "-")
                fits[name] = kept(path, partial(model, config, data.train[:sequences], seed, fits))
                row = score(config, fits[name], data)
                rows.setdefault((name, sequences), []).append(row)
                print(f"seed {seed}  {sequences} sequences  {name:<21}{row}", flush=True)
                numbers = {k: v for k, v in row._asdict().items() if np.isfinite(v)}
                writer.write(seed, f"test/{name}/{sequences}", {"loss": -row.nats_per_bin} | numbers)
    table = {key: Row(*np.mean(found, axis=0).tolist()) for key, found in rows.items()}
    for sequences in config.training:
        print(f"\n{sequences} training sequences, {config.seeds} seeds   nats/bin  states   error   signs")
        for name in MODELS:
            print(f"  {name:<27}{table[name, sequences]}")
    draw(run, table)
    _finish(run, table, digest({name: fit._asdict() for name, fit in fits.items()}))


def _finish(run: Run[Config], table: dict[tuple[str, int], Row], parameters_digest: str) -> None:
    little = min(run.config.training)
    of = {name: table[name, little] for name in MODELS}
    plain, glm, gaussian, one_hot = (of[name] for name in ("hmm-glm", "glm", "gaussian", "one-hot"))
    checks = {
        "nats over hmm-glm": (gaussian.nats_per_bin - plain.nats_per_bin, 0.0 if run.config.data.path else 0.02),
        "nats over glm": (gaussian.nats_per_bin - glm.nats_per_bin, 0.0),
        "states over hmm-glm": (gaussian.state_accuracy - plain.state_accuracy, 0.0),
        "error less than hmm-glm": (1 - gaussian.weight_error / plain.weight_error, 0.2),
        "error less than glm": (1 - gaussian.weight_error / glm.weight_error, 0.0),
        "error of one-hot less than hmm-glm": (1 - one_hot.weight_error / plain.weight_error, 0.3),
    }
    checks = {name: check for name, check in checks.items() if np.isfinite(check[0])}  # what needs no truth, without it
    run.finish(
        claim=f"with {little} training sequences a Gaussian prior shared by the states predicts held-out spikes better "
        "than the plain HMM-GLM and the GLM" + (", and finds more of states and couplings" if len(checks) > 2 else ""),
        measured={name: value for name, (value, _) in checks.items()},
        baseline={f"nats of {name}": of[name].nats_per_bin for name in ("hmm-glm", "glm")},
        threshold={name: least for name, (_, least) in checks.items()},
        holds={name: value > least for name, (value, least) in checks.items()},
        parameters_digest=parameters_digest,
        table=[{"model": name, "sequences": n} | row._asdict() for (name, n), row in table.items()],
    )


if __name__ == "__main__":
    main("switching_glm", PRESETS, measure)
