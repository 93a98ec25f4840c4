"""A chain of variates, each doing next what the one before it did: what a state space over both axes sees of it.

Claim   One layer of Chimera forecasts the next step of the chain at a mean squared error of 0.2 at most, of which 0.09
        is noise; without couplings, and as a scan of each variate by itself, it is left with 0.8 or more. In reverse
        order of the variates so does the layer of both directions, and that of one is left with 0.8. The same holds
        where the chain takes two steps a variate. A training step takes time near-linear in the steps T and in the
        variates V: exponents of 1.2 at most.
Source  Chimera (arXiv 2406.04320), section 3, on what couplings and both directions are for; the chains are ours.
Expect  0.092 with couplings, 0.947 of each variate by itself; in reverse order 0.093 of both directions, 0.946 of one.
        But without couplings 0.190, so the claim does not hold: a chain of one step asks for no more than the variate
        beside at the same step, which two decays over the variates tell. Where it takes two steps a variate, 0.099
        with couplings and 0.974 without. Exponents of 0.89 in T and 0.64 in V, all sizes in turn (1.23 and 0.94 one
        size after the other); one size took 184 and 290 ms in two runs. Eleven minutes on 2 busy CPU cores.
Run     python -m experiments.variate_chain [--preset cpu|gpu]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxseq.analysis import exponent
from jaxseq.analysis.timing import in_turns
from jaxseq.fields import chosen
from jaxseq.mixers import Chimera
from jaxseq.tasks import variate_chain
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, digest, main


@dataclass(frozen=True)
class Config:
    """Chain, model, training, and the sizes that are timed."""

    seed: int = 0
    """The first seed of weights and of the series to train on."""
    seeds: int = 1
    """Seeds of each model."""
    models: str = ""
    """Models by name, with commas between them; all where none is given."""
    variates: int = 8
    """Variates of the chain."""
    length: int = 32
    """Steps of a series."""
    width: int = 8
    """Channels of a cell."""
    states: int = 8
    """States a channel."""
    examples: int = 100
    """Series to test on."""
    timed_lengths: tuple[int, ...] = (256, 1024, 4096)
    """Steps T that are timed, at the first V; one size alone is not."""
    timed_variates: tuple[int, ...] = (8, 32, 128)
    """Variates V that are timed, at the first T; one size alone is not."""
    timed_batch: int = 2
    """Series that are timed at once."""
    repeats: int = 5
    """Rounds of the timing."""
    train: TrainConfig = TrainConfig(
        steps=300, batch_size=16, learning_rate=1e-2, warmup_steps=20, final_learning_rate_ratio=0.0, weight_decay=0.0
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        least = dict(seeds=1, variates=2, length=2, width=1, states=1, examples=1, timed_batch=1, repeats=1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}.")
        for name in ("timed_lengths", "timed_variates"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be sizes of at least 1.")
        self.names()

    def names(self) -> list[str]:
        return chosen("models", self.models, MODELS)


class Chain(NamedTuple):
    delay: int
    backwards: bool


#: One step a variate, the same in reverse order of the variates, and two steps a variate.
CHAINS = {"chain": Chain(1, False), "chain in reverse": Chain(1, True), "two steps": Chain(2, False)}
#: Of short memories: nothing before the last steps helps.
BOTH_WAYS = partial(Chimera, dt=(0.1, 1.0))
ONE_WAY = partial(BOTH_WAYS, bidirectional=False)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "coupled": ONE_WAY,
    "uncoupled": partial(ONE_WAY, coupling="none"),
    "time alone": partial(ONE_WAY, coupling="time"),
    "both directions": BOTH_WAYS,
}
#: What the claim asks of a model on a chain: (at most, that much) or (at least, that much).
MOST, LEAST, SLOPE = 0.2, 0.8, 1.2
ASKED = {
    ("coupled", "chain"): MOST,
    ("both directions", "chain"): MOST,
    ("uncoupled", "chain"): LEAST,
    ("time alone", "chain"): LEAST,
    ("both directions", "chain in reverse"): MOST,
    ("coupled", "chain in reverse"): LEAST,
    ("coupled", "two steps"): MOST,
    ("uncoupled", "two steps"): LEAST,
}

PRESETS = {
    "cpu": Config(),
    # Sizes for an accelerator.
    "gpu": Config(
        seeds=3, length=64, width=16, states=16, timed_batch=8,
        timed_lengths=(512, 1024, 2048, 4096, 8192), timed_variates=(32, 64, 128, 256),
        train=TrainConfig(steps=1000, batch_size=64, learning_rate=5e-3, weight_decay=0.0),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        variates=3, length=6, width=2, states=2, examples=4, timed_lengths=(4, 8), timed_variates=(2, 4), repeats=1,
        train=TrainConfig(steps=2, batch_size=2, learning_rate=1e-2, log_every=1),
    ),
}  # fmt: skip


class NextStep(nn.Module):
    """One layer: cells of a few channels, the mixer, and of each the next value of its variate."""

    d_model: int
    mixer: Any

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.d_model, name="encoder")(x[..., None])
        return nn.Dense(1, name="head")(self.mixer(d_model=self.d_model, name="mixer")(h))[..., 0]


def build(config: Config, name: str) -> NextStep:
    return NextStep(config.width, partial(MODELS[name], state_size=config.states))


def drawn(config: Config, chain: Chain, key, number: int):
    """Series, and what of their next steps can be known: all but the first variate, once it has seen `delay` steps."""
    sizes = dict(num_examples=number, length=config.length + 1, num_variates=config.variates)
    x, shape = variate_chain(key, **sizes, delay=chain.delay), (number, config.length, config.variates)
    counted = jnp.ones(shape, bool).at[:, :, 0].set(False).at[:, : chain.delay - 1].set(False)
    flip = lambda x: x[:, :, ::-1] if chain.backwards else x
    return {"x": flip(x), "counted": flip(counted)}


def squared_error(model: NextStep, params, batch):
    """Of what is counted."""
    error = (model.apply(params, batch["x"][:, :-1]) - batch["x"][:, 1:]) ** 2
    value = jnp.sum(jnp.where(batch["counted"], error, 0)) / batch["counted"].sum()
    return value, {"loss": value}


def measure(run: Run[Config]) -> None:
    config = run.config
    errors: dict[str, dict[str, list[float]]] = {name: {} for name in config.names()}
    params = {}
    for kind, chain in CHAINS.items():
        draw = jax.jit(partial(drawn, config, chain), static_argnums=1)
        test = draw(jax.random.key(2**31 - 1), config.examples)
        for name in config.names():
            model = build(config, name)
            for seed in range(config.seed, config.seed + config.seeds):
                part = f"{name}, {kind}, {seed}".replace(" ", "-").replace(",", "")

                def batches(step, seed=seed, draw=draw):
                    return draw(jax.random.fold_in(jax.random.key(seed), step), config.train.batch_size)

                loss = lambda params, batch, key, m=model: squared_error(m, params, batch)
                init = lambda key, m=model, seed=seed, x=test["x"]: m.init(jax.random.fold_in(key, seed), x[:1, :-1])
                params[part] = run.fit(loss, init, batches, part=part).params
                error = float(jax.jit(partial(squared_error, model))(params[part], test)[0])
                errors[name].setdefault(kind, []).append(error)
                run.record(config.train.steps, f"test/{part}", {"loss": error})
                print(f"{name:<18}{kind:<18}{error:.4f}", flush=True)
    mean = {name: {kind: float(np.mean(values)) for kind, values in rows.items()} for name, rows in errors.items()}
    times = timed(config)
    slopes = {axis: exponent(list(ms), list(ms.values())) for axis, ms in times.items()}
    for axis, ms in times.items():
        print(f"{axis}: " + ", ".join(f"{n} in {t:.2f} ms" for n, t in ms.items()) + f"; exponent {slopes[axis]:.2f}")
    asked = {pair: limit for pair, limit in ASKED.items() if pair[0] in mean}
    parts = {
        f"{name}, {kind}": mean[name][kind] <= limit if limit == MOST else mean[name][kind] >= limit
        for (name, kind), limit in asked.items()
    }
    parts |= {f"near-linear in {axis}": bool(slope <= SLOPE) for axis, slope in slopes.items()}
    run.plot()
    plot(run, mean, times)
    run.finish(
        claim="one layer with couplings forecasts the chain, none without; near-linear in T and V",
        measured={f"{name}, {kind}": mean[name][kind] for name, kind in asked if asked[name, kind] == MOST} | slopes,
        baseline={f"{name}, {kind}": mean[name][kind] for name, kind in asked if asked[name, kind] == LEAST},
        threshold={"at most": MOST, "others at least": LEAST, "exponents": SLOPE},
        holds=parts,
        errors=errors,
        milliseconds=times,
        parameters_digest=digest(params),
    )


def timed(config: Config) -> dict[str, dict[int, float]]:
    """Milliseconds of a training step of the layer, for each T and for each V, all sizes in turn."""
    module = build(config, "coupled").mixer(d_model=config.width)
    sizes = {"T": config.timed_lengths, "V": config.timed_variates}
    params = jax.jit(module.init)(jax.random.key(config.seed), jnp.zeros((1, 1, 1, config.width)))

    @jax.jit
    def step(params, x):
        return jax.value_and_grad(lambda *a: jnp.sum(module.apply(*a) ** 2), (0, 1))(params, x)

    def program(axis: str, size: int):
        length, variates = (size if axis == name else sizes[name][0] for name in sizes)
        shape = (config.timed_batch, length, variates, config.width)
        compiled: Any = step.lower(params, jnp.zeros(shape)).compile()
        call: Any = lambda *arguments: compiled(*arguments)
        call.prepare = lambda key: (params, jax.block_until_ready(jax.random.normal(key, shape)))
        return call

    programs = {(axis, n): program(axis, n) for axis, each in sizes.items() if len(each) > 1 for n in each}
    draw = lambda turn: (jax.random.fold_in(jax.random.key(config.seed), turn),)
    ms = in_turns(programs, draw, seed=config.seed, repeats=config.repeats, seconds=0.1)
    return {axis: {n: ms[axis, n] for n in each} for axis, each in sizes.items() if len(each) > 1}


def plot(run: Run, mean: dict[str, dict[str, float]], times: dict[str, dict[int, float]]) -> None:
    """Errors of each model on each chain, and milliseconds by T and by V."""
    with run.figure("chain", figsize=(10, 4)) as figure:
        bars, lines = figure.subplots(1, 2, width_ratios=(1.4, 1))
        height = 0.8 / len(CHAINS)
        for place, kind in enumerate(CHAINS):
            at = np.arange(len(mean)) + place * height
            bars.barh(at, [row[kind] for row in mean.values()], height, label=kind)
        bars.set_yticks(np.arange(len(mean)) + height * (len(CHAINS) - 1) / 2, list(mean))
        bars.invert_yaxis()
        bars.axvline(0.09, color="black", linestyle=":", linewidth=1, label="noise")
        bars.set(xlabel="mean squared error of the next step")
        bars.legend(frameon=False, fontsize="x-small")
        for axis, ms in times.items():
            lines.plot(list(ms), list(ms.values()), "o-", label=f"by {axis}")
        lines.set(xscale="log", yscale="log", xlabel="T or V", ylabel="ms a training step of the layer")
        if times:
            lines.legend(frameon=False, fontsize="x-small")


if __name__ == "__main__":
    main("variate_chain", PRESETS, measure)
