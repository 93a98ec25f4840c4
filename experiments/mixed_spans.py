"""Full attention in a quarter of the layers, blocks in the others: what it costs, and what it loses on real text.

Claim   A model with full attention, trained on short windows, goes on with long ones in every schedule of spans. With
        full attention in the last of every four layers, blocks and the block before in the others, its bits per byte
        of held-out text are within 2 % of full attention's in all layers, at 0.45 of its multiply-adds and time and
        0.35 of its cache. Blocks in all layers are behind it on bytes that stand more than two blocks into the window.
Source  MASFormer (arXiv 2310.12442), which has 4 of 24 layers full at 8,192 tokens; the margins are ours, for sizes
        that are ours. Where full layers belong it ablates; here `bottom`, `middle` and `top` are of the same cost.
Expect  0.386 of the multiply-adds, 0.35 of the time at 4,096 tokens, 0.344 of the cache, and 1.2 % fewer bits than
        full attention (2.044 and 2.069). But blocks alone have 2.044 too, on late bytes as well: 160 steps do not
        learn what is further away than two blocks. Twelve minutes on 2 busy CPU cores.
Run     python -m experiments.mixed_spans [--preset cpu|gpu|debug] [--data.path FILE_OR_FOLDER]
        The text is the Python standard library unless a path is given.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import Attention, LanguageModel
from jaxseq.analysis import Case, TokenNats, bootstrap, side_by_side
from jaxseq.data import VOCABULARY, TextConfig, TextWindows, evaluation_windows, with_begin
from jaxseq.fields import check_counts
from jaxseq.models.block import Slot
from jaxseq.models.mixed_spans import (
    attention_cost,
    bottom,
    cached_tokens,
    every,
    middle,
    mixed_spans,
    rearranged,
    top,
    visible_pairs,
)
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main
from jaxseq.train.files import atomically, read_json, write_json


@dataclass(frozen=True)
class Config:
    """Text, model and training, the same for all schedules."""

    seed: int = 0
    """Seed of weights and of the order of the data."""
    width: int = 64
    """Width of the model."""
    depth: int = 4
    """Its layers."""
    full_layers: int = 1
    """Those with full attention, where it is not all or none."""
    heads: int = 2
    """Heads of a layer."""
    local: Literal["block_own", "block_prev", "window"] = "block_prev"
    """What the other layers see: their block, that and the one before, or a window."""
    span: int = 32
    """Tokens of a block or window."""
    ngrams: tuple[int, ...] = (2, 3, 4, 5)
    """Sizes of the n-grams whose hashed embeddings are added to the bytes' own."""
    ngram_buckets: int = 2**15
    """Rows of their table."""
    margin: float = 0.02
    """Bits per byte, relative, that the mixture may lose."""
    short_context: int = 128
    """Bytes of the windows that the model with full attention begins with."""
    long_steps: int = 40
    """Steps on the long windows, of each schedule; `train` is about those before, on as many bytes."""
    long_learning_rate: float = 5e-3
    """Their peak learning rate."""
    test_windows: int = 96
    """Windows of the test files that are scored, evenly spread."""
    timing_length: int = 4096
    """Tokens at which layers are timed, with spans that are the same share of them as in training."""
    bfloat16: bool = False
    """Compute in bfloat16."""
    data: TextConfig = TextConfig(context=512)
    train: TrainConfig = TrainConfig(
        steps=120, batch_size=32, optimizer="muon", learning_rate=1e-2, warmup_steps=12, final_learning_rate_ratio=0.1,
        log_every=20,
    )  # fmt: skip
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        counts = ("width", "depth", "full_layers", "heads", "span", "short_context", "long_steps", "test_windows")
        check_counts(self, *counts, "timing_length")
        if self.depth % self.full_layers:
            raise ValueError(f"full_layers={self.full_layers} does not divide depth={self.depth}.")
        if self.data.context <= 2 * self.span:
            raise ValueError(f"data.context={self.data.context} must be more than two spans of {self.span}.")
        if self.train.batch_size * self.short_context % self.data.context:
            raise ValueError(
                f"train.batch_size={self.train.batch_size} windows of short_context={self.short_context} are no whole "
                f"number of windows of data.context={self.data.context}."
            )

    def longer(self) -> TrainConfig:
        """The training on long windows."""
        batch, warmup = self.train.batch_size * self.short_context // self.data.context, self.long_steps // 10
        changed = replace(self.train, steps=self.long_steps, batch_size=batch, warmup_steps=warmup)
        return replace(changed, learning_rate=self.long_learning_rate)

    def schedules(self) -> dict[str, tuple[int, ...]]:
        """The full layers of each model; `spread` is the mixture that the claim is about."""
        count = self.full_layers
        ways = {"spread": every(self.depth // count), "bottom": bottom(count), "middle": middle(count)}
        chosen = {"full": tuple(range(self.depth)), "local": ()}
        for name, way in (ways | {"top": top(count)}).items():
            if way(self.depth) not in chosen.values():  # with one full layer the last of all is the top one too
                chosen[name] = way(self.depth)
        return chosen


PRESETS = {
    "cpu": Config(),
    # The sizes of the paper's layers, with 3 of 12 of them full.
    "gpu": Config(
        width=768, depth=12, full_layers=3, heads=12, span=1024, ngrams=(), margin=0.015, test_windows=64,
        timing_length=8192, bfloat16=True, data=TextConfig(context=8192), short_context=2048, long_steps=1000,
        long_learning_rate=1e-3,
        train=TrainConfig(steps=4000, batch_size=32, optimizer="muon", learning_rate=2e-3, warmup_steps=200),
    ),
    # Seconds: to see that everything works.
    "debug": Config(
        width=8, depth=2, span=4, ngrams=(2,), ngram_buckets=64, test_windows=8, timing_length=64,
        data=TextConfig(context=32), short_context=16, long_steps=2,
        train=TrainConfig(steps=3, batch_size=4, log_every=1),
    ),
}  # fmt: skip
#: Shares of what full attention in all layers takes.
MOST_COST, MOST_TIME, MOST_CACHE = 0.45, 0.45, 0.35


def layer(config: Config, local: bool, span: int) -> Slot:
    fields: dict[str, Any] = {"block_own": {"block_size": span}, "block_prev": {"block_size": span, "look_back": 1}}
    fields |= {"window": {"window": span + 1}}
    return partial(Attention, num_heads=config.heads, **(fields[config.local] if local else {}))


def build(config: Config, layers: tuple[int, ...]) -> LanguageModel:
    slots = mixed_spans(
        layer(config, False, config.span), layer(config, True, config.span), layers, num_layers=config.depth
    )
    ngrams: dict[str, Any] = {"ngrams": config.ngrams, "ngram_buckets": config.ngram_buckets}
    return LanguageModel(VOCABULARY, config.width, slots, **ngrams, dtype=jnp.bfloat16 if config.bfloat16 else None)


def measure(run: Run[Config]) -> None:
    config, context, longer = run.config, run.config.data.context, run.config.longer()
    text = config.data.corpus()
    windows = partial(TextWindows, text.train, seed=config.seed, packed=config.data.packed)
    test = evaluation_windows(text.test, context, config.test_windows)
    run.require_same(bytes=sum(len(document.content) for document in text.train), windows=len(test))

    def fitted(part: str, model: LanguageModel, init, train: TrainConfig, length: int):
        def loss(params, batch, key):
            logits = model.apply(params, batch["inputs"], batch.get("segment_ids"))
            return cross_entropy(logits, batch["targets"], bytes_per_token=1.0)

        draw, tokens = windows(length=length, batch_size=train.batch_size).batch, train.batch_size * length
        return run.fit(loss, init, draw, tokens_per_step=tokens, part=part, train=train)

    full = build(config, config.schedules()["full"])
    init = lambda key: full.init(key, jnp.zeros((1, 1), jnp.int32))
    begun = fitted("short", full, init, config.train, config.short_context).params
    nats, facts = {}, {}
    for name, layers in config.schedules().items():
        part, model = f"{name}-{config.train.steps}", build(config, layers)
        path = run.folder / "nats" / f"{part}.npy"
        if not path.exists():
            done = fitted(part, model, partial(_from, begun, model), longer, context)
            score = TokenNats(lambda params, inputs, key, model=model: model.apply(params, inputs), longer.batch_size)
            scores, steps = score(done.params, with_begin(test), test), done.step - done.first_step
            speed = steps * longer.batch_size * context / done.training_seconds if steps else float("nan")
            path.parent.mkdir(exist_ok=True)
            about = {"digest": digest(done.params), "training bytes per second": speed}
            write_json(path.with_suffix(".json"), about)
            with atomically(path) as temporary, open(temporary, "wb") as file:
                np.save(file, scores)
            run.record(longer.steps, f"test/{part}", {"loss": float(scores.mean())})
        nats[name], facts[name] = np.load(path), read_json(path.with_suffix(".json"))
    verdict(run, nats, facts, timed(config))


def _from(params, model: LanguageModel, key):
    """Parameters of another schedule, as the model holds them."""
    return rearranged(params, model.mixers)


def timed(config: Config) -> dict[str, dict[str, float]]:
    """Milliseconds and MiB of one layer of each kind, projections included, side by side."""
    length = config.timing_length
    span = max(1, config.span * length // config.data.context)
    dtype = jnp.bfloat16 if config.bfloat16 else jnp.float32
    build: Callable = lambda local: layer(config, local, span)(config.width, dtype=dtype)  # type: ignore[misc]
    modules = {"full": build(False), "local": build(True)}

    def draw(key):
        x = jax.random.normal(key, (1, length, config.width), dtype)
        return modules["full"].init(key, x[:, :1]), x

    forms = {name: module.apply for name, module in modules.items()}
    rows = side_by_side(Case("attention", length, draw, forms), seed=config.seed, repeats=7, seconds=0.2)
    return {row.form: row._asdict() for row in rows}


def shares(config: Config, layers: int, times: dict[str, dict[str, float]]) -> dict[str, float]:
    """What so many full layers cost beside full attention in all, at the context trained on; times at their own."""
    n, depth = config.data.context, config.depth
    local: dict[str, Any] = {"local": config.local, "span": config.span}
    share = lambda full, other: (layers * full + (depth - layers) * other) / (depth * full)
    count: dict[str, Any] = {"num_layers": depth, "num_full": layers}
    return {
        "multiply-adds": share(visible_pairs(n), visible_pairs(n, **local)),
        "the formula's": attention_cost(n, **count, **local),
        "cache": cached_tokens(n, **count, **local) / (depth * n),
        **{key: share(times["full"][key], times["local"][key]) for key in ("forward_ms", "training_ms")},
    }


def verdict(run: Run[Config], nats: dict[str, np.ndarray], facts, times) -> None:
    config = run.config
    late, beyond = 2 * config.span, (config.depth + 1) * config.span
    bits = lambda x: float(x.mean() / np.log(2))
    parts_of = {"all": slice(None), "late": slice(late, None), "beyond": slice(beyond, None)}
    table = {
        name: {part: bits(x[:, at]) for part, at in parts_of.items() if x[:, at].size}
        | shares(config, len(layers), times)
        | {"training bytes per second": facts[name]["training bytes per second"]}
        for (name, layers), x in zip(config.schedules().items(), nats.values(), strict=True)
    }
    show(table)
    each = {name: x[:, late:].mean(1) / np.log(2) for name, x in nats.items()}
    mean = lambda total, windows: {"bits": total / windows}
    more = lambda name: np.stack([each[name] - each["spread"], np.ones(len(each[name]))], axis=1)
    lost = {name: bootstrap(more(name), mean)["bits"]._asdict() for name in nats}
    spread, relative = table["spread"], table["spread"]["all"] / table["full"]["all"] - 1
    parts = {
        "within the margin of full attention": relative <= config.margin,
        "blocks alone behind, late": lost["local"]["low"] > 0,
        "multiply-adds": spread["multiply-adds"] <= MOST_COST,
        "time": max(spread["forward_ms"], spread["training_ms"]) <= MOST_TIME,
        "cache": spread["cache"] <= MOST_CACHE,
    }
    plot(run, nats, config.span)
    run.plot()
    run.finish(
        claim=f"full attention in {config.full_layers} of {config.depth} layers loses {config.margin:.1%} at most",
        measured={"bits per byte": spread["all"], "lost": relative, "blocks alone, late, bits more": lost["local"]}
        | {key: spread[key] for key in ("multiply-adds", "forward_ms", "training_ms", "cache")},
        baseline={name: table[name]["all"] for name in ("full", "local")},
        threshold={"lost": config.margin, "multiply-adds": MOST_COST, "time": MOST_TIME, "cache": MOST_CACHE},
        holds=parts,
        table=table,
        multiply_adds_of_a_window=2 * config.width * config.depth * visible_pairs(config.data.context),
        late_bits_more_than_spread=lost,
        times=times,
        parameters_digest=digest({name: fact["digest"] for name, fact in facts.items()}),
    )


def show(table: dict[str, dict[str, float]]) -> None:
    names = list(table["full"])
    print(f"{'':<10}" + "".join(f"{name:>{len(name) + 3}}" for name in names))
    for name, row in table.items():
        cells = (f"{row[key]:>{len(key) + 3}{',.0f' if row[key] > 100 else '.3f'}}" for key in names)
        print(f"{name:<10}" + "".join(cells), flush=True)


def plot(run: Run, nats: dict[str, np.ndarray], span: int) -> None:
    """Bits more than full attention takes, by how far into the window a byte stands."""
    with run.figure("positions", figsize=(7, 4)) as figure:
        axes = figure.subplots()
        length = nats["full"].shape[1] // span * span
        for name, each in nats.items():
            more = (each - nats["full"])[:, :length].reshape(len(each), -1, span).mean((0, 2)) / np.log(2)
            axes.plot(span * (np.arange(length // span) + 0.5), more, "o-", markersize=3, label=name)
        axes.axvline(2 * span, color="black", linestyle=":")
        axes.set(xlabel="position in the window (dotted: two spans)", ylabel="bits per byte more than full attention")
        axes.legend(frameon=False)


if __name__ == "__main__":
    main("mixed_spans", PRESETS, measure)
