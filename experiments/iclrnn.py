"""A recurrent model that is convex in its inputs and Lipschitz: certified, trained on noisy targets, steering a plant.

Claim   An ICLRNN stays convex (gaps of 1,000 random pairs above −1e-6, before and after training), its kernels
        non-negative and of norm 1.001 at most; an LSTM and the same layers without constraints are not convex. Trained
        on 256 sequences of decaying peaks with noise of 0.5 on the targets it errs 0.01 at most, and a twentieth of the
        LSTM, and is steeper than 1.2 at no test sequence, the LSTM at some than 3. With gpu the errors of a stirred
        reactor too: with noise of 0.9, 1e-3 and a fiftieth; without, 1e-3.
Source  Input convex Lipschitz RNN (arXiv 2401.07494) and its notebooks.
Expect  Of peaks with noise of 0.5, three seeds: errors of 0.0039 (LSTM 0.336, without constraints 0.142), Jacobian
        norms of 1.08 (13.0 and 11.5). Of the reactor no advantage: experiments/README.md. 20 minutes on 2 CPU cores.
Run     python -m experiments.iclrnn [--preset cpu|gpu] [--tasks peaks,reactor]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseq.analysis import convexity_gap, local_lipschitz
from jaxseq.data import epoch_rows
from jaxseq.fields import check_counts, chosen
from jaxseq.mixers import ICLRNN, LSTM
from jaxseq.tasks import decaying_peaks, edge_states, least_cost, reactor, reactor_energy, reactor_path, steered
from jaxseq.tasks.reactor import LARGEST, REGION
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, digest, main, points_and_mean, projected
from jaxseq.train.ensemble import ensemble_init, ensemble_loss, members, per_member
from jaxseq.train.rows import grouped, mean_of, where


@dataclass(frozen=True)
class Config:
    """Tasks, models and their training by Adam, the same for all models."""

    seed: int = 0
    """Seed of the data and the models."""
    seeds: int = 3
    """Models of each kind, task and noise."""
    tasks: str = "peaks,reactor"
    """Tasks by name, with commas between them. peaks: a decaying maximum. reactor: a stirred tank, 10 steps ahead."""
    noises: tuple[float, ...] = (0.0, 0.5)
    """Deviations of the noise on the targets to train on."""
    width: int = 64
    """Units of each of two layers."""
    examples: int = 2048
    """Samples of the reactor to train on; of the peaks there are 256."""
    test: int = 512
    """Samples to test on."""
    periods: int = 20
    """Control periods of 18 seconds."""
    effort: float = 0.01
    """What the square of inputs weighs, as shares of the largest, in a plan beside the energy."""
    train: TrainConfig = TrainConfig(steps=2000, batch_size=32, learning_rate=1e-3, log_every=50)
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "seeds", "width", "test", "periods")
        if not self.noises or min(self.noises) < 0:
            raise ValueError(f"noises={self.noises}; give one or more, none of them negative.")
        self.names()

    def names(self) -> list[str]:
        return chosen("tasks", self.tasks, TASKS)


PEAKS, TASKS = 256, ("peaks", "reactor")

PRESETS = {
    "cpu": Config(),
    # The authors' samples, batches and epochs.
    "gpu": Config(
        seeds=5, noises=(0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9), examples=9264, test=3088,
        train=TrainConfig(steps=36_000, batch_size=256, learning_rate=1e-3, log_every=200),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        seeds=2, noises=(0.0, 0.5), width=4, examples=16, test=20, periods=2,
        train=TrainConfig(steps=3, batch_size=4, log_every=1),
    ),
}  # fmt: skip

#: Least convexity gap, largest norm of a kernel.
GAP, NORM = -1e-6, 1.001
#: Of peaks at noise 0.5, of the reactor at 0.9: largest error, and as a share of the LSTM's.
ERRORS = {"peaks": (0.5, 0.01, 1 / 20), "reactor": (0.9, 1e-3, 1 / 50)}
LIPSCHITZ = {"iclrnn": 1.2, "lstm": 3.0}
#: Of initial states and inputs, and of the energies that they lead to.
SCALE, ENERGY_SCALE = jnp.asarray([1.8, 85.0, *LARGEST]), 800.0


class Data(NamedTuple):
    inputs: jax.Array
    targets: jax.Array
    test_inputs: jax.Array
    test_targets: jax.Array


def data(config: Config, name: str) -> Data:
    """Inputs in [−1, 1], targets of at least 0. Of the reactor both states, and their energy: convex, and what is to
    become small."""
    keys = jax.random.split(jax.random.key(config.seed))
    if name == "peaks":
        return Data(*decaying_peaks(keys[0], num_examples=PEAKS), *decaying_peaks(keys[1], num_examples=config.test))
    scaled = []
    for key, count in zip(keys, (config.examples, config.test), strict=True):
        inputs, states = reactor(key, num_examples=count)
        energy = reactor_energy(states)[..., None] / ENERGY_SCALE
        scaled += [inputs / SCALE, jnp.concatenate([(states / SCALE[:2] + 1) / 2, energy], axis=-1)]
    return Data(*scaled)


class Layers(nn.Module):
    """Two LSTMs between linear maps."""

    d_model: int
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        return nn.Dense(self.d_model)(LSTM(self.width)(LSTM(self.width)(x)))


class Kind(NamedTuple):
    build: Callable
    project: Callable


#: `rnn` has the layers of `iclrnn`, and no constraint.
KINDS = {
    "iclrnn": Kind(lambda D, H: ICLRNN(D, hidden_sizes=(H, H)), ICLRNN.contracted),
    "rnn": Kind(lambda D, H: ICLRNN(D, hidden_sizes=(H, H)), lambda params: params),
    "lstm": Kind(Layers, lambda params: params),
}


def predict(config: Config, kind: str, like: Data) -> Callable:
    """`params, inputs -> targets`; a model is as wide as its inputs, its first outputs count."""
    model = KINDS[kind].build(like.inputs.shape[-1], config.width)
    return lambda params, x: model.apply(params, x)[..., : like.targets.shape[-1]]


def measure(run: Run[Config]) -> None:
    config = run.config
    rows: list[dict[str, Any]] = []
    params_of = {}
    for task in config.names():
        drawn = data(config, task)
        for kind in KINDS:
            params = trained(run, task, kind, drawn)
            params_of[f"{task}-{kind}"] = params[1]
            made = partial(certified, config, task, kind, drawn, *params)
            rows += run.kept(f"{task}, {kind}", made)["rows"]
            show(rows[-len(config.noises) * config.seeds :])
    verdict(run, rows, digest(params_of))


def trained(run: Run[Config], task: str, kind: str, drawn: Data):
    """Models of all noises and seeds at once, as they began and as they ended; each has noise of its own."""
    config, (build, project) = run.config, KINDS[kind]
    forward = predict(config, kind, drawn)
    model = build(drawn.inputs.shape[-1], config.width)
    shape = (len(config.noises), config.seeds, *drawn.targets.shape)
    noise = np.random.default_rng(config.seed).standard_normal(shape).astype(np.float32)
    noisy = drawn.targets + np.reshape(config.noises, (-1, 1, 1, 1, 1)).astype(np.float32) * noise
    noisy = noisy.reshape(-1, *drawn.targets.shape)
    init = ensemble_init(lambda key: project(model.init(key, drawn.inputs[:1])), len(noisy))
    rows = epoch_rows(len(drawn.inputs), config.train.batch_size, config.seed, of=f"samples of {task}")

    def loss(params, batch, key, noisy):
        value = jnp.mean((forward(params, drawn.inputs[batch["rows"]]) - noisy[batch["rows"]]) ** 2)
        return value, {"loss": value}

    batches = lambda step: {"rows": rows(step)}
    optimizer = per_member(projected(optax.adam(config.train.learning_rate), project))
    fitted = run.fit(ensemble_loss(loss, noisy), init, batches, part=f"{task}-{kind}", optimizer=optimizer)
    return jax.jit(init)(jax.random.key(config.seed)), fitted.params


def certified(config: Config, task: str, kind: str, drawn: Data, start, end) -> dict[str, list[dict[str, Any]]]:
    """A row for each noise and seed."""
    predicted = predict(config, kind, drawn)
    forward = jax.jit(predicted)
    steepness = jax.jit(lambda params, x: local_lipschitz(lambda x: predicted(params, x[None])[0], x).max())
    labels = [(noise, seed) for noise in config.noises for seed in range(config.seeds)]
    rows = [
        {"task": task, "kind": kind, "noise": noise, "seed": seed}
        | certificates(config, kind, forward, steepness, drawn, *params)
        for (noise, seed), *params in zip(labels, members(start), members(end), strict=True)
    ]
    if task == "reactor":
        steer = jax.jit(jax.vmap(lambda params: control(config, partial(predicted, params))))
        for row, found in zip(rows, members(steer(end)), strict=True):
            row |= jax.tree.map(float, found)
    return {"rows": rows}


def certificates(config: Config, kind: str, forward, steepness, drawn: Data, start, end) -> dict[str, float]:
    """In float64: errors, convexity gaps, how far outputs move, and the bounds that kernels keep.

    Outputs move by at least the Jacobian's norm at some test sequence times what inputs move, and an ICLRNN's by its
    bound at most; pairs of test sequences, the paper's estimate, are so far apart that they hide what is steep.
    """
    rng = np.random.default_rng(config.seed)
    pairs, shares = rng.uniform(-1, 1, (2, 1000, *drawn.inputs.shape[1:])), rng.random(1000)
    kernels = [W for path, W in jax.tree_util.tree_leaves_with_path(end) if "kernel" in jax.tree_util.keystr(path)]
    with jax.enable_x64(True):
        wide = partial(jax.tree.map, lambda a: jnp.asarray(np.asarray(a, np.float64)))
        start, end, x, other, share, tests = wide((start, end, *pairs, shares, drawn.test_inputs))
        gap = lambda params: float(convexity_gap(partial(forward, params), x, other, share).min())
        gaps = {"gap before": gap(start), "gap": gap(end)}
        found = np.asarray(forward(end, tests))
        lipschitz = {"lipschitz": float(steepness(end, tests))}
        if kind == "iclrnn":
            lipschitz["lipschitz bound"] = float(steepness(ICLRNN.opened(end), tests[:1]))
    apart = lambda a: np.linalg.norm((a - np.roll(a, 1, axis=0)).reshape(len(a), -1), axis=1)
    *errors, last = np.mean((found - np.asarray(drawn.test_targets)) ** 2, axis=(0, 1))
    energy = {"energy error": float(last)} if errors else {}  # it comes behind the states
    return (
        gaps
        | lipschitz
        | {"error": float(np.mean(errors or [last]))}
        | energy
        | {
            "ratio of pairs": float((apart(found) / apart(np.asarray(tests))).max()),
            "least weight": float(min(W.min() for W in kernels)),
            "largest norm": float(max(np.linalg.norm(np.asarray(W, np.float64), 2) for W in kernels)),
        }
    )


def control(config: Config, foreseen: Callable) -> dict[str, jax.Array]:
    """The plant from the edge of its region, under the inputs with the least mean energy foreseen and effort.

    The cost is convex in the inputs where the model is: then where the search starts from makes no difference.
    """
    edge = edges(config)

    def plan(x, start):
        def cost(u):
            given = jnp.concatenate([x / SCALE[:2], u])
            energy = foreseen(jnp.broadcast_to(given, (1, 10, 4)))[0, :, 2]
            return energy.mean() + config.effort * jnp.sum(u**2)

        return least_cost(cost, start)

    energy = spent(config, lambda x: plan(x, jnp.zeros(2)))
    starts = jax.random.uniform(jax.random.key(config.seed + 2), (8, 2), minval=-1.0)
    plans = jax.vmap(lambda x: jax.vmap(partial(plan, x))(starts))(edge)
    spread = (plans.max(axis=1) - plans.min(axis=1)).max(axis=-1).mean()
    return energy | {"spread": spread}


def edges(config: Config) -> jax.Array:
    return edge_states(jax.random.key(config.seed + 1), num_examples=8)


def spent(config: Config, plan: Callable) -> dict[str, jax.Array]:
    """The plant's energy under a plan, as a share of the region's: the mean, and what is left."""
    last, energies = steered(plan, edges(config), periods=config.periods)
    return {"energy": energies.mean(), "energy at the end": reactor_energy(last).mean() / REGION}


def references(config: Config) -> dict[str, dict[str, float]]:
    """Planned with the plant itself, and not controlled."""

    def plant(inputs):
        given = inputs[:, 0] * SCALE
        path = reactor_path(given[:, :2], given[:, 2:])
        return jnp.concatenate([path, reactor_energy(path)[..., None] / ENERGY_SCALE], axis=-1)

    found = {
        "planned with the plant": jax.jit(partial(control, config, plant))(),
        "no control": spent(config, jnp.zeros_like),
    }
    return jax.tree.map(float, found)


COLUMNS = (
    "error", "energy error", "lipschitz", "lipschitz bound", "ratio of pairs", "gap before", "gap", "least weight",
    "largest norm", "energy", "energy at the end", "spread",
)  # fmt: skip
PANELS = {"error": "mean squared error", "lipschitz": "largest norm of a Jacobian", "energy": "mean energy"}


def show(rows: list[dict[str, Any]]) -> None:
    for noise, of in grouped(rows, "noise").items():
        named = "  ".join(f"{name} {mean_of(of, name):.3g}" for name in COLUMNS if name in of[0])
        print(f"{of[0]['task']:<8} {of[0]['kind']:<7} noise {noise}  {named}", flush=True)


def verdict(run: Run[Config], rows: list[dict[str, Any]], parameters_digest: str) -> None:
    config, of = run.config, grouped(rows, "kind")
    mean = lambda name, kind, task, noise: mean_of(where(of[kind], task=task, noise=noise), name)
    parts = {
        "ICLRNN is convex": min(min(row["gap before"], row["gap"]) for row in of["iclrnn"]) >= GAP,
        "its kernels are bounded": max(row["largest norm"] for row in of["iclrnn"]) <= NORM
        and min(row["least weight"] for row in of["iclrnn"]) >= 0,
        "the others are not convex": max(row["gap"] for row in of["lstm"] + of["rnn"]) < GAP,
    }
    for task in config.names():
        noise, most, share = ERRORS[task]
        if noise not in config.noises:
            continue
        error = mean("error", "iclrnn", task, noise)
        parts[f"{task}: errs little"] = error <= most
        parts[f"{task}: errs less than an LSTM"] = error <= share * mean("error", "lstm", task, noise)
        if task == "peaks":
            steepest = {kind: mean("lipschitz", kind, task, noise) for kind in LIPSCHITZ}
            parts["peaks: ICLRNN moves little"] = steepest["iclrnn"] <= LIPSCHITZ["iclrnn"]
            parts["peaks: an LSTM does not"] = steepest["lstm"] >= LIPSCHITZ["lstm"]
        elif 0.0 in config.noises:
            parts["reactor: errs little without noise"] = mean("error", "iclrnn", task, 0.0) <= most
    baseline = references(config) if "reactor" in config.names() else {}
    measured = {
        f"{task}, {kind}, noise {noise}: {name}": mean(name, kind, task, noise)
        for task in config.names() for kind in KINDS for noise in config.noises
        for name in ("error", "energy error", "lipschitz", "lipschitz bound", "ratio of pairs", "energy", "spread")
        if name in where(of[kind], task=task)[0]
    }  # fmt: skip
    measured |= {f"least convexity gap, {kind}": min(row["gap"] for row in of[kind]) for kind in KINDS}
    draw(run, rows, baseline)
    run.finish(
        claim="an ICLRNN is convex and its kernels are bounded, others are not"
        + ", and noise on its targets harms it less than an LSTM" * any("errs" in name for name in parts),
        measured=measured,
        baseline=baseline,
        threshold={"gap": GAP, "norm": NORM, "errors": ERRORS, "lipschitz": LIPSCHITZ},
        holds=parts,
        rows=rows,
        parameters_digest=parameters_digest,
    )


def draw(run: Run, rows: list[dict[str, Any]], baseline: dict[str, Any]) -> None:
    """Against the noise to train on: errors and steepness by task, and the energy of the plant under control."""
    of = grouped(rows, "task")
    panels = [(task, name) for task in of for name in PANELS if name in of[task][0]]
    with run.figure("iclrnn", figsize=(3.6 * len(panels), 3.6)) as figure:
        for axes, (task, name) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for kind in KINDS:
                points_and_mean(axes, where(of[task], kind=kind), "noise", name, label=kind)
            for style, (label, found) in zip(("--", ":"), baseline.items() if name == "energy" else (), strict=False):
                axes.axhline(found["energy"], color="0.4", linestyle=style, linewidth=1, label=label)
            axes.set(yscale="log", xlabel="noise on the targets", ylabel=f"{task}: {PANELS[name]}")
            axes.legend(frameon=False, fontsize="x-small")


if __name__ == "__main__":
    main("iclrnn", PRESETS, measure)
