"""Every mixer of the library, trained alike: what it learns, what it keeps, how fast it is.

Claim   Mixers whose state does not grow decode as fast after 32,768 tokens as after 128 (within 10 %), and the best of
        them predicts text better than softmax attention of as many parameters after as many tokens.
Source  The constant cost of a token is what recurrent models are made for (Mamba, arXiv 2312.00752, section 4.5, GLA,
        arXiv 2312.06635, section 5); the table itself is ours.
Expect  The best 3.2 bits per byte, attention 3.9; about a minute a mixer on 2 CPU cores.
Run     python -m experiments.mixer_table [--preset cpu|gpu] [--mixers gla,mamba,attention]
"""

from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from jaxseq.analysis import BitsPerByte, decoding_speeds, nearest_in_size, num_parameters, state_bytes
from jaxseq.data import VOCABULARY, TextConfig, TextWindows, evaluation_windows, joined
from jaxseq.fields import check_counts, chosen
from jaxseq.layers import GatedMLP
from jaxseq.models import ModelConfig, mixer_names, named_language_model
from jaxseq.models.named import slot_fields
from jaxseq.train import (
    CheckpointConfig,
    MeshConfig,
    Run,
    TrainConfig,
    cross_entropy,
    device_mesh,
    digest,
    main,
    with_sown,
)


@dataclass(frozen=True)
class Config:
    """What all mixers have in common."""

    seed: int = 0
    """Seed of weights and of the order of the data."""
    mixers: str = ""
    """Mixers by name, with commas between them; where none is given, all that take prompts of any length in less than
    cubic time."""
    parameters: int = 150_000
    """Parameters of a model: the width that comes nearest, and feed-forward layers as wide as fits."""
    test_windows: int = 64
    """Windows of the test files that are scored, evenly spread."""
    contexts: tuple[int, int] = (128, 32_768)
    """Tokens before those whose decoding is timed: few, and many."""
    data: TextConfig = TextConfig(context=512)
    model: ModelConfig = ModelConfig(depth=1)
    train: TrainConfig = TrainConfig(
        steps=100, batch_size=4, learning_rate=4e-3, warmup_steps=10, final_learning_rate_ratio=0.1, log_every=10
    )
    checkpoint: CheckpointConfig = CheckpointConfig(every=0)
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "parameters", "test_windows")
        if not 0 < self.contexts[0] < self.contexts[1]:
            raise ValueError(f"contexts={self.contexts} must be few tokens, and then more.")
        for name in self.names():
            replace(self.model, mixers=name)

    def names(self) -> list[str]:
        if self.mixers:
            return chosen("mixers", self.mixers, mixer_names())
        # Filters of a fixed length take no prompt as long as the longest context; triples of 512 tokens take hours.
        slow = ("kroneckerattention",)
        return [name for name in mixer_names() if "max_length" not in slot_fields(name) and name not in slow]


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        parameters=20_000_000,
        test_windows=256,
        data=TextConfig(context=2048),
        model=ModelConfig(depth=6, heads=4),
        train=TrainConfig(steps=2000, batch_size=32, learning_rate=2e-3, warmup_steps=200),
    ),
    # Seconds a mixer: to see that everything works.
    "debug": Config(
        parameters=12_000,
        test_windows=4,
        contexts=(128, 256),
        data=TextConfig(context=32),
        train=TrainConfig(steps=3, batch_size=4, learning_rate=4e-3, log_every=1),
    ),
}
COLUMNS = {
    "width": "{:>6,.0f}",
    "parameters": "{:>11,.0f}",
    "bits_per_byte": "{:>14.3f}",
    "state_bytes": "{:>12,.0f}",
    "training_tokens_per_second": "{:>27,.0f}",
    "decoding_short": "{:>15,.0f}",
    "decoding_long": "{:>14,.0f}",
    "compile_seconds": "{:>16.1f}",
}


def size(model) -> int:
    """Parameters of a model that reads tokens."""
    return num_parameters(model, jnp.zeros((1, 1), jnp.int32))


def of_size(config: ModelConfig, parameters: int, step: int):
    """The model of the width, a multiple of `step`, that brings so many parameters nearest.

    Its feed-forward layers take up the difference.
    """
    model = lambda n, **fields: named_language_model(replace(config, width=n * step), VOCABULARY, **fields)
    n = nearest_in_size(model, parameters, jnp.zeros((1, 1), jnp.int32))
    width, layers = n * step, len(config.slots())
    hidden = GatedMLP(width).width() + round((parameters - size(model(n))) / (3 * width * layers))
    return model(n, mlp=partial(GatedMLP, hidden=max(1, hidden)))


def measure(run: Run[Config]) -> None:
    config, context = run.config, run.config.data.context
    text = config.data.corpus()
    windows = TextWindows(text.train, context, config.train.batch_size, config.seed, packed=config.data.packed)
    test = evaluation_windows(text.test, context, config.test_windows)
    prompt = np.resize(np.frombuffer(joined(text.test), np.uint8), (1, max(config.contexts))).astype(np.int32)
    run.require_same(bytes=len(windows.text))
    table = {}
    print(f"{'mixer':<18}" + "".join(f"{name:>{len(form.format(0))}}" for name, form in COLUMNS.items()))
    for name in config.names():
        table[name] = run.kept(name, partial(figures, run, name, windows, test, prompt))
        print(f"{name:<18}" + "".join(form.format(table[name][key]) for key, form in COLUMNS.items()), flush=True)
    draw(run, table)
    verdict(run, table)


def figures(run: Run[Config], name: str, windows: TextWindows, test: np.ndarray, prompt: np.ndarray) -> dict:
    """All figures of one mixer."""
    config, batch = run.config, run.config.train.batch_size
    whole_heads = 4 * config.model.heads  # also where a mixer takes half or three quarters of the width
    model = of_size(replace(config.model, mixers=name), config.parameters, step=whole_heads)

    def loss(params, batch, key):
        logits, sown = with_sown(model, params, batch["inputs"], batch.get("segment_ids"))
        nats, metrics = cross_entropy(logits, batch["targets"], bytes_per_token=1.0)
        return nats + sown, metrics

    init = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))
    tokens = batch * config.data.context
    trained = run.fit(loss, init, windows.batch, tokens_per_step=tokens, part=name)
    score = BitsPerByte(model, batch, device_mesh(config.mesh))(trained.params, test)
    few, many = config.contexts
    short, long = decoding_speeds(model, trained.params, jnp.asarray(prompt), (few, many))
    steps = trained.step - trained.first_step
    run.record(config.train.steps, f"test/{name}", score)
    return {
        "width": model.d_model,
        "parameters": size(model),
        "state_bytes": state_bytes(model, many),
        "grows": state_bytes(model, many) > state_bytes(model, few),
        "training_tokens_per_second": steps * tokens / trained.training_seconds if steps else float("nan"),
        "decoding_short": short,
        "decoding_long": long,
        "compile_seconds": trained.compile_seconds,
        "digest": digest(trained.params),
    } | score


def verdict(run: Run[Config], table: dict[str, dict]) -> None:
    constant = {name: row for name, row in table.items() if not row["grows"]}
    ratios = {name: row["decoding_long"] / row["decoding_short"] for name, row in constant.items()}
    best = min(constant, key=lambda name: constant[name]["bits_per_byte"], default=None)
    growing = {name: row["bits_per_byte"] for name, row in table.items() if row["grows"]}
    beaten = [best is not None and constant[best]["bits_per_byte"] < bits for bits in growing.values()]
    run.finish(
        claim="a state that does not grow decodes as fast late as early, and the best of them beats attention",
        measured={"least ratio of decoding speeds": min(ratios.values(), default=None)}
        | ({} if best is None else {f"bits per byte, {best}": constant[best]["bits_per_byte"]}),
        baseline={f"bits per byte, {name}": bits for name, bits in growing.items()},
        threshold={"ratio of decoding speeds": [0.9, 1.1]},
        holds=any(beaten) and all(beaten) and all(0.9 <= ratio <= 1.1 for ratio in ratios.values()),
        table=table,
        decoding_ratios=ratios,
    )


def draw(run: Run, table: dict[str, dict]) -> None:
    """Quality against state size; numbers stand for names, which are listed from the best on."""
    with run.figure("quality", figsize=(9, 5.5)) as figure:
        axes = figure.subplots()
        ranked = sorted(table, key=lambda name: table[name]["bits_per_byte"])
        for rank, name in enumerate(ranked, 1):
            x, y = table[name]["state_bytes"] / 1024, table[name]["bits_per_byte"]
            color = "#d1602f" if table[name]["grows"] else "#3b6fb6"
            axes.plot(x, y, "o", color=color, markersize=5, label=f"{rank:>2}  {name}  {y:.2f}")
            axes.annotate(str(rank), (x, y), xytext=(4, 3), textcoords="offset points", fontsize="x-small")
        axes.set(xscale="log", xlabel="state of a sequence, KiB", ylabel="test bits per byte")
        columns = -(-len(ranked) // 35)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize="x-small", ncols=columns)


if __name__ == "__main__":
    main("mixer_table", PRESETS, measure)
