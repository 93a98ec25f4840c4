"""Training on random subsets of the sources: the compute it saves, the loss at equal steps, and the ensemble's gain.

Claim   A language model whose layers but the first train on a quarter of the sources for nine tenths of the steps, and
        densely for the last tenth, is within 1 % of dense training's bits per byte when read densely. An ensemble of 32
        draws of subsets is within 0.5 % of it, or ahead, and one of 8 ahead of a single draw, for either training;
        dense steps at the end lower the dense loss; a single draw costs the densely trained model more than the other.
        At 1,024 tokens attention trains 1.5 times as fast, in a third of the temporaries: four times fewer scores.
Source  The information pathways hypothesis (arXiv 2306.01705), scaled to 4 layers; the margins are ours.
Expect  Of tiny Shakespeare, one seed: 2.915 bits per byte dense; trained on subsets 2.943, after the dense steps 2.894,
        as an ensemble of 32 2.911, of one draw 2.940: the claim holds. Attention trains 5.3 times as fast in 3.9 times
        less. Ten minutes on 2 busy CPU cores. Of source code, with a constant rate in the dense steps, it was behind.
Run     python -m experiments.subsampled_attention [--preset cpu|gpu|debug] [--seeds 3] [--data.path FILE_OR_FOLDER]
        The text is the Python standard library unless a path is given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import LanguageModel
from jaxseq.analysis import Case, TokenNats, self_ensemble, side_by_side
from jaxseq.data import VOCABULARY, TextConfig, TextWindows, evaluation_windows, with_begin
from jaxseq.fields import check_counts
from jaxseq.mixers import SubsampledAttention
from jaxseq.ops import softmax_attention, subsampled_attention, subsets
from jaxseq.ops.subsampled_attention import num_scores
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main, make_optimizer


@dataclass(frozen=True)
class Config:
    """Text, model, subsets and training, the same for both ways to train."""

    seed: int = 0
    """Seed of the order of the data and of the subsets; models have this and the following ones."""
    seeds: int = 3
    """Models of each kind."""
    width: int = 64
    """Width of the model."""
    depth: int = 4
    """Its layers."""
    dense_layers: int = 1
    """The first of them, which see all sources throughout."""
    heads: int = 4
    """Heads of a layer."""
    ratio: int = 4
    """One of so many sources is seen in training."""
    mode: Literal["truncate", "window", "local", "local_source"] = "local"
    """How subsets are drawn."""
    sigma: float = 16.0
    """Tokens by which a token's place is jittered where they are local."""
    tuning: float = 0.1
    """Share of the steps that are dense, at the end."""
    ensembles: tuple[int, int] = (8, 32)
    """Draws that are averaged: few, and many."""
    test_windows: int = 96
    """Windows of the test files that are scored, evenly spread."""
    timing_length: int = 1024
    """Tokens at which attention is timed."""
    bfloat16: bool = False
    """Compute in bfloat16."""
    data: TextConfig = TextConfig(context=128)
    train: TrainConfig = TrainConfig(steps=400, batch_size=24, learning_rate=2e-3, warmup_steps=20, log_every=20)
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "seeds", "width", "depth", "heads", "ratio", "test_windows", "timing_length")
        if not 0 <= self.dense_layers < self.depth:
            raise ValueError(f"dense_layers={self.dense_layers} must be 0 or more and below depth={self.depth}.")
        if not 0 < self.tuning < 1:
            raise ValueError(f"tuning={self.tuning} must be a share of the steps, above 0 and below 1.")
        for name, length in (("data.context", self.data.context), ("timing_length", self.timing_length)):
            if length % self.ratio:
                raise ValueError(f"ratio={self.ratio} does not divide {name}={length}.")

    def subsampled_steps(self) -> int:
        """Those before the dense ones at the end."""
        return self.train.steps - max(1, round(self.tuning * self.train.steps))


PRESETS = {
    "cpu": Config(),
    # The paper's layers and length on Enwik8, at fewer steps.
    "gpu": Config(
        width=512, depth=12, heads=8, sigma=64.0, test_windows=256, bfloat16=True,
        data=TextConfig(context=1024),
        train=TrainConfig(steps=20_000, batch_size=32, learning_rate=1e-3, warmup_steps=500),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        width=8, depth=2, heads=2, sigma=4.0, ensembles=(2, 3), test_windows=8, timing_length=32,
        data=TextConfig(context=32), train=TrainConfig(steps=4, batch_size=4, log_every=1),
    ),
}  # fmt: skip
#: Margins relative to dense training: read densely, and as the larger ensemble.
DENSE_MARGIN, ENSEMBLE_MARGIN = 0.01, 0.005
#: Times as fast in training, and the share of the predicted saving that temporaries show.
SPEED, SAVED = 1.5, 0.75


def build(config: Config, subsample: bool) -> LanguageModel:
    dense = partial(SubsampledAttention, num_heads=config.heads)
    # Slots of their own, also where they are dense: so both models hold their parameters alike.
    later = partial(dense, subsample=subsample, ratio=config.ratio, mode=config.mode, sigma=config.sigma)
    layers = (dense,) * config.dense_layers + (later,) * (config.depth - config.dense_layers)
    dtype = jnp.bfloat16 if config.bfloat16 else None
    return LanguageModel(VOCABULARY, config.width, layers, remat=False, dtype=dtype)


def measure(run: Run[Config]) -> None:
    config, context = run.config, run.config.data.context
    text = config.data.corpus()
    windows = TextWindows(text.train, context, config.train.batch_size, config.seed, packed=config.data.packed)
    test = evaluation_windows(text.test, context, config.test_windows)
    run.require_same(bytes=len(windows.text), windows=len(test))
    dense, sampled = (build(config, subsample) for subsample in (False, True))
    ways, early = readers(config, dense, sampled), config.subsampled_steps()
    table, params = {}, {}
    optimizer = make_optimizer(config.train)  # one schedule for all steps, whatever layers see in them

    def trained(row: str, part: str, model: LanguageModel, seed: int, steps: int) -> None:
        """Train the part to so many steps, and read it."""

        def loss(params, batch, key):
            logits = model.apply(params, batch["inputs"], batch.get("segment_ids"), rngs={"subsample": key})
            return cross_entropy(logits, batch["targets"], bytes_per_token=1.0)

        init = lambda key: dense.init(jax.random.fold_in(key, seed), jnp.zeros((1, 1), jnp.int32))
        options: dict[str, Any] = {"optimizer": optimizer, "tokens_per_step": config.train.batch_size * context}
        train = replace(config.train, steps=steps)
        params[row] = run.fit(loss, init, windows.batch, part=part, train=train, **options).params
        table[row] = run.kept(row, lambda: readings(ways, params[row], test))
        run.record(steps, f"test/{row}", {"loss": table[row]["dense"] * float(np.log(2))})
        print(f"{row:<12}" + "  ".join(f"{name} {bits:.4f}" for name, bits in table[row].items()), flush=True)

    for seed in range(config.seed, config.seed + config.seeds):
        trained(f"dense-{seed}", f"dense-{seed}", dense, seed, config.train.steps)
        part = f"subsets-{seed}-{early}"
        trained(f"subsets-{seed}", part, sampled, seed, early)
        trained(f"tuned-{seed}", part, dense, seed, config.train.steps)  # the same training goes on
    run.plot()
    last = {row: final for row, final in params.items() if not row.startswith("subsets")}  # others have gone on
    verdict(run, table, cost(config), digest(last))


def readers(config: Config, dense: LanguageModel, sampled: LanguageModel) -> dict[str, TokenNats]:
    """Ways to read a model: by all sources, by one draw of subsets, by ensembles of them."""

    def predicted(model, params, inputs, key):
        return model.apply(params, inputs, rngs={"subsample": key})

    def averaged(size, params, inputs, key):
        return self_ensemble(lambda key: predicted(sampled, params, inputs, key), key, size)

    ways = {"dense": partial(predicted, dense), "one": partial(predicted, sampled)}
    ways |= {str(size): partial(averaged, size) for size in config.ensembles}
    return {way: TokenNats(logits, config.train.batch_size) for way, logits in ways.items()}


def readings(ways: dict[str, TokenNats], params, test: np.ndarray) -> dict[str, float]:
    """Bits per byte of the test windows, each way."""
    return {way: float(nats(params, with_begin(test), test).mean() / np.log(2)) for way, nats in ways.items()}


def cost(config: Config) -> dict[str, dict]:
    """Attention alone, drawing included, all scores in memory at once."""
    length, width = config.timing_length, config.width // config.heads

    def draw(key):
        dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
        return tuple(jax.random.normal(k, (4, length, config.heads, width), dtype) for k in jax.random.split(key, 3))

    def sampled(q, k, v):
        key = jax.random.key((1e6 * q[0, 0, 0, 0]).astype(jnp.int32))  # another one for every input
        sets = subsets(key, length, ratio=config.ratio, mode=config.mode, sigma=config.sigma)
        queries_too = config.mode in ("window", "local")
        return subsampled_attention(q, k, v, sets, queries_too=queries_too, impl="parallel")

    forms: dict[str, Callable] = {"dense": partial(softmax_attention, impl="parallel"), "subsets": sampled}
    rows = side_by_side(Case("attention", length, draw, forms), seed=config.seed, repeats=7, seconds=0.2)
    return {row.form: row._asdict() for row in rows}


def verdict(run: Run[Config], table, times, parameters_digest: str) -> None:
    config = run.config
    few, many = map(str, config.ensembles)
    kinds = ("dense", "subsets", "tuned")
    of = {kind: [row for part, row in table.items() if part.startswith(f"{kind}-")] for kind in kinds}
    mean = {kind: {way: float(np.mean([row[way] for row in rows])) for way in rows[0]} for kind, rows in of.items()}
    reference = mean["dense"]["dense"]
    length = config.timing_length
    saved = {
        "scores": num_scores(length, ratio=1) / num_scores(length, ratio=config.ratio, mode=config.mode),
        "training time": times["dense"]["training_ms"] / times["subsets"]["training_ms"],
        "forward time": times["dense"]["forward_ms"] / times["subsets"]["forward_ms"],
        "training MiB": times["dense"]["training_mib"] / times["subsets"]["training_mib"],
    }
    costs_one = {kind: mean[kind]["one"] - mean[kind]["dense"] for kind in kinds}
    parts = {
        "read densely at equal steps": mean["tuned"]["dense"] <= (1 + DENSE_MARGIN) * reference,
        f"ensemble of {many} at equal steps": mean["tuned"][many] <= (1 + ENSEMBLE_MARGIN) * reference,
        f"ensemble of {few} over one draw": all(mean[kind][few] < mean[kind]["one"] for kind in kinds),
        "dense steps lower the dense loss": mean["tuned"]["dense"] < mean["subsets"]["dense"],
        "one draw costs the densely trained more": costs_one["dense"] > costs_one["subsets"],
        "faster": saved["training time"] >= SPEED,
        "smaller": saved["training MiB"] >= SAVED * saved["scores"],
    }
    plot(run, mean, config.ensembles)
    run.finish(
        claim=f"training on 1/{config.ratio} of the sources loses nothing at equal steps, and its ensemble gains",
        measured={"dense": mean["tuned"]["dense"], many: mean["tuned"][many], "one draw": mean["tuned"]["one"]}
        | {f"saved, {name}": value for name, value in saved.items()},
        baseline={"dense": reference, "one draw": mean["dense"]["one"], many: mean["dense"][many]},
        threshold={"dense": DENSE_MARGIN, many: ENSEMBLE_MARGIN, "faster": SPEED, "smaller": SAVED * saved["scores"]},
        holds=parts,
        table=table,
        means=mean,
        times=times,
        parameters_digest=parameters_digest,
    )


def plot(run: Run, mean: dict[str, dict[str, float]], ensembles: tuple[int, ...]) -> None:
    """Bits per byte by the draws that are averaged; dashed: read densely."""
    with run.figure("ensembles", figsize=(6, 4)) as figure:
        axes = figure.subplots()
        names = {"dense": "trained densely", "subsets": "on subsets", "tuned": "on subsets, then densely"}
        for (kind, label), color in zip(names.items(), ("#444444", "#3b6fb6", "#d1602f"), strict=True):
            row = mean[kind]
            axes.plot([1, *ensembles], [row["one"], *(row[str(n)] for n in ensembles)], "o-", color=color, label=label)
            axes.axhline(row["dense"], color=color, linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel="draws averaged (dashed: all sources)", ylabel="test bits per byte")
        axes.legend(frameon=False)


if __name__ == "__main__":
    main("subsampled_attention", PRESETS, measure)
