"""The training loop: one jitted, sharded, donated step, resumed to the bit; it knows no model and no task."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .checkpoint import Checkpoints
from .config import TrainConfig
from .interrupt import Interrupted, StopSignal
from .optimizer import make_optimizer
from .paths import PyTree
from .sharding import BATCH, RULES, Rules, check_mesh, device_mesh, over_time, shard_batch, shardings

Metrics = dict[str, float]
Loss = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


class Best(NamedTuple):
    """What did best so far: in a checkpoint, before the evaluation of its own step, which is made again."""

    params: PyTree
    step: Any
    """0: nothing yet."""
    value: Any


class TrainState(NamedTuple):
    """All that training goes on from."""

    step: jax.Array
    """Steps taken, and so the position in the data."""
    params: PyTree
    optimizer: PyTree
    key: jax.Array
    """The key of the seed; step n uses fold_in(key, n)."""
    skipped: jax.Array
    """Steps that were not finite and changed nothing."""
    bad_run: jax.Array
    """How many of them end the steps taken."""


class FitResult(NamedTuple):
    """What `fit` returns: seconds and `first_step` are of this call, `evaluation` is the last one.

    `params` are those after `params_step` steps: the last one's, or with `best` those of the lowest metric.
    `seconds` are all, `compile_seconds` those of tracing and compiling the step, `training_seconds` those of all steps
    and evaluations, without that and without checkpoints.
    """

    params: PyTree
    params_step: int
    step: int
    first_step: int
    skipped: int
    seconds: float
    compile_seconds: float
    training_seconds: float
    evaluation: dict[str, Metrics]


def fit(
    loss: Loss,
    init: Callable[[jax.Array], PyTree],
    batches: Callable[[int], PyTree],
    *,
    config: TrainConfig,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    optimizer: optax.GradientTransformation | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    evaluate: Callable[[PyTree], dict[str, Metrics]] | None = None,
    best: str | None = None,
    report: Callable[[int, str, Metrics], None] | None = None,
    progress: Callable[[int, Metrics], None] | None = None,
) -> FitResult:
    """Train the parameters `init(key)` on `loss(params, batch, key) -> (scalar, metrics)`.

    `batches(n)` is the batch of step n + 1: NumPy arrays led by `batch_size` rows, the same on every process and
    in every run. So the step is the position in the data, keys are folded from seed and step, and resuming is exact.
    Microbatches weigh the same, whatever their masks count.

    With `checkpoints`, training goes on from the latest one and ends with one; a signal (Ctrl-C, SIGTERM) saves after
    the step in flight. `evaluate(params)` gives metrics by split, every `evaluate_every` steps and after the last.
    With `best="SPLIT/METRIC"`, one of those, the result holds the parameters for which it was lowest, the last ones
    where it never was a number; they are kept beside those in training, in checkpoints too. `evaluate` runs on every
    process, and what it returns must not differ.
    `report(step, split, metrics)` is called every `log_every` steps and for every evaluation, `progress(step, metrics)`
    every step, both on process 0 alone and while the next step already runs.

    Raises:
      ValueError: batch, mesh and config disagree; the checkpoint is corrupt or of another config; `best` names
        nothing that is evaluated.
      FloatingPointError: `max_bad_steps` steps in a row were not finite.
      Interrupted: a signal came and the state is saved. Left uncaught, the process ends with exit code 0.
    """
    started = time.monotonic()
    mesh = device_mesh() if mesh is None else mesh
    optimizer = make_optimizer(config) if optimizer is None else optimizer
    _check(config, mesh)
    if best is not None and evaluate is None:
        raise ValueError(f"best={best!r} takes evaluate=, which gives it.")
    with jax.set_mesh(mesh), StopSignal(every=config.log_every) as stop:
        create = lambda key: _initial(init, optimizer, key, best is not None)
        (state, kept), layout = _restored_or_new(create, seed, mesh, rules, checkpoints, best)
        better = jax.jit(_better, donate_argnums=0, out_shardings=layout[1])
        replicated = NamedSharding(mesh, PartitionSpec())
        step_fn = _step(over_time(loss, mesh), optimizer, config.accumulate)
        train_step = jax.jit(step_fn, out_shardings=(layout[0], replicated), donate_argnums=0)
        metrics = _LateMetrics(config, report, progress)
        first_step = step = int(state.step)
        evaluation: dict[str, Metrics] = {}
        compiled, began = 0.0, time.monotonic()
        while True:
            # Evaluating what a checkpoint holds comes after saving it, so that a signal never waits to save.
            if evaluate is not None and step > 0 and (_due(step, config.evaluate_every) or step >= config.steps):
                metrics.flush()
                evaluation = evaluate(state.params)
                metrics.evaluated(step, evaluation)
                if best is not None:
                    value = np.asarray(_metric(evaluation, best), kept.value.dtype)
                    kept = better(kept, Best(state.params, np.int32(step), value))
            stopped = stop.requested(step)
            if stopped or step >= config.steps:
                break
            batch = shard_batch(_checked(batches(step), config.batch_size), mesh)
            called = time.monotonic()
            state, values = train_step(state, batch)
            compiled, began = (time.monotonic() - called, called) if step == first_step else (compiled, began)
            step += 1
            metrics.taken(step, values)
            if checkpoints is not None and (_due(step, checkpoints.config.every) or step == config.steps):
                metrics.flush()  # the rows of a step are written before its checkpoint is
                saving = time.monotonic()
                checkpoints.save(step, state, kept, best)
                began += time.monotonic() - saving
        metrics.flush()
        training = time.monotonic() - began - compiled
        if checkpoints is not None:
            checkpoints.save(step, state, kept, best)
            checkpoints.wait()
    if stopped:
        raise Interrupted(step)
    seconds = (time.monotonic() - started, compiled, training)
    params, of_step = state.params, step
    if kept is not None and int(kept.step) > 0:
        params, of_step = kept.params, int(kept.step)
    return FitResult(params, of_step, step, first_step, int(state.skipped), *seconds, evaluation)


def _metric(evaluation: dict[str, Metrics], name: str) -> float:
    split, _, metric = name.rpartition("/")
    if metric not in evaluation.get(split, {}):
        there = ", ".join(f"{split}/{metric}" for split, metrics in evaluation.items() for metric in metrics)
        raise ValueError(f"best={name!r} is not evaluated; there is {there or 'nothing'}.")
    return float(evaluation[split][metric])


def _better(best: Best, new: Best) -> Best:
    """The better of the two, the earlier where they are equal; what is not a number is never better."""
    return jax.tree.map(lambda x, y: jnp.where(new.value < best.value, y, x), best, new)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check(config: TrainConfig, mesh: Mesh) -> None:
    check_mesh(mesh)
    parts = {f"mesh.{axis}": mesh.shape[axis] for axis in BATCH} | {"train.accumulate": config.accumulate}
    needed = int(np.prod(list(parts.values())))
    if config.batch_size % needed:
        named = " x ".join(f"{name}={size}" for name, size in parts.items() if size > 1)
        nearest = -(-config.batch_size // needed) * needed
        raise ValueError(f"train.batch_size={config.batch_size} is not divisible by {named}; choose {nearest}.")


def _checked(batch: PyTree, batch_size: int) -> PyTree:
    for x in jax.tree.leaves(batch):
        if x.shape[:1] != (batch_size,):
            raise ValueError(
                f"batches(step) gave an array of shape {x.shape}; train.batch_size={batch_size} rows lead."
            )
    return batch


def _initial(
    init, optimizer: optax.GradientTransformation, key: jax.Array, with_best: bool
) -> tuple[TrainState, Best | None]:
    params = init(key)
    zero = jnp.zeros((), jnp.int32)
    nothing = Best(jax.tree.map(jnp.zeros_like, params), zero, jnp.full((), jnp.inf))
    return TrainState(zero, params, optimizer.init(params), key, zero, zero), nothing if with_best else None


def _restored_or_new(
    create, seed: int, mesh: Mesh, rules: Rules, checkpoints: Checkpoints | None, best: str | None
) -> tuple[tuple[TrainState, Any], Any]:
    """State and best to go on from, and their shardings; nothing is initialised when a checkpoint is there."""
    key = jax.random.key(seed)
    abstract = jax.eval_shape(create, key)
    layout = tuple(shardings(tree, mesh, rules) for tree in abstract)
    if checkpoints is not None:
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
        there = checkpoints.restore_latest(target[0], target[1], best)
        if there is not None:
            return there, layout
    return jax.jit(create, out_shardings=layout)(key), layout


def _step(loss: Loss, optimizer: optax.GradientTransformation, accumulate: int):
    """state, batch -> state, metrics: a step that is not finite changes nothing but the counters."""
    gradient = _accumulated(loss, accumulate)

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        (value, metrics), grads = gradient(state.params, batch, jax.random.fold_in(state.key, state.step))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by counts
            updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)
        new = TrainState(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            optimizer=jax.tree.map(keep, moments, state.optimizer),
            key=state.key,
            skipped=state.skipped + jnp.where(finite, 0, 1),
            bad_run=jnp.where(finite, 0, state.bad_run + 1),
        )
        counters = {"gradient_norm": norm, "skipped": new.skipped, "bad_run": new.bad_run}
        return new, {"loss": value} | metrics | counters

    return step


def _accumulated(loss: Loss, parts: int):
    """value_and_grad of the mean loss over microbatches, one in memory at a time."""
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return gradient

    def accumulated(params, batch, key):
        # Microbatch i takes rows i, i + parts, ...: each device's rows stay on it.
        split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        keys = jax.random.split(key, parts)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: split(x)[0], batch), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (jax.tree.map(split, batch), keys))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


class _LateMetrics:
    """Reads the metrics of a step once the next one is under way, so that the device never waits for the reader."""

    def __init__(self, config: TrainConfig, report: Any, progress: Any):
        nothing = lambda *_: None
        writes = jax.process_index() == 0
        self._report = report if report and writes else nothing
        self._progress = progress if progress and writes else nothing
        self._config = config
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def taken(self, step: int, values: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = (step, values)

    def flush(self) -> None:
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        metrics = {name: float(value) for name, value in jax.device_get(values).items()}
        bad_run = int(metrics.pop("bad_run"))
        metrics["skipped"] = int(metrics["skipped"])
        if step == 1 or _due(step, self._config.log_every):
            self._report(step, "train", metrics)
        self._progress(step, metrics)
        if bad_run >= self._config.max_bad_steps:
            raise FloatingPointError(
                f"The loss or its gradient was not finite at steps {step - bad_run + 1} to {step}, {bad_run} in a row; "
                f"lower train.learning_rate (now {self._config.learning_rate:g}) or raise train.warmup_steps."
            )

    def evaluated(self, step: int, evaluation: dict[str, Metrics]) -> None:
        for split, metrics in evaluation.items():
            self._report(step, split, {name: float(value) for name, value in metrics.items()})
