"""Which faster attention for which length: time, memory and quality of efficient attention and of recurrent mixers.

Claim   Time and temporary memory of the linear ones grow with the length at most as T^1.15, forward and in training,
        dense attention's time as T^1.5 or faster; it recalls 0.95. As in the survey's conclusion, sparse attention
        predicts better than attention by kernels, kernels are the fastest, and a low rank is the lightest.
        All are given sinusoids, so that none is blind to order. Subsampled attention is timed as it trains, on random
        subsets of `budget` tokens, and read densely.
Source  A practical survey on faster and lighter transformers (arXiv 2103.14636), and its closing comparison from the
        Long Range Arena. All mixers see the whole sequence: recurrent ones read it both ways.
Expect  Of the cpu preset: exponents of the linear ones 0.78 to 1.05 forward, 0.83 to 1.10 in training, attention's 2.0
        (nothing beside). Bits of a hidden byte: windows 3.576, Performer 3.626, attention 3.614, Mamba2 2.760; recall
        1.0 of attention, BigBird and Reformer, 0.53 of windows. Low rank is the fastest, sparse the lightest: the claim
        holds in part. Not run whole since recall takes 400 steps; 42 minutes before, on 2 busy CPU cores.
Run     python -m experiments.efficient_transformers [--preset cpu|gpu|debug] [--mixers attention,bigbird,performer]
        The text is the Python standard library unless --data.path is given.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxseq.analysis import Case, TokenNats, exponent, side_by_side
from jaxseq.data import VOCABULARY, TextConfig, TextWindows, evaluation_windows, masked
from jaxseq.fields import check_counts, chosen
from jaxseq.layers import Bidirectional
from jaxseq.layers.self_attention import SelfAttention
from jaxseq.mixers import (
    GLA,
    RGLRU,
    BaseConv,
    BigBird,
    KroneckerAttention,
    LinearAttention,
    Linformer,
    Longformer,
    Mamba2,
    Performer,
    Reformer,
    SlidingWindowAttention,
    SubsampledAttention,
    Synthesizer,
)  # fmt: skip
from jaxseq.models import Tagger
from jaxseq.tasks import drawn_anew, mqar
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main


@dataclass(frozen=True)
class RecallConfig:
    """The long-range task: values of keys that stand anywhere before."""

    length: int = 64
    """Tokens of a sequence."""
    pairs: int = 4
    """Pairs of a key and a value."""
    vocabulary: int = 128
    """Keys and values, and the filler."""
    test_sequences: int = 400
    """Sequences that are scored."""


@dataclass(frozen=True)
class Config:
    """Mixers, what they are timed on, and what they learn."""

    seed: int = 0
    """Seed of weights and data."""
    mixers: str = ""
    """Mixers by name, with commas between them; all where none is given."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Lengths at which a layer is timed."""
    repeats: int = 5
    """Rounds of the timing, each of which calls all mixers."""
    seconds: float = 0.1
    """Time that a mixer has in a round."""
    width: int = 64
    """Width of the model."""
    heads: int = 4
    """Heads of a mixer."""
    depth: int = 1
    """Pairs of layers: a short convolution, and the mixer."""
    budget: int = 64
    """Keys that a query sees of a window, of blocks or of buckets; rows of a low rank, and features."""
    hidden: float = 0.15
    """Share of the bytes that are hidden, and predicted from all others."""
    test_windows: int = 64
    """Windows of the test files that are scored, evenly spread."""
    most_mib: float = 8192.0
    """Mixers that want more temporary memory at a length are not timed there."""
    bfloat16: bool = False
    """Compute in bfloat16."""
    recall: RecallConfig = RecallConfig()
    recall_steps: int = 400
    """Steps of the long-range task, on as many tokens as a step on text."""
    data: TextConfig = TextConfig(context=512)
    train: TrainConfig = TrainConfig(
        steps=100, batch_size=8, optimizer="muon", learning_rate=1e-2, warmup_steps=10, log_every=10
    )
    checkpoint: CheckpointConfig = CheckpointConfig(every=0)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "repeats", "width", "heads", "depth", "test_windows", "recall_steps")
        if self.budget < 8 or self.budget % 8:
            raise ValueError(f"budget={self.budget} must be a multiple of 8: blocks and buckets are an eighth of it.")
        if not 0 < self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} must be a share of the bytes, above 0 and below 1.")
        if self.data.packed:
            raise ValueError("data.packed=True: mixers of a low rank do not keep documents apart.")
        self.names()

    def names(self) -> list[str]:
        return chosen("mixers", self.mixers, KINDS)


def both_ways(mixer: Callable, **fields) -> Callable:
    return partial(Bidirectional, mixer=partial(mixer, **fields))


def subsampled(config: Config, **fields) -> Callable:
    return both_ways(SubsampledAttention, num_heads=config.heads, **fields)


#: Family and slot of a mixer, for a config and a length.
KINDS: dict[str, tuple[str, Callable[[Config, int], Callable]]] = {
    "attention": ("dense", lambda c, n: partial(SelfAttention, num_heads=c.heads)),
    "longformer": ("sparse", lambda c, n: partial(Longformer, num_heads=c.heads, window=c.budget // 2, causal=False)),
    "bigbird": ("sparse", lambda c, n: partial(BigBird, num_heads=c.heads, block_size=c.budget // 8, causal=False)),
    "windows": ("sparse", lambda c, n: both_ways(SlidingWindowAttention, num_heads=c.heads, window=c.budget // 2)),
    "reformer": ("hashed", lambda c, n: partial(Reformer, num_heads=c.heads, bucket_size=c.budget // 8)),
    "linformer": ("low rank", lambda c, n: partial(Linformer, num_heads=c.heads, rank=c.budget, max_length=n)),
    "synthesizer": ("learned", lambda c, n: partial(Synthesizer, num_heads=c.heads, kind="factorised", max_length=n)),
    "performer": ("kernel", lambda c, n: partial(Performer, num_heads=c.heads, num_features=c.budget, causal=False)),
    "linear attention": ("kernel", lambda c, n: both_ways(LinearAttention, num_heads=c.heads)),
    "subsampled": ("subsets", lambda c, n: subsampled(c, subsample=True, ratio=math.gcd(n, max(1, n // c.budget)))),
    "kronecker": ("triples", lambda c, n: partial(KroneckerAttention, num_heads=c.width // 8, degree=2, causal=False)),
    "gla": ("recurrent", lambda c, n: both_ways(GLA, num_heads=c.heads)),
    "mamba2": ("recurrent", lambda c, n: both_ways(Mamba2, num_heads=2 * c.heads, state_size=c.budget)),
    "rglru": ("recurrent", lambda c, n: both_ways(RGLRU)),
}
#: Slots that read what others of the same parameters have learned.
READERS: dict[str, Callable[[Config, int], Callable]] = {"subsampled": lambda c, n: subsampled(c)}
COLORS = {
    "dense": "black", "sparse": "#d1602f", "hashed": "#a0558c", "low rank": "#3f9b5f", "learned": "#999999",
    "kernel": "#3b6fb6", "triples": "#c9a227", "recurrent": "#6bb3c9",
    "subsets": "#7d5a3c",
}  # fmt: skip
#: Those whose time is no more than T; hashing sorts.
LINEAR = [name for name, (family, _) in KINDS.items() if family not in ("dense", "learned", "hashed")]
#: What the survey compares.
SURVEY = [name for name, (family, _) in KINDS.items() if family in ("sparse", "hashed", "low rank", "kernel")]
MOST, LEAST = 1.15, 1.5
#: What dense attention has to recall, so that the task tells mixers apart.
RECALLED = 0.95
FIGURES = ("forward_ms", "training_ms", "forward_mib", "training_mib")

PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        lengths=(1024, 4096, 16384, 65536), width=512, heads=8, depth=3, budget=256, test_windows=256,
        bfloat16=True, most_mib=65536.0,
        recall=RecallConfig(length=1024, pairs=32, vocabulary=8192), recall_steps=4000, data=TextConfig(context=4096),
        train=TrainConfig(steps=4000, batch_size=16, optimizer="muon", learning_rate=2e-3, warmup_steps=200),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        mixers="attention,bigbird,linformer,performer,gla", lengths=(16, 32), repeats=1, seconds=0.0, width=16,
        heads=2, budget=8, test_windows=8, recall=RecallConfig(32, 2, 64, 8), recall_steps=2,
        data=TextConfig(context=32), train=TrainConfig(steps=2, batch_size=4, log_every=1),
    ),
}  # fmt: skip


def build(config: Config, name: str, length: int, vocabulary: int, *, training: bool = True) -> Tagger:
    """The model that learns from `length` tokens and their positions, or reads them when it has; the convolution joins
    a token with the two before."""
    slot = KINDS[name][1] if training else READERS.get(name, KINDS[name][1])
    layers = (partial(BaseConv, kernel_size=3), slot(config, length)) * config.depth
    dtype = jnp.bfloat16 if config.bfloat16 else None
    return Tagger(vocabulary, vocabulary, config.width, layers, positions=True, mlp=None, dtype=dtype)


def measure(run: Run[Config]) -> None:
    config = run.config
    times = timed(run)
    text, recall = text_task(config), recall_task(config)
    run.require_same(bytes=text["bytes"])
    tokens = config.train.batch_size * config.data.context
    other = replace(config.train, steps=config.recall_steps, batch_size=max(1, tokens // config.recall.length))
    both = lambda name: quality(run, name, "text", text, config.train) | quality(run, name, "recall", recall, other)
    table: dict[str, dict[str, Any]] = {}
    for name in config.names():
        table[name] = run.kept(name, partial(both, name)) | growth(times, name)
        print(f"{name:<18}{table[name]['text bits']:>8.3f} bits{table[name]['recall']:>8.3f} recalled", flush=True)
    run.plot()
    show(table)
    plot(run, table, times)
    verdict(run, table, times)


def timed(run: Run[Config]) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of one layer by length and mixer, all mixers in turn."""
    config = run.config
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32

    def at(length: int) -> dict[str, dict[str, float]]:
        draw = lambda key: (jax.random.normal(key, (1, length, config.width), dtype),)
        build: Callable = lambda name: KINDS[name][1](config, length)(config.width, dtype=dtype)
        modules = {name: build(name) for name in config.names()}
        key = jax.random.key(config.seed)
        own = {name: (jax.jit(module.init)(key, *draw(key)),) for name, module in modules.items()}
        forms = {name: partial(module.apply, rngs={"subsample": key}) for name, module in modules.items()}
        case = Case("mixer", length, draw, forms, own)
        rows = side_by_side(
            case, seed=config.seed, repeats=config.repeats, seconds=config.seconds, most_mib=config.most_mib
        )
        return {row.form: {figure: getattr(row, figure) for figure in FIGURES} for row in rows}

    times = {str(length): run.kept(f"{length} tokens", partial(at, length)) for length in config.lengths}
    times = jax.tree.map(lambda x: float("nan") if x is None else x, times, is_leaf=lambda x: x is None)  # not timed
    for length, rows in times.items():
        for name, row in rows.items():
            print(f"{length:>7} {name:<18}" + "".join(f"{row[figure]:>10.2f}" for figure in FIGURES), flush=True)
    return times


def growth(times, name: str) -> dict[str, float | None]:
    """Exponents in T, and the first length at which a mixer trains faster than dense attention."""
    lengths = [int(n) for n in times]
    fit = lambda figure: exponent(lengths, [rows[name][figure] for rows in times.values()])
    ahead = [n for n, rows in times.items() if "attention" in rows and faster(rows, name)]
    return {f"T^, {figure}": fit(figure) for figure in FIGURES} | {"ahead from": int(ahead[0]) if ahead else None}


def faster(rows, name: str) -> bool:
    return rows[name]["training_ms"] < rows["attention"]["training_ms"]


def text_task(config: Config) -> dict[str, Any]:
    """Bytes of which some are hidden, by BEGIN in their place."""
    text, context = config.data.corpus(), config.data.context
    windows = TextWindows(text.train, context, config.train.batch_size, config.seed)
    test = evaluation_windows(text.test, context, config.test_windows)

    def hidden(targets, step: int):
        inputs, labels = masked(targets, config.hidden, np.random.default_rng((config.seed, step)))
        return {"inputs": inputs, "labels": labels}

    batches = lambda step: hidden(windows.batch(step)["targets"], step + 1)
    sizes = {"vocabulary": VOCABULARY, "length": context, "bytes": len(windows.text)}
    return {"batches": batches, "test": hidden(test, 0)} | sizes


def recall_task(config: Config) -> dict[str, Any]:
    task = config.recall
    sizes: dict[str, Any] = {"length": task.length, "num_pairs": task.pairs, "vocab_size": task.vocabulary}
    draw = partial(mqar, **sizes, power=1.0, random_non_queries=False)
    count = max(1, config.train.batch_size * config.data.context // task.length)
    batches, test = drawn_anew(draw, config.seed, count, task.test_sequences)
    return {"batches": batches, "test": test, "vocabulary": task.vocabulary, "length": task.length}


def quality(run: Run[Config], name: str, kind: str, task: dict[str, Any], train: TrainConfig) -> dict[str, Any]:
    """Train on a task; bits per hidden byte, or the share of values recalled."""
    config, part = run.config, f"{name.replace(' ', '_')}-{kind}"
    learner, model = (build(config, name, task["length"], task["vocabulary"], training=t) for t in (True, False))

    def loss(params, batch, key):
        return cross_entropy(learner.apply(params, batch["inputs"], rngs={"subsample": key}), batch["labels"])

    init = lambda key: learner.init(key, jnp.zeros((1, task["length"]), jnp.int32))
    params = run.fit(loss, init, task["batches"], part=part, train=train).params
    inputs, labels = task["test"]["inputs"], task["test"]["labels"]
    asked = labels >= 0
    if kind == "text":
        nats = TokenNats(lambda params, inputs, key: model.apply(params, inputs), train.batch_size)
        scores = nats(params, inputs, np.maximum(labels, 0))[asked]
        found = {
            "text bits": float(scores.mean() / np.log(2)),
            "parameters": optax.tree.size(params),
        }
    else:
        answer = lambda params, row: jnp.argmax(jnp.asarray(model.apply(params, row[None]))[0], axis=-1)
        answers = jax.jit(lambda params, rows: jax.lax.map(partial(answer, params), rows, batch_size=16))
        found = {"recall": float((np.asarray(answers(params, inputs)) == labels)[asked].mean())}
    run.record(train.steps, f"test/{part}", {key: float(value) for key, value in found.items()})
    return found | {f"digest, {kind}": digest(params)}


def verdict(run: Run[Config], table: dict[str, dict], times) -> None:
    longest = times[str(max(map(int, times)))]
    of = lambda family: [name for name in table if KINDS[name][0] == family]
    compared = [name for name in table if name in SURVEY]
    worst = lambda figures: max(
        (table[name][f"T^, {figure}"] for name in table if name in LINEAR for figure in figures), default=float("nan")
    )
    best = lambda names, value: min(names, key=value, default=None)
    bits = lambda name: table[name]["text bits"]
    sparse, kernel = best(of("sparse"), bits), best(of("kernel"), bits)
    fastest = best(compared, lambda name: np.nan_to_num(longest[name]["training_ms"], nan=np.inf))
    lightest = best(compared, lambda name: np.nan_to_num(longest[name]["training_mib"], nan=np.inf))
    time, memory = worst(FIGURES[:2]), worst(FIGURES[2:])
    dense = table.get("attention", {}).get("T^, training_ms", float("nan"))
    parts = {
        "linear in time": time <= MOST,
        "linear in memory": memory <= MOST,
        "dense attention is not": dense >= LEAST,
        "dense attention recalls": table.get("attention", {}).get("recall", 0.0) >= RECALLED,
        "sparse predicts better than kernels": sparse is not None
        and kernel is not None
        and bits(sparse) <= bits(kernel),
        "a kernel is the fastest": fastest in of("kernel"),
        "a low rank is the lightest": lightest in of("low rank"),
    }
    run.finish(
        claim="linear mixers grow as T^1.15 at most; sparse attention is the best, kernels the fastest, low rank the "
        "lightest",
        measured={"largest exponent, time": time, "largest exponent, memory": memory}
        | {"bits, sparse": sparse and bits(sparse), "bits, kernel": kernel and bits(kernel)}
        | {"fastest": fastest, "lightest": lightest},
        baseline={"exponent of dense attention": dense, "bits": table.get("attention", {}).get("text bits")},
        threshold={"exponents": MOST, "dense": LEAST, "recall": RECALLED},
        holds=parts,
        table=table,
        times=times,
    )


def show(table: dict[str, dict]) -> None:
    columns = [f"T^, {figure}" for figure in FIGURES] + ["ahead from", "text bits", "recall", "parameters"]
    print(f"{'mixer':<18}" + "".join(f"{column:>18}" for column in columns))
    for name, row in table.items():
        form = lambda value: "-" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
        print(f"{name:<18}" + "".join(f"{form(row[column]):>18}" for column in columns), flush=True)


def plot(run: Run, table: dict[str, dict], times) -> None:
    """Time and memory of training against the length, and quality against time at the longest one."""
    with run.figure("efficient_transformers", figsize=(14, 4.5)) as figure:
        left, middle, right = figure.subplots(1, 3)
        lengths = sorted(map(int, times))
        for place, (name, row) in enumerate(table.items()):
            look = {"color": COLORS[KINDS[name][0]], "marker": "osv^Dx"[place % 6], "markersize": 4}
            at = lambda key, name=name: [times[str(n)][name][key] for n in lengths]
            left.plot(lengths, at("training_ms"), **look, label=f"{name}, T^{row['T^, training_ms']:.2f}")
            middle.plot(lengths, at("training_mib"), **look, label=f"{name}, T^{row['T^, training_mib']:.2f}")
            right.plot(
                at("training_ms")[-1],
                row["text bits"],
                linestyle="",
                **look,
                label=f"{name}, recall {row['recall']:.2f}",
            )
        for axes, label in ((left, "ms, forward and backward"), (middle, "MiB of temporaries")):
            axes.set(xscale="log", yscale="log", xlabel="T", ylabel=label)
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axes.set_xticks([], minor=True)
        right.set(xscale="log", xlabel=f"ms, forward and backward, T = {lengths[-1]:,}", ylabel="bits per hidden byte")
        for axes in (left, middle, right):
            axes.legend(frameon=False, fontsize="x-small")


if __name__ == "__main__":
    main("efficient_transformers", PRESETS, measure)
