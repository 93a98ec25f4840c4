"""How fine a gate has to be to forget at once: recall of pairs that a reset makes void.

Claim   A data-dependent gate, a vector or a scalar a head, recalls what was seen since the last reset (0.98 right); a
        fixed decay forgets too little or too much (0.92 at most), no gate cannot forget at all (0.85 at most).
Source  GLA (arXiv 2312.06635), section 5.1 and table 4, the ablation of gates, on a synthetic task.
Expect  About 1.00, 1.00, 0.84 and 0.74 after 200 steps of one layer of width 48, in four minutes on 2 CPU cores.
Run     python -m experiments.reset_recall [--preset cpu|gpu] [--train.steps 200]
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxseq import GLA, LanguageModel
from jaxseq.fields import check_counts
from jaxseq.tasks import drawn_anew, reset_recall
from jaxseq.tasks.reset_recall import vocabulary
from jaxseq.train import CheckpointConfig, MeshConfig, Run, TrainConfig, cross_entropy, digest, main


@dataclass(frozen=True)
class TaskConfig:
    """The task."""

    length: int = 64
    """Tokens of a sequence."""
    keys: int = 8
    """Keys of the map."""
    values: int = 8
    """Values of the map."""
    test_sequences: int = 512
    """Sequences to test on."""

    def __post_init__(self):
        check_counts(self, "length", "keys", "values", "test_sequences", section="task.")


@dataclass(frozen=True)
class Config:
    """Task, model and training, the same for all gates."""

    seed: int = 0
    """Seed of sequences and weights."""
    width: int = 48
    """Width of the model."""
    heads: int = 2
    """Heads of its one layer."""
    task: TaskConfig = TaskConfig()
    train: TrainConfig = TrainConfig(
        steps=200, batch_size=32, learning_rate=1e-2, warmup_steps=10, final_learning_rate_ratio=0.0, log_every=20
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()


PRESETS = {
    "cpu": Config(),
    "gpu": Config(
        width=256,
        heads=4,
        task=TaskConfig(length=512, keys=64, values=64, test_sequences=2048),
        train=TrainConfig(steps=4000, batch_size=256, learning_rate=3e-3, warmup_steps=200),
    ),
}

#: The least accuracy that the claim asks of a gate, or the most.
LEAST = {"vector": 0.98, "scalar": 0.98}
MOST = {"fixed": 0.92, "none": 0.85}


def measure(run: Run[Config]) -> None:
    config, task = run.config, run.config.task
    draw = partial(reset_recall, length=task.length, num_keys=task.keys, num_values=task.values)
    batches, test = drawn_anew(draw, config.seed, config.train.batch_size, task.test_sequences)
    accuracy, params = {}, {}
    for gate in (*LEAST, *MOST):
        layer = partial(GLA, num_heads=config.heads, gate=gate)
        model = LanguageModel(vocabulary(task.keys, task.values), config.width, (layer,))
        loss = lambda params, batch, key, m=model: cross_entropy(m.apply(params, batch["inputs"]), batch["labels"])
        init = lambda key, m=model: m.init(key, jnp.zeros((1, 1), jnp.int32))
        params[gate] = run.fit(loss, init, batches, part=gate).params
        _, metrics = jax.jit(loss)(params[gate], test, None)
        accuracy[gate] = float(metrics["accuracy"])
        print(f"{gate:<8}{accuracy[gate]:.3f}", flush=True)
        run.record(config.train.steps, f"test/{gate}", {name: float(x) for name, x in metrics.items()})
    run.plot()
    margins = [accuracy[gate] - least for gate, least in LEAST.items()]
    margins += [most - accuracy[gate] for gate, most in MOST.items()]
    run.finish(
        claim="a vector and a scalar gate recall what was seen since a reset, a fixed decay and none do not",
        measured={gate: accuracy[gate] for gate in LEAST},
        baseline={gate: accuracy[gate] for gate in MOST},
        threshold=LEAST | MOST,
        holds=min(margins) >= 0,
        parameters_digest=digest(params),
    )


if __name__ == "__main__":
    main("reset_recall", PRESETS, measure)
