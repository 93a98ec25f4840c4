"""Which mixers recall: multi-query associative recall against width, size of the state and size of the task.

Claim   After 600 steps on 8 pairs in 64 tokens, a short convolution and attention answer 0.95 of the queries; a second
        convolution that no input moves (long, Hyena), and attention in blocks of 16 or a window of 12 tokens, 0.35 at
        most; mixers whose state is written as the input says come between. Asked for more pairs than they trained on,
        these fall off in the order that the authors found at equal states: DeltaNet, Based, RWKV-7, Mamba-2. gpu: of 16
        pairs in 256 tokens attention answers 0.99 at widths 64 and 128, BaseConv half at most at 128, and Based of 16
        features 0.3 more than BaseConv at both; its other tasks and widths are reported.
Source  Zoology (arXiv 2312.04927), figure 2, and its repository's recall against memory: two layers without MLP. Every
        mixer stands second, after the same short convolution, BaseConv(3), which alone tells attention the order.
        Sequences are new at every step.
Expect  Attention and DeltaNet 1.00, RWKV-7 and Based 0.97, GLA 0.70, Mamba-2 0.53; BaseConv 0.12, which is chance,
        Hyena 0.06, the window 0.01, blocks 0.08, though they hold 0.64 of the answers, which 200 steps more would teach
        them. With up to 60 pairs attention stays at 1.00, and the means are DeltaNet 0.89, Based 0.56, RWKV-7 0.39, GLA
        0.19, Mamba-2 0.15, of states of 8 to 10 KiB; of half or twice these Based and RWKV-7 change places (--heads 4
        or 1). Five to nine minutes on 2 CPU cores. gpu, the paper's grid of every mixer with one batch size for all
        tasks, is not yet measured.
Run     python -m experiments.mqar [--preset cpu|gpu] [--mixers attention,based,hyena]
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import LanguageModel
from jaxseq.analysis import state_bytes
from jaxseq.fields import check_counts, chosen
from jaxseq.mixers import BaseConv
from jaxseq.models import ModelConfig, mixer_names
from jaxseq.models.named import slot_fields
from jaxseq.tasks import mqar
from jaxseq.train import (
    CheckpointConfig,
    MeshConfig,
    Run,
    TrainConfig,
    cross_entropy,
    digest,
    ensemble_loss,
    main,
    make_optimizer,
    mean_metrics,
    per_member,
    with_sown,
)

#: Tokens of a block, which sees the one before too, and of a window.
BLOCK, WINDOW = 16, 12
#: Settings of a mixer that stand beside it: the authors' blocks, of 16 to 31 tokens, and features of Based.
VARIANTS = {"blocks": "attention", "based16": "based"}
#: No input moves these: what is kept, and what is written, goes by weights that are parameters, whatever a channel is
#: then multiplied by or put through; or tokens see 12, or 16 to 31, of those before and no more.
FIXED = (
    *("baseconv", "hyena", "longconv", "h3", "s4", "s4d", "dss", "s5", "lru", "leakyrnn", "elm", "iclrnn"),
    *("blocks", "slidingwindowattention"),
)
#: Best first, as the authors measured them at equal states.
ORDER = ("deltanet", "based", "rwkv7", "mamba2")
#: Width, tokens and pairs of the small task, of which more is claimed than limits.
SMALL = (64, 64, 8)
#: Accuracies, the least and the most, that are asked of mixers at a width, tokens and pairs, and nowhere else.
LIMITS: dict[tuple[int, int, int], dict[str, tuple[float, float]]] = {
    SMALL: {"attention": (0.95, 1.0)} | dict.fromkeys(FIXED, (0.0, 0.35)),
    (64, 256, 16): {"attention": (0.99, 1.0)},
    (128, 256, 16): {"attention": (0.99, 1.0), "baseconv": (0.0, 0.5)},
}
#: Whether a query sees what tells a value: the token after it does too, by the short convolution in front.
SIGHT = {
    "blocks": lambda query, value: query // BLOCK - (value + 1) // BLOCK <= 1,
    "slidingwindowattention": lambda query, value: query - (value + 1) < WINDOW,
}
#: By how much Based of 16 features is ahead of BaseConv on the paper's grid, where it has limits.
LEAD = 0.3
#: What accuracy is drawn against, and the unit of it.
SIZES = {"width": 1, "state_bytes": 1024}
#: One for every ten mixers, which are as many colours.
MARKERS = "os^vDx"
#: Of 1,024 sequences with 8 queries; less is no order.
SLACK = 0.01


def slots(name: str, width: int, heads: int, length: int) -> tuple:
    """A short convolution and the mixer of this name, without positions of its own: the convolution tells.

    Nor has a mixer a second short convolution, but Hyena and those that are not published without: Mamba and Mamba-2,
    mLSTM, RG-LRU, Rodimus and attention along paths.

    States of matrices have about width²/heads numbers, as DeltaNet's and RWKV-7's, where mixers leave a choice; windows
    hold 12 tokens, which Longformer's heads see one, two and more apart, and blocks 16. Attention, whose cache is the
    same with any number of heads and of which the most is asked, learns sooner with twice as many.
    """
    half = max(1, width // (2 * heads))
    most = lambda least, count: max(f for f in range(least, width + 2) if f == least or count(f) <= width // heads)
    sizes: dict[str, dict[str, Any]] = {
        "abc": {"num_slots": half},
        "attention": {"num_heads": 2 * heads},
        "based": {"feature_width": most(1, lambda f: 1 + f + f * (f + 1) // 2)},
        "based16": {"feature_width": 16},
        "baseconv": {"kernel_size": None},
        "bigbird": {"block_size": BLOCK},
        "blocks": {"block_size": BLOCK, "look_back": 1},
        "gateddeltanet": {"expand_k": 1.0, "expand_v": 1.0},
        "gla": {"expand_k": 1.0},
        "gsa": {"num_slots": half},
        # Exact, it takes time T³; its polynomial affords heads of few channels.
        "kroneckerattention": {"degree": 2, "num_heads": max(1, width // 4)},
        "longformer": {"window": WINDOW, "dilation": tuple(range(1, heads + 1))},
        "mamba": {"state_size": half},
        "mamba2": {"state_size": half},
        "mlstm": {"expand": 1.0},
        "performer": {"num_features": max(1, width // heads)},
        "rebased": {"feature_width": most(2, lambda f: f * (f + 1) // 2)},
        "retnet": {"expand_v": 1.0, "rotary_base": 10_000.0},  # it has no form without
        "rodimus": {"key_width": half},
        "slidingwindowattention": {"window": WINDOW},
    }
    kind = VARIANTS.get(name, name)
    options = dict.fromkeys({"rotary_base"} & slot_fields(kind)) | sizes.get(name, {})
    second: Any = ModelConfig(mixers=kind, heads=heads, depth=1, conv_window=None).slots(max_length=length)[0]
    return partial(BaseConv, kernel_size=3), partial(second, **options)


@dataclass(frozen=True)
class Config:
    """Tasks, models and training; every combination of task, width and mixer is one part of the run."""

    seed: int = 0
    """Seed of sequences and weights."""
    mixers: str = "attention,baseconv,hyena,blocks,slidingwindowattention,deltanet,based,rwkv7,mamba2,gla"
    """The second layers by name, with commas between them; where none is given, all of the library and variants."""
    vocab_size: int = 256
    """Tokens: half of them keys, half values."""
    tasks: tuple[tuple[int, int], ...] = ((64, 8),)
    """Tokens of a sequence and pairs in it, for each task."""
    beyond: tuple[tuple[int, int], ...] = ((128, 16), (128, 32), (252, 60))
    """Tasks that models are tested on besides their own, as far as they are longer."""
    widths: tuple[int, ...] = (64,)
    """Widths of the models. On CPU 32 as well would take half as long again, 128 three times as long."""
    heads: int = 2
    """Heads of the mixers that have them; of attention twice as many. States of matrices shrink as they grow."""
    learning_rates: tuple[float, ...] = (1e-2,)
    """Peak learning rates, trained side by side; the best on validation sequences is tested."""
    seeds: int = 1
    """Models of each learning rate, side by side too; their mean counts."""
    test_examples: int = 1024
    """Sequences to test on, and as many others to validate on."""
    train: TrainConfig = TrainConfig(
        steps=600, batch_size=64, warmup_steps=0, final_learning_rate_ratio=0.0, betas=(0.9, 0.999)
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "vocab_size", "heads", "seeds", "test_examples")
        for name in ("tasks", "widths", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} is empty; give one at least.")
        self.names()

    def names(self) -> list[str]:
        return chosen("mixers", self.mixers, (*mixer_names(), *VARIANTS))


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        mixers="",
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


def language_model(config: Config, name: str, width: int, length: int) -> LanguageModel:
    """Two layers, of which the second is the mixer of this name, for so many tokens at most."""
    mixers = slots(name, width, config.heads, length)
    return LanguageModel(config.vocab_size, width, mixers, mlp=None, tied=True, remat=False)


def measure(run: Run[Config]) -> None:
    config, table = run.config, {}
    for task in (*config.tasks, *config.beyond):  # refuse an impossible one before training
        jax.eval_shape(partial(_drawn, config.vocab_size, 1, *task), jax.random.key(0))
    print(
        f"{'mixer':<24}{'width':>6}{'length':>7}{'pairs':>6}{'chance':>8}{'accuracy':>9}{'rate':>9}{'state, bytes':>13}"
    )
    for length, pairs in config.tasks:
        for width in config.widths:
            for name in config.names():
                part = f"{name}-{width}-{length}-{pairs}"
                make = partial(figures, run, part, name, width, length, pairs)
                row = table[part] = run.kept(part, make)
                print(
                    f"{name:<24}{width:>6}{length:>7}{pairs:>6}{1 / pairs:>8.3f}{row['accuracy']:>9.3f}"
                    f"{row['learning_rate']:>9.2g}{row['state_bytes']:>13,}   "
                    + "  ".join(f"{of} {x:.3f}" for of, x in row["beyond"].items()),
                    flush=True,
                )
    draw(run, list(table.values()))
    verdict(run, table)


def keys(config: Config):
    """For sequences to train, to validate and to test on."""
    return jax.random.split(jax.random.key(config.seed), 3)


@partial(jax.jit, static_argnums=range(4))
def _drawn(vocab_size: int, number: int, length: int, pairs: int, key):
    sizes = dict(num_examples=number, length=length, num_pairs=pairs, vocab_size=vocab_size)
    return mqar(key, **sizes, random_non_queries=False)


def sequences(config: Config, key, number: int, length: int, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """So many of them, and their labels."""
    inputs, labels = _drawn(config.vocab_size, number, length, pairs, key)
    return np.asarray(inputs), np.asarray(labels)


def answered(model: LanguageModel, params, batch, key):
    """Loss and metrics of what is asked, `fit`'s loss of a model."""
    logits, sown = with_sown(model, params, batch["inputs"])
    nats, metrics = cross_entropy(logits, batch["labels"])
    return nats + sown, metrics


def figures(run: Run[Config], part: str, name: str, width: int, length: int, pairs: int) -> dict[str, Any]:
    """Train one mixer at all learning rates and seeds, and test it at the learning rate that validates best."""
    config = run.config
    model = language_model(config, name, width, length)
    shapes = lambda length: jax.eval_shape(
        language_model(config, name, width, length).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    # Filters with a parameter a tap cannot read longer sequences.
    beyond = [task for task in config.beyond if task[0] > length and shapes(task[0]) == shapes(length)]
    train, validation, test = keys(config)
    rates = [rate for rate in config.learning_rates for _ in range(config.seeds)]

    def batches(step):
        key, number = jax.random.fold_in(train, step), config.train.batch_size
        return dict(zip(("inputs", "labels"), sequences(config, key, number, length, pairs), strict=True))

    loss = partial(answered, model)

    def init(key):
        keys = jnp.tile(jax.random.split(key, config.seeds), len(config.learning_rates))
        return jax.vmap(lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32)))(keys)

    optimizer = per_member([make_optimizer(replace(config.train, learning_rate=rate)) for rate in rates])
    trained = run.fit(ensemble_loss(loss), init, batches, optimizer=optimizer, part=part)

    def mean(key, length=length, pairs=pairs):
        """Loss and accuracy of every learning rate, by a model for this length, in batches of at most 2¹⁶ tokens."""
        of_each = jax.vmap(partial(answered, language_model(config, name, width, length)), (0, None, None))
        number, size = config.test_examples, max(1, 2**16 // length)
        inputs, labels = sequences(config, key, number, length, pairs)
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
        "state_bytes": state_bytes(model, length),
        "seconds": trained.seconds,
        "digest": digest(trained.params),
    }


def verdict(run: Run[Config], table: dict[str, dict[str, Any]]) -> None:
    """Of the tasks and widths that have limits, and of the mixers that are there."""
    parts: dict[str, bool] = {}
    measured, baseline, threshold = {}, {}, {}
    far: dict[str, float] = {}
    why: dict[str, str] = {}
    for setting, limits in LIMITS.items():
        width, length, pairs = setting
        rows = {row["mixer"]: row for row in table.values() if (row["width"], row["length"], row["pairs"]) == setting}
        if not rows:
            continue
        where = f"width {width}, {length} tokens, {pairs} pairs"
        accuracy = {name: row["accuracy"] for name, row in rows.items()}
        fixed = {name: x for name, x in accuracy.items() if name in FIXED}
        measured[where] = {name: x for name, x in accuracy.items() if name not in FIXED}
        baseline[where] = fixed | {"chance": 1 / pairs}
        threshold[where] = {name: limits[name] for name in limits if name in rows}
        claims = {name: low <= accuracy[name] <= high for name, (low, high) in threshold[where].items()}
        seen = SIGHT.keys() & claims.keys()
        sight = in_sight(run.config, length, pairs) if seen else {}
        reasons = {name: f"{accuracy[name]:.3f}, of {sight[name]:.3f} that it sees" for name in seen}
        if setting == SMALL:
            # Without more pairs all that recall are alike; the order is that of the mean over all that were tested.
            beyond = {name: list(rows[name]["beyond"].values()) for name in ORDER if name in rows}
            far = {name: float(np.mean(accuracies)) for name, accuracies in beyond.items() if accuracies}
            claims |= compared(measured[where], fixed, list(far.values()))
            sized = (f"{name} {x:.3f} with {rows[name]['state_bytes'] / 1024:.1f} KiB" for name, x in far.items())
            reasons["the rest is between"] = ", ".join(f"{name} {x:.3f}" for name, x in accuracy.items())
            reasons["in the order of the authors"] = ", ".join(sized)
        elif {"based16", "baseconv"} <= rows.keys():
            claims["based16 leads baseconv"] = accuracy["based16"] >= accuracy["baseconv"] + LEAD
        parts |= {f"{claim} ({where})": true for claim, true in claims.items()}
        why |= {f"{claim} ({where})": reasons[claim] for claim in claims if claim in reasons}
    run.finish(
        claim="; ".join(parts) or "nothing is asked of these tasks and widths",
        measured=measured,
        baseline=baseline,
        threshold=threshold | {"lead": LEAD, "slack": SLACK},
        holds=parts,
        why=why,
        more_pairs=far,
        table=table,
    )


def in_sight(config: Config, length: int, pairs: int) -> dict[str, float]:
    """The share of the values asked for that windows and blocks leave in sight, of the sequences to test on."""
    inputs, labels = sequences(config, keys(config)[2], config.test_examples, length, pairs)
    rows, queries = np.nonzero(labels >= 0)
    values = (inputs[rows] == labels[rows, queries][:, None]).argmax(axis=1)
    return {name: float(sees(queries, values).mean()) for name, sees in SIGHT.items()}


def compared(others: dict[str, float], fixed: dict[str, float], far: list[float]) -> dict[str, bool]:
    """Whether what an input moves is between attention and the fixed ones, and falls off in the authors' order."""
    moved, claims = [x for name, x in others.items() if name != "attention"], {}
    if moved and fixed and "attention" in others:
        above, below = max(fixed.values()), others["attention"] + SLACK
        claims["the rest is between"] = all(above < x <= below for x in moved)
    if len(far) > 1:
        claims["in the order of the authors"] = all(a >= b - SLACK for a, b in pairwise(far))
    return claims


def draw(run: Run, rows: list[dict[str, Any]]) -> None:
    """Accuracy against width, size of the state, and at the greatest width pairs asked for; a row of panels a task."""
    tasks, names = sorted({(r["length"], r["pairs"]) for r in rows}), list(dict.fromkeys(r["mixer"] for r in rows))
    with run.figure("recall", figsize=(12, 3.2 * len(tasks))) as figure:
        panels = figure.subplots(len(tasks), 3, sharey=True, squeeze=False)
        for (length, pairs), axes in zip(tasks, panels, strict=True):
            for i, name in enumerate(names):
                of = [r for r in rows if (r["mixer"], r["length"], r["pairs"]) == (name, length, pairs)]
                style = dict(marker=MARKERS[i // 10 % len(MARKERS)], markersize=4, linewidth=1, color=f"C{i % 10}")
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
            for axis in axes[::2]:
                axis.set_xscale("log", base=2)
            axes[0].set(ylabel=f"accuracy, {pairs} pairs in {length} tokens")
        options = dict(bbox_to_anchor=(1, 1), frameon=False, fontsize="x-small", ncols=-(-len(names) // 20))
        panels[0][2].legend(loc="upper left", **options)


if __name__ == "__main__":
    main("mqar", PRESETS, measure)
