"""What an approximation of attention buys: its error against exact attention by its budget.

Claim   Of Performer, 1,024 features err at most 0.4 times as much as 32 where queries and keys are of size 1/2, and
        positive features 20 times less than trigonometric ones at size 1, where neither is useful. Of Linformer, the
        best mixtures of half as many as there are tokens err at most half as much as the best 4. Of Reformer, 16 rounds
        err at most 0.6 times as much as one. Every larger budget helps.
Source  Practical survey (arXiv 2103.14636); Performer (2009.14794), Linformer (2006.04768), Reformer (2001.04451). The
        bounds on Performer are measured on the authors' code; those on Linformer and Reformer are ours.
Expect  Performer 0.81 to 0.19, at size 1 no better than 1.0 (trigonometric 238); Linformer 0.30 to 0.014, with random
        mixtures above 1; Reformer 0.47 to 0.06. Two minutes on 2 CPU cores.
Run     python -m experiments.approximations [--preset cpu|gpu|debug]
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq.fields import check_counts
from jaxseq.layers import random_features
from jaxseq.mixers import Linformer, Performer, Reformer
from jaxseq.ops import softmax_attention
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, digest, main


@dataclass(frozen=True)
class Config:
    """One head of attention, the inputs and the budgets."""

    seed: int = 0
    """Seed of inputs, projections, features and rotations."""
    length: int = 128
    """Tokens."""
    width: int = 32
    """Channels of the head."""
    draws: int = 8
    """Draws that an error is a mean of, of inputs, features and rotations."""
    features: tuple[int, ...] = (32, 64, 256, 1024)
    """Performer's random features; trigonometric ones are measured at the one in the middle."""
    ranks: tuple[int, ...] = (4, 16, 64)
    """Linformer's mixtures of tokens."""
    rounds: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Reformer's rounds of hashing."""
    bucket_size: int = 8
    """Tokens of its buckets."""
    clusters: int = 16
    """Its tokens are drawn around so many centres."""
    smoothness: float = 8.0
    """Linformer's tokens change over so many steps of time."""
    train: TrainConfig = TrainConfig(
        steps=400, batch_size=16, learning_rate=2e-2, warmup_steps=20, final_learning_rate_ratio=0.0, weight_decay=0.0,
        log_every=50,
    )  # fmt: skip
    """How Linformer's mixtures are fitted."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "length", "width", "draws", "bucket_size", "clusters")
        for name in ("features", "ranks", "rounds"):
            budgets = getattr(self, name)
            if len(budgets) < 2 or list(budgets) != sorted(set(budgets)) or budgets[0] < 1:
                raise ValueError(f"{name}={budgets}; give two or more, each larger than the one before.")


PRESETS = {
    "cpu": Config(),
    "gpu": Config(length=1024, width=64, draws=32, ranks=(16, 32, 64, 128, 256, 512), bucket_size=64, clusters=32,
                  smoothness=32.0, train=replace(Config.train, steps=3000, batch_size=64)),
    # Seconds: to see that everything works.
    "debug": Config(length=16, width=8, draws=2, features=(8, 16), ranks=(2, 8), rounds=(1, 2), bucket_size=4,
                    clusters=4, train=TrainConfig(steps=3, batch_size=4, log_every=1)),
}  # fmt: skip

#: The most that the error at the largest budget is of that at the smallest.
MOST = {"performer, size 0.5": 0.4, "linformer": 0.5, "reformer": 0.6}
#: Of queries and keys.
SIZES = (0.5, 1.0)
#: Of Reformer's: few others of its cluster have most of a token's weight.
SHARPNESS = 4.0
#: How many times less positive features err than trigonometric ones, at size 1.
GAIN = 20.0


def projections(key, width: int, size: float) -> dict[str, jax.Array]:
    """Orthogonal queries, keys and values of tokens of unit variance; queries and keys of this size."""
    q, k, v = jax.random.orthogonal(key, width, (3,))
    return {"q": size * q, "k": size * k, "v": v}


def exact(kernels, x):
    """Attention of all tokens to all: one head."""
    q, k, v = ((x @ kernels[name])[:, :, None] for name in "qkv")
    return softmax_attention(q, k, v, causal=False)[:, :, 0]


def parameters(kernels, **others):
    """Of a mixer with these projections, and none at the output."""
    given = {f"{name}_proj": {"kernel": kernel} for name, kernel in kernels.items()}
    return {"params": given | {"out_proj": {"kernel": jnp.eye(kernels["v"].shape[0])}} | others}


def error(found, expected):
    """Relative, of all outputs."""
    return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


def mean_errors(config: Config, of: Callable, sizes: tuple[float, ...]) -> list[float]:
    """Of `of(size, key)`, for each size."""
    keys = jax.random.split(jax.random.key(config.seed), config.draws)
    run = jax.jit(lambda size: jax.lax.map(partial(of, size), keys).mean())
    return [float(run(size)) for size in sizes]


def of_performer(config: Config, number: int, size, key):
    """Independent tokens."""
    k_x, k_kernels, k_features = jax.random.split(key, 3)
    x = jax.random.normal(k_x, (1, config.length, config.width))
    kernels = projections(k_kernels, config.width, size)
    module = Performer(config.width, num_heads=1, num_features=number, causal=False)
    return error(module.apply(parameters(kernels), x, rngs={"features": k_features}), exact(kernels, x))


def of_waves(config: Config, number: int, size, key):
    """The same with trigonometric features, of which half as many make as many numbers."""
    k_x, k_kernels, k_features = jax.random.split(key, 3)
    x = jax.random.normal(k_x, (1, config.length, config.width))
    kernels = projections(k_kernels, config.width, size)
    rows = random_features.orthogonal_features(k_features, max(1, number // 2), config.width)
    q, k = (
        random_features.trigonometric_features((x @ kernels[name])[:, :, None], rows)[0, :, 0] for name in ("q", "k")
    )
    weights = q @ k.T
    found = weights @ (x @ kernels["v"])[0] / weights.sum(-1, keepdims=True)
    return error(found[None], exact(kernels, x))


def clustered(config: Config, key):
    """Tokens near centres, so that few others matter to each."""
    k_centres, k_which, k_noise = jax.random.split(key, 3)
    centres = jax.random.normal(k_centres, (config.clusters, config.width))
    x = centres[jax.random.randint(k_which, (1, config.length), 0, config.clusters)]
    return x + 0.3 * jax.random.normal(k_noise, x.shape)


def of_reformer(config: Config, rounds: int, size, key):
    """Against the same layer with one bucket, which is dense."""
    k_x, k_kernels, k_rotations = jax.random.split(key, 3)
    x = clustered(config, k_x)
    kernels = projections(k_kernels, config.width, size)
    params = parameters({"qk": kernels["q"], "v": kernels["v"]})
    build = partial(Reformer, config.width, num_heads=1, count_once=True)
    dense = build(bucket_size=config.length, rounds=1)
    found = build(bucket_size=config.bucket_size, rounds=rounds).apply(params, x, rngs={"features": k_rotations})
    return error(found, dense.apply(params, x))


def smooth(config: Config, key, rows: int = 1):
    """Tokens of unit variance that change slowly, so that mixtures of neighbours say something."""
    reach = int(3 * config.smoothness)
    window = jnp.exp(-0.5 * (jnp.arange(-reach, reach + 1) / config.smoothness) ** 2)
    noise = jax.random.normal(key, (rows, config.length + 2 * reach, config.width))
    over_time = jax.vmap(jax.vmap(partial(jnp.convolve, mode="valid"), (1, None), 1), (0, None))
    return over_time(noise, window / jnp.linalg.norm(window))


def fitted(run: Run[Config], rank: int):
    """Linformer whose mixtures are the best for smooth tokens: errors before and after, and the mixtures."""
    config = run.config
    data, start, last = jax.random.split(jax.random.key(config.seed), 3)
    kernels = projections(start, config.width, 1.0)
    module = Linformer(config.width, num_heads=1, rank=rank, max_length=config.length)
    draw = jax.jit(partial(smooth, config), static_argnames="rows")

    def loss(mixtures, batch, key):
        params = parameters(kernels, **mixtures)
        params["params"]["out_proj"]["bias"] = jnp.zeros(config.width)
        return error(module.apply(params, batch), exact(kernels, batch)) ** 2, {}

    def init(key):
        drawn = module.init(key, jnp.zeros((1, config.length, config.width)))["params"]
        return {name: drawn[name] for name in ("key_mix", "value_mix")}

    batches = lambda step: np.asarray(draw(jax.random.fold_in(data, step), rows=config.train.batch_size))
    test = draw(last, rows=4 * config.draws)
    measured = jax.jit(lambda mixtures, test: jnp.sqrt(loss(mixtures, test, None)[0]))
    mixtures = run.fit(loss, init, batches, part=f"rank_{rank}").params
    before, after = (float(measured(m, test)) for m in (init(jax.random.key(config.seed)), mixtures))
    return before, after, mixtures


def measure(run: Run[Config]) -> None:
    config = run.config
    errors: dict[str, dict[int, float]] = {}

    def note(name: str, budget: int, value: float) -> None:
        errors.setdefault(name, {})[budget] = value
        print(f"{name:<32}{budget:>6}  {value:.3f}", flush=True)

    middle = config.features[len(config.features) // 2]
    for name, of, numbers in (
        ("performer", of_performer, config.features), ("trigonometric features", of_waves, (middle,)),
    ):  # fmt: skip
        for number in numbers:
            for size, value in zip(SIZES, mean_errors(config, partial(of, config, number), SIZES), strict=True):
                note(f"{name}, size {size}", number, value)
    for rounds in config.rounds:
        note("reformer", rounds, *mean_errors(config, partial(of_reformer, config, rounds), (SHARPNESS,)))
    params = {}
    for rank in config.ranks:
        before, after, params[str(rank)] = fitted(run, rank)
        note("linformer, random mixtures", rank, before)
        note("linformer", rank, after)
    shares = {name: last(errors[name]) / first(errors[name]) for name in MOST}
    gain = errors["trigonometric features, size 1.0"][middle] / errors["performer, size 1.0"][middle]
    parts = {name: shares[name] <= most for name, most in MOST.items()}
    parts |= {f"{name} at every larger budget": falls(errors[name]) for name in MOST}
    parts |= {"positive features": gain >= GAIN}
    plot(run, errors)
    run.finish(
        claim="the error of each approximation of attention falls with its budget",
        measured={f"error at the most over the least, {name}": round(share, 4) for name, share in shares.items()}
        | {"error of trigonometric over positive features, size 1": round(gain, 2)},
        baseline={
            "performer, size 1.0": last(errors["performer, size 1.0"]),
            "linformer, random mixtures": last(errors["linformer, random mixtures"]),
        },
        threshold={f"error at the most over the least, {name}": most for name, most in MOST.items()}
        | {"error of trigonometric over positive features, size 1": GAIN},
        holds=parts,
        errors={name: {str(budget): value for budget, value in points.items()} for name, points in errors.items()},
        parameters_digest=digest(params),
    )


def first(points: dict[int, float]) -> float:
    return points[min(points)]


def last(points: dict[int, float]) -> float:
    return points[max(points)]


def falls(points: dict[int, float]) -> bool:
    values = [points[budget] for budget in sorted(points)]
    return all(later < earlier for earlier, later in zip(values, values[1:], strict=False))


def plot(run: Run, errors: dict[str, dict[int, float]]) -> None:
    with run.figure("approximations", figsize=(12, 4)) as figure:
        titles = {"features": "size", "rounds": "reformer", "mixtures (rank)": "linformer"}
        for axes, (budget, word) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            for name, points in errors.items():
                if word in name:
                    axes.plot(list(points), list(points.values()), "o-", label=name)
            axes.set(xscale="log", yscale="log", xlabel=budget, ylabel="relative error of the output")
            axes.set_xticks(*(2 * [sorted({n for name, points in errors.items() if word in name for n in points})]))
            axes.xaxis.minorticks_off()
            axes.legend(frameon=False)


if __name__ == "__main__":
    main("approximations", PRESETS, measure)
