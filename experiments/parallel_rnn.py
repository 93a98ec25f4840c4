"""A nonlinear recurrence solved for all of time at once: iterations, errors and speed beside the loop.

Claim   Newton's iterations over five nonlinear cells, as they start and trained on real text, give the loop's outputs
        to 1e-5 and its gradient to 1e-4 of the largest at every length, with the full Jacobian without falling back;
        where weights are so large that a cell is chaotic they fall back and say so. On an accelerator they train
        faster than the loop.
Source  DEER (arXiv 2309.12252), full Jacobian; quasi-DEER (arXiv 2407.19115), its diagonal.
Expect  4 to 10 iterations with the full Jacobian of all five cells, outputs to 1.4e-6, gradients to 5e-7; 12 to 59 with
        its diagonal, which falls back for a trained ELM and an untrained ICLRNN. Chaotic cells fall back at 1,024
        tokens. On a CPU it never pays: 0.4 of the loop's speed at best. An hour on 2 very busy CPU cores, half of it
        on less busy ones; gpu is not yet measured.
Run     python -m experiments.parallel_rnn [--preset cpu|gpu] [--cells lstm,gru] [--data.path FILE_OR_FOLDER]
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import LanguageModel
from jaxseq.analysis import in_turns
from jaxseq.data import VOCABULARY, TextConfig, TextWindows, evaluation_windows, with_begin
from jaxseq.fields import check_counts, chosen
from jaxseq.mixers import ELM, GRU, ICLRNN, LSTM, LeakyRNN
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main, projected
from jaxseq.train.optimizer import make_optimizer
from jaxseq.train.rows import grouped, where


class Kind(NamedTuple):
    """A cell as a slot of a model, what its weights are kept to, and those that make it chaotic when enlarged.

    Cells of rectifiers have none: they grow without bound instead.
    """

    build: Callable
    project: Callable = lambda params: params
    chaotic: str | None = None


CELLS = {
    "lstm": Kind(LSTM, chaotic="recurrent_kernel"),
    "gru": Kind(GRU, chaotic="recurrent_kernel"),
    "leaky": Kind(LeakyRNN),
    "elm": Kind(lambda d_model, **options: ELM(d_model, num_memory=d_model, **options), chaotic="hidden_kernel"),
    "iclrnn": Kind(ICLRNN, ICLRNN.contracted),
}
FORMS: dict[str, dict[str, str]] = {
    "sequential": {"impl": "sequential"},
    "full": {"impl": "parallel", "jacobian": "full"},
    "diagonal": {"impl": "parallel", "jacobian": "diagonal"},
}
PARALLEL, LINES = ("full", "diagonal"), {"started": ":", "trained": "-"}
#: The largest difference of outputs, and of gradients as a share of the largest.
VALUES, GRADIENTS = 1e-5, 1e-4


@dataclass(frozen=True)
class Config:
    """Cells, their training, and the lengths they are solved at."""

    seed: int = 0
    """Seed of weights and of the order of the data."""
    cells: str = "lstm,gru,leaky,elm,iclrnn"
    """Cells by name, with commas between them."""
    width: int = 16
    """Numbers of a hidden state; an LSTM has as many cells besides, an ICLRNN two layers of them."""
    lengths: tuple[int, ...] = (64, 256, 1024)
    """Tokens that the recurrence is solved for."""
    batch: int = 2
    """Sequences at once."""
    block_size: int = 256
    """Tokens that are solved for at once; a trained LSTM of width 32 diverged over 1,024."""
    gain: float = 30.0
    """What weights are multiplied with to make a cell chaotic."""
    repeats: int = 2
    """Rounds of timing over all forms, after one to warm up."""
    least_speed: float = 0.0
    """Speed of a training step, as a multiple of the loop's, asked of the faster form at the greatest length."""
    data: TextConfig = TextConfig(context=128)
    train: TrainConfig = TrainConfig(steps=300, batch_size=16, learning_rate=1e-2, warmup_steps=20)
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_counts(self, "width", "batch", "block_size", "repeats")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths={self.lengths}; give one or more, each of 2 tokens or more.")
        self.names()

    def names(self) -> list[str]:
        return chosen("cells", self.cells, CELLS)


PRESETS = {
    "cpu": Config(),
    "gpu": Config(width=32, lengths=(64, 256, 1024, 4096, 16384), batch=16, repeats=5, least_speed=2.0),
    # Seconds: to see that everything works.
    "debug": Config(width=4, lengths=(8, 20), data=TextConfig(context=16), train=TrainConfig(steps=3, batch_size=2)),
}


def build(config: Config, cell: str, form: str) -> LanguageModel:
    """A layer of the cell, solved in a form."""
    slot = partial(CELLS[cell].build, **FORMS[form], block_size=config.block_size)
    return LanguageModel(VOCABULARY, config.width, (slot,), remat=False)


def measure(run: Run[Config]) -> None:
    config = run.config
    text = config.data.corpus()
    windows = TextWindows(text.train, config.data.context, config.train.batch_size, config.seed)
    held_out = [evaluation_windows(text.test, length)[: config.batch] for length in config.lengths]
    rows: list[dict[str, Any]] = []
    params_of = {}
    for cell in config.names():
        model, (_, project, chaotic) = build(config, cell, "sequential"), CELLS[cell]
        init = lambda key, model=model, project=project: project(model.init(key, jnp.zeros((1, 1), jnp.int32)))
        loss = lambda params, batch, key, model=model: cross_entropy(
            model.apply(params, batch["inputs"]), batch["targets"], bytes_per_token=1.0
        )
        optimizer = projected(make_optimizer(config.train), project)
        weights = {"started": init(jax.random.key(config.seed))}
        weights["trained"] = run.fit(loss, init, windows.batch, part=cell, optimizer=optimizer).params
        params_of[cell] = weights["trained"]
        if chaotic is not None:
            weights["chaotic"] = enlarged(weights["started"], chaotic, config.gain)
        for (state, params), targets in product(weights.items(), held_out):
            make = partial(compared, config, cell, state, params, targets)
            rows += run.kept(f"{cell}, {state}, {targets.shape[1]}", make).values()
            show(rows[-len(PARALLEL) :])
    draw(run, rows)
    verdict(run, rows, digest(params_of))


def enlarged(params, name: str, gain: float):
    """The weights of this name `gain` times as large."""
    larger = lambda path, x: gain * x if name in jax.tree_util.keystr(path) else x
    return jax.tree_util.tree_map_with_path(larger, params)


def compared(config: Config, cell: str, state: str, params, targets: np.ndarray) -> dict[str, dict[str, Any]]:
    """A row for each parallel form: iterations, how far outputs and gradients are from the loop's, and its speed.

    Speeds are of the model's training step, of the same programs, all in turn.
    """
    inputs = with_begin(targets), targets.astype(np.int32)
    programs: dict[str, Callable] = {form: partial(solver(config, cell, form), params, *inputs) for form in FORMS}
    y, slopes, _ = programs["sequential"]()
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes))
    found = {form: programs[form]() for form in PARALLEL}
    timed: dict[str, float] = {}
    if state == "trained":
        timed = in_turns(programs, lambda turn: (), seed=config.seed, repeats=config.repeats, seconds=0.05)
    rows = {}
    for form, (outputs, gradient, done) in found.items():
        apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), gradient, slopes)
        rows[form] = {
            "cell": cell,
            "weights": state,
            "length": targets.shape[1],
            "form": form,
            "iterations": max(int(layer.iterations.max()) for layer in done),  # of any block
            "fell back": not all(bool(layer.converged.all()) for layer in done),
            "values": float(jnp.abs(outputs - y).max()),
            "gradients": float(max(jax.tree.leaves(apart)) / largest),
        }
        if timed:
            rows[form] |= {"ms": timed[form], "speed": timed["sequential"] / timed[form]}
    return rows


@cache
def solver(config: Config, cell: str, form: str):
    """Of parameters and text: outputs of the recurrence, the loss's gradient, and what the iterations did."""
    model = build(config, cell, form)

    @jax.jit
    def solved(params, inputs, targets):
        def loss(params):
            prefills = lambda module, method: method == "prefill"
            logits, sown = model.apply(params, inputs, capture_intermediates=prefills, mutable=["intermediates"])
            of = sown["intermediates"]["stack"]["layers"]["block_0"]["mixer"]
            return cross_entropy(logits, targets)[0], (of["prefill"][0][0], of.get("newton", ()))

        gradient, (y, done) = jax.grad(loss, has_aux=True)(params)
        return y, gradient, done

    return solved


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        of = f"{row['cell']:<8}{row['weights']:<9}T = {row['length']:<7}{row['form']:<10}"
        errors = f"values {row['values']:.1e}  gradients {row['gradients']:.1e}"
        speed = f"  {row['ms']:.1f} ms, speed {row['speed']:.3f}" if "ms" in row else ""
        print(of + f"{row['iterations']:>3} iterations  {errors}{'  fell back' * row['fell back']}{speed}", flush=True)


def verdict(run: Run[Config], rows: list[dict[str, Any]], parameters_digest: str) -> None:
    config, longest = run.config, max(run.config.lengths)
    tame = [row for row in rows if row["weights"] != "chaotic"]  # of chaos two programs of the loop differ as well
    wild, by_form = where(rows, weights="chaotic", length=longest), grouped(tame, "form")
    fallen = {
        form: [f"{row['cell']}, {row['weights']}, {row['length']}" for row in of if row["fell back"]]
        for form, of in by_form.items()
    }
    worst = {name: max(row[name] for row in tame) for name in ("values", "gradients")}
    timed = grouped(where(tame, weights="trained", length=longest), "cell")
    fastest = {cell: max(row["speed"] for row in of) for cell, of in timed.items()}
    parts = {
        "outputs are the loop's": worst["values"] <= VALUES,
        "so are gradients": worst["gradients"] <= GRADIENTS,
        "Newton converges": not fallen["full"],
        "speed": min(fastest.values()) >= config.least_speed,
    }
    if wild:
        parts["chaotic cells fall back"] = all(row["fell back"] for row in wild)
    run.finish(
        claim="Newton over time gives the loop's outputs and gradients, falls back where cells are chaotic"
        + (f", and trains {config.least_speed} times as fast" if config.least_speed else ""),
        measured={f"most iterations, {form}": max(row["iterations"] for row in of) for form, of in by_form.items()}
        | {f"fell back, {form}": names for form, names in fallen.items()}
        | {f"largest error, {name}": value for name, value in worst.items()}
        | {f"speed, {cell}": value for cell, value in fastest.items()},
        baseline={"speed of the loop": 1.0},
        threshold={"values": VALUES, "gradients": GRADIENTS, "speed": config.least_speed},
        holds=parts,
        rows=rows,
        parameters_digest=parameters_digest,
    )


def draw(run: Run, rows: list[dict[str, Any]]) -> None:
    """Iterations against length, dotted where untrained, and speed in training against the loop's."""
    with run.figure("parallel_rnn", figsize=(12, 4)) as figure:
        left, right = figure.subplots(1, 2)
        for i, (cell, of_cell) in enumerate(grouped(rows, "cell").items()):
            for (form, marker), (weights, line) in product(zip(PARALLEL, "os", strict=True), LINES.items()):
                of = where(of_cell, form=form, weights=weights)
                at, style = [row["length"] for row in of], {"color": f"C{i}", "marker": marker, "linestyle": line}
                left.plot(at, [row["iterations"] for row in of], **style)
                if weights == "trained":
                    right.plot(at, [row["speed"] for row in of], label=f"{cell}, {form}", **style)
        right.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="iterations (dotted: untrained)")
        right.set(xscale="log", yscale="log", xlabel="tokens", ylabel="speed in training, 1 is the loop's")
        figure.legend(loc="outside right upper", frameon=False)


if __name__ == "__main__":
    main("parallel_rnn", PRESETS, measure)
