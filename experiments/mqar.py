"""Which mixers recall: multi-query associative recall against width, size of the state and size of the task.

Claim   After 800 steps on 8 pairs in 64 tokens, a short convolution and attention answer 0.95 of the queries; a second
        convolution that no input moves (long, Hyena), and attention in blocks of 16 or a window of 12 tokens, 0.35 at
        most; mixers whose state is written as the input says come between. Asked for more pairs than they trained on,
        these fall off in the order that the authors found at equal states: DeltaNet, Based, RWKV-7, Mamba-2.
Source  Zoology (arXiv 2312.04927), figure 2, and its repository's recall against memory: two layers without MLP. Every
        mixer stands second, after the same short convolution, BaseConv(3), which alone tells attention the order.
        Sequences are new at every step.
Expect  Attention, DeltaNet, RWKV-7 1.00, GLA 0.98, Based 0.94, Mamba-2 0.81; BaseConv 0.12 and Hyena 0.13, which is
        chance; the window 0.03: it holds 0.21 of the answers; blocks, which hold 0.59, 0.58: the claim does not hold.
        With up to 60 pairs attention stays at 1.00, and the means are DeltaNet 0.67, GLA 0.54, RWKV-7 0.53, Based 0.47,
        Mamba-2 0.31: the authors' order but for Based, whose features are few at so small a state. Twenty minutes on 2
        busy CPU cores. gpu, the paper's grid with one batch size for all tasks, is not yet measured.
Run     python -m experiments.mqar [--preset cpu|gpu] [--mixers attention,based,hyena]
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseq import Attention, LanguageModel
from jaxseq.analysis import state_bytes
from jaxseq.fields import check_counts
from jaxseq.mixers import BaseConv
from jaxseq.models import ModelConfig
from jaxseq.tasks import mqar
from jaxseq.train import (
    CheckpointConfig,
    MeshConfig,
    Run,
    TrainConfig,
    cross_entropy,
    digest,
    main,
    make_optimizer,
    mean_metrics,
)

#: What the claim asks of attention, and of mixers that no input moves or that do not see far enough: 16 to 31 tokens in
#: blocks, as the authors', where 0.59 of the values of 8 pairs in 64 tokens are in sight, or 12, where 0.21 are.
LEAST, MOST = 0.95, 0.35
FIXED = ("baseconv", "hyena", "longconv", "h3", "s4", "s4d", "dss", "s5", "lru", "blocks", "window")
#: Best first, as the authors measured them at equal states.
ORDER = ("deltanet", "based", "rwkv7", "mamba2")
#: What accuracy is drawn against, and the unit of it.
SIZES = {"width": 1, "state_bytes": 1024}
#: Of 1,024 sequences with 8 queries; less is no order.
SLACK = 0.01


def slots(name: str, width: int, heads: int, length: int) -> tuple:
    """A short convolution and the mixer of this name. Attention has no positions of its own: the convolution tells.

    States of matrices have about width²/heads numbers, as DeltaNet's and RWKV-7's, where mixers leave a choice.
    """
    attention = partial(Attention, num_heads=heads, rotary_base=None)
    long = partial(BaseConv, kernel_size=None, max_length=length)
    blocks, window = partial(attention, block_size=16, look_back=1), partial(attention, window=12)
    named = {"attention": attention, "blocks": blocks, "window": window, "baseconv": long}
    features = max(f for f in range(1, width + 1) if f == 1 or 1 + f + f * (f + 1) // 2 <= width // heads)
    sizes: dict[str, dict[str, Any]] = {
        "based": {"feature_width": features},
        "gla": {"expand_k": 1.0},
        "mamba2": {"state_size": max(1, width // (2 * heads))},
    }
    second: Any = named.get(name) or ModelConfig(mixers=name, heads=heads, depth=1).slots(max_length=length)[0]
    return partial(BaseConv, kernel_size=3), partial(second, **sizes.get(name, {}))


@dataclass(frozen=True)
class Config:
    """Tasks, models and training; every combination of task, width and mixer is one part of the run."""

    seed: int = 0
    """Seed of sequences and weights."""
    mixers: str = "attention,baseconv,hyena,blocks,window,deltanet,based,rwkv7,mamba2,gla"
    """The second layers by name, with commas between them: of `jaxseq.mixers`, or attention in blocks or a window."""
    vocab_size: int = 256
    """Tokens: half of them keys, half values."""
    tasks: tuple[tuple[int, int], ...] = ((64, 8),)
    """Tokens of a sequence and pairs in it, for each task."""
    beyond: tuple[tuple[int, int], ...] = ((128, 16), (128, 32), (252, 60))
    """Tasks that models are tested on besides their own, as far as they are longer."""
    widths: tuple[int, ...] = (64,)
    """Widths of the models."""
    heads: int = 4
    """Heads of the mixers that have them."""
    learning_rates: tuple[float, ...] = (1e-2,)
    """Peak learning rates, trained side by side; the best on validation sequences is tested."""
    seeds: int = 1
    """Models of each learning rate, side by side too; their mean counts."""
    test_examples: int = 1024
    """Sequences to test on, and as many others to validate on."""
    train: TrainConfig = TrainConfig(
        steps=800, batch_size=64, warmup_steps=0, final_learning_rate_ratio=0.0, betas=(0.9, 0.999)
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "vocab_size", "heads", "seeds", "test_examples")
        for name in ("tasks", "widths", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is empty; give one at least.")
        for name in self.names():
            slots(name, min(self.widths), self.heads, 1)

    def names(self) -> list[str]:
        return [name.strip() for name in self.mixers.split(",")]


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        mixers=Config.mixers + ",gateddeltanet,kda,mamba,rwkv6,hgrn2,retnet,linearattention,mlstm,rglru,h3,s4d",
        vocab_size=8192,
        tasks=((64, 4), (128, 8), (256, 16), (512, 64)),
        beyond=((1024, 128), (1024, 256)),
        widths=(64, 128, 256, 512),
        learning_rates=(1e-4, 10**-3.333, 10**-2.667, 1e-2),
        test_examples=3000,
        train=replace(Config.train, steps=12_500, batch_size=256, log_every=100),
        checkpoint=CheckpointConfig(every=2000),
    ),
    # Seconds a mixer: to see that everything works.
    "debug": Config(
        mixers="attention,hyena,gla",
        vocab_size=32,
        tasks=((16, 2), (16, 4)),
        beyond=((24, 6),),
        widths=(8,),
        learning_rates=(1e-3, 1e-2),
        seeds=2,
        test_examples=8,
        train=replace(Config.train, steps=3, batch_size=4, log_every=1),
    ),
}


def side_by_side(optimizers: list[optax.GradientTransformation]) -> optax.GradientTransformation:
    """An optimizer of models that lie one after the other along the first axis of every parameter, each its own."""
    of = lambda i, tree: None if tree is None else jax.tree.map(lambda x: x[i], tree)

    def update(grads, states, params=None):
        each = [o.update(of(i, grads), states[i], of(i, params)) for i, o in enumerate(optimizers)]
        updates, states = zip(*each, strict=True)
        return jax.tree.map(lambda *x: jnp.stack(x), *updates), states

    return optax.GradientTransformation(
        lambda params: tuple(o.init(of(i, params)) for i, o in enumerate(optimizers)), update
    )


def measure(run: Run[Config]) -> None:
    config, table = run.config, {}
    print(
        f"{'mixer':<18}{'width':>6}{'length':>7}{'pairs':>6}{'chance':>8}{'accuracy':>9}{'rate':>9}{'state, bytes':>13}"
    )
    for length, pairs in config.tasks:
        for width in config.widths:
            for name in config.names():
                part = f"{name}-{width}-{length}-{pairs}"
                make = partial(figures, run, part, name, width, length, pairs)
                row = table[part] = run.kept(part, make)
                print(
                    f"{name:<18}{width:>6}{length:>7}{pairs:>6}{1 / pairs:>8.3f}{row['accuracy']:>9.3f}"
                    f"{row['learning_rate']:>9.2g}{row['state_bytes']:>13,}   "
                    + "  ".join(f"{of} {x:.3f}" for of, x in row["beyond"].items()),
                    flush=True,
                )
    draw(run, list(table.values()))
    verdict(run, table)


def figures(run: Run[Config], part: str, name: str, width: int, length: int, pairs: int) -> dict[str, Any]:
    """Train one mixer at all learning rates and seeds, and test it at the learning rate that validates best."""
    config = run.config
    beyond = [task for task in config.beyond if task[0] > length]
    longest = max([length, *(longer for longer, _ in beyond)])
    mixers = slots(name, width, config.heads, longest)
    model = LanguageModel(config.vocab_size, width, mixers, mlp=None, tied=True, remat=False)
    options: dict[str, Any] = dict(vocab_size=config.vocab_size, random_non_queries=False)
    sequences = jax.jit(partial(mqar, **options), static_argnames=("num_examples", "length", "num_pairs"))
    train, validation, test = jax.random.split(jax.random.key(config.seed), 3)
    rates = [rate for rate in config.learning_rates for _ in range(config.seeds)]

    def batches(step):
        key, number = jax.random.fold_in(train, step), config.train.batch_size
        drawn = sequences(key, num_examples=number, length=length, num_pairs=pairs)
        return dict(zip(("inputs", "labels"), map(np.asarray, drawn), strict=True))

    def of_each(params, batch, key):
        """Losses of all models, whose sum has the gradient of each, and their metrics."""
        of_one = lambda params: cross_entropy(model.apply(params, batch["inputs"]), batch["labels"])
        losses, metrics = jax.vmap(of_one)(params)
        return losses.sum(), metrics

    def loss(params, batch, key):
        total, metrics = of_each(params, batch, key)
        return total, {"loss": metrics["loss"].min(), "accuracy": metrics["accuracy"].max()}

    def init(key):
        keys = jnp.tile(jax.random.split(key, config.seeds), len(config.learning_rates))
        return jax.vmap(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)))(keys)

    optimizer = side_by_side([make_optimizer(replace(config.train, learning_rate=rate)) for rate in rates])
    trained = run.fit(loss, init, batches, optimizer=optimizer, part=part)

    def mean(key, length=length, pairs=pairs):
        """Loss and accuracy of every learning rate, in batches of at most 2¹⁶ tokens."""
        number, size = config.test_examples, max(1, 2**16 // length)
        inputs, labels = map(np.asarray, sequences(key, num_examples=number, length=length, num_pairs=pairs))
        read = lambda rows: {"inputs": inputs[rows], "labels": labels[rows]}
        metrics = mean_metrics(of_each, trained.params, read, number, size=size)
        return {name: x.reshape(-1, config.seeds).mean(axis=1) for name, x in metrics.items()}

    best, tested = int(mean(validation)["accuracy"].argmax()), mean(test)
    run.record(config.train.steps, f"test/{part}", {metric: float(x[best]) for metric, x in tested.items()})
    return {
        "mixer": name,
        "width": width,
        "length": length,
        "pairs": pairs,
        "accuracy": float(tested["accuracy"][best]),
        "loss": float(tested["loss"][best]),
        "beyond": {f"{n}-{d}": float(mean(test, n, d)["accuracy"][best]) for n, d in beyond},
        "accuracies": dict(zip(map(str, config.learning_rates), tested["accuracy"].tolist(), strict=True)),
        "learning_rate": config.learning_rates[best],
        "state_bytes": state_bytes(model, longest),
        "seconds": trained.seconds,
        "digest": digest(trained.params),
    }


def verdict(run: Run[Config], table: dict[str, dict[str, Any]]) -> None:
    """Of the first task and width: what the claim asks of the mixers that are there."""
    config = run.config
    (length, pairs), width = config.tasks[0], config.widths[0]
    rows = {name: table[f"{name}-{width}-{length}-{pairs}"] for name in config.names()}
    accuracy = {name: row["accuracy"] for name, row in rows.items()}
    fixed = {name: accuracy[name] for name in FIXED if name in accuracy}
    moved = {name: x for name, x in accuracy.items() if name not in (*FIXED, "attention")}
    above, below = max(fixed.values(), default=0.0), accuracy.get("attention", 0.0)
    # Without more pairs all that recall are alike; the order is that of the mean over all sizes that were tested.
    far = {
        name: float(np.mean(list(rows[name]["beyond"].values())))
        for name in ORDER
        if name in rows and rows[name]["beyond"]
    }
    parts = {
        "attention recalls": below >= LEAST,
        "what no input moves does not": bool(fixed) and above <= MOST,
        "the rest is between": bool(moved) and all(above < x <= below + SLACK for x in moved.values()),
        "in the order of the authors": len(far) > 1 and all(a >= b - SLACK for a, b in pairwise(far.values())),
    }
    run.finish(
        claim="; ".join(parts),
        measured={"attention": below} | moved,
        baseline=fixed | {"chance": 1 / pairs},
        threshold={"attention, at least": LEAST, "fixed, at most": MOST, "slack": SLACK},
        holds=all(parts.values()),
        parts=parts,
        more_pairs=far,
        table=table,
    )


def draw(run: Run, rows: list[dict[str, Any]]) -> None:
    """Accuracy against width, size of the state, and at the greatest width pairs asked for; a row of panels a task."""
    tasks, names = sorted({(r["length"], r["pairs"]) for r in rows}), list(dict.fromkeys(r["mixer"] for r in rows))
    with run.figure("recall", figsize=(12, 3.2 * len(tasks))) as figure:
        panels = figure.subplots(len(tasks), 3, sharey=True, squeeze=False)
        for (length, pairs), axes in zip(tasks, panels, strict=True):
            for i, name in enumerate(names):
                of = [r for r in rows if (r["mixer"], r["length"], r["pairs"]) == (name, length, pairs)]
                style = dict(
                    marker="o", markersize=4, linewidth=1, color=f"C{i % 10}", linestyle=("-", ":")[i // 10 % 2]
                )
                widest = max(of, key=lambda row: row["width"])
                curves = [sorted((r[key] / scale, r["accuracy"]) for r in of) for key, scale in SIZES.items()]
                curves += [
                    [(pairs, widest["accuracy"])] + [(int(n.split("-")[1]), x) for n, x in widest["beyond"].items()]
                ]
                for axis, points in zip(axes, curves, strict=True):
                    axis.plot(*zip(*points, strict=True), label=name, **style)
            for axis, label in zip(
                axes, ("width", "state of a sequence, KiB", "pairs, in longer sequences"), strict=True
            ):
                axis.set(xscale="log", xlabel=label, ylim=(-0.03, 1.03))
            for axis in axes[:2]:
                axis.axhline(1 / pairs, color="0.6", linewidth=0.8, linestyle="--")
            axes[2].set_xscale("log", base=2)
            axes[0].set(ylabel=f"accuracy, {pairs} pairs in {length} tokens")
        panels[0][2].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="x-small")


if __name__ == "__main__":
    main("mqar", PRESETS, measure)
