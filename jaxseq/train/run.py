"""The folder of a run: its config, how it resumes, its result."""

import contextlib
import json
import os
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from jax.experimental import multihost_utils
from matplotlib.figure import Figure

from .checkpoint import Checkpoints
from .config import TrainConfig
from .files import finite, read_json, write_json
from .fit import FitResult, fit
from .metrics import MetricsWriter
from .plots import draw_curves, saved_figure
from .progress import Progress, duration
from .sharding import device_mesh

Config = TypeVar("Config")

# What may change when a run goes on: where it computes and what it keeps, not what it computes.
FREE = ("mesh.", "checkpoint.")


class Run(Generic[Config]):
    """A run's folder and what is written into it; `open_run` makes it.

    `config` is a dataclass; `fit` reads its fields `seed`, `train`, `mesh` and `checkpoint`.
    """

    def __init__(self, config: Config, experiment: str, folder: str | Path):
        self.config, self.experiment, self.folder = config, experiment, Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self._started, self._noted = time.monotonic(), 0.0
        self._earlier = _seconds(self.folder)
        self._tokens_per_step: int | None = None
        self._undo: Callable[[], None] | None = None

    def withdraw(self) -> None:
        """Give a finished run back its result, where more steps were asked of it and none of them was done."""
        if self._undo is not None:
            self._undo()
        self._undo = None

    @property
    def result(self) -> dict[str, Any] | None:
        """What result.json holds; None while the run is not finished."""
        path = self.folder / "result.json"
        return read_json(path) if path.exists() else None

    @property
    def seconds(self) -> float:
        """Time spent on this run by all its starts, work that a kill undid included."""
        return self._earlier + time.monotonic() - self._started

    def fit(
        self,
        loss,
        init,
        batches,
        *,
        tokens_per_step: int | None = None,
        part: str = "",
        train: TrainConfig | None = None,
        **options,
    ) -> FitResult:
        """`fit` with this run's config, checkpoints, metrics and progress display; `options` go to `fit`.

        `part` names one of several models of the run: each has its own checkpoints, and rows called `split/part`. It
        is trained as `train` says, as the run's config does where it is None.
        """
        config: Any = self.config
        train = config.train if train is None else train
        self._tokens_per_step = tokens_per_step
        with (
            Checkpoints(self.checkpoints / part, config.checkpoint) as checkpoints,
            Progress(train.steps, tokens_per_step=tokens_per_step) as progress,
            self._writer(checkpoints.latest_step or 0, part) as writer,
        ):

            def report(step: int, split: str, metrics: dict[str, float]) -> None:
                writer.write(step, split, metrics)
                if split != "train":
                    progress.evaluated(step, split, metrics)

            def show(step: int, metrics: dict[str, float]) -> None:
                self._undo = None
                progress.update(step, metrics)
                self._note_seconds(every=5)

            if checkpoints.latest_step and jax.process_index() == 0:
                progress.note(f"{self.folder} goes on from step {checkpoints.latest_step}")
            options |= {"checkpoints": checkpoints, "report": report, "progress": show}
            options |= {"config": train, "mesh": device_mesh(config.mesh), "seed": config.seed}
            return fit(loss, init, batches, **options)

    def require_same(self, **facts: Any) -> None:
        """Refuse to go on where a fact that the config does not hold, such as a digest of the text, has changed.

        Raises:
          ValueError: this run began with another one.
        """
        path = self.folder / "facts.json"
        old = read_json(path) if path.exists() and _begun(self.folder) else facts
        for name, fact in facts.items():
            if old.get(name) != fact:
                raise ValueError(
                    f"{self.folder} began with another {name} ({old.get(name)}, now {fact}); give another --out."
                )
        if jax.process_index() == 0:
            write_json(path, facts)

    def record(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Add a row to metrics.jsonl after training, such as the final test."""
        with self._writer() as writer:
            if writer:
                writer.write(step, split, metrics)

    def _writer(self, step: int | None = None, part: str = "") -> Any:
        if jax.process_index() != 0:
            return contextlib.nullcontext()
        return MetricsWriter(self.folder, step=step, tokens_per_step=self._tokens_per_step, part=part)

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this name in `table.json`, made and written if there is none: no restart makes it twice."""
        path = self.folder / "table.json"
        table = read_json(path) if path.exists() else {}
        if name not in table:
            table[name] = finite(make())
            if jax.process_index() == 0:
                write_json(path, table)
        return table[name]

    @contextlib.contextmanager
    def figure(self, name: str, **options: Any) -> Iterator[Figure]:
        """A figure to draw on that becomes `plots/NAME.png`; `options` are those of matplotlib's `Figure`."""
        if jax.process_index() == 0:
            with saved_figure(self.folder / "plots" / f"{name}.png", **options) as figure:
                yield figure
        else:
            yield Figure(**options)

    def plot(self, baselines: dict[str, float] | None = None, **more: dict[str, float]) -> list[Path]:
        """Draw the learning curves into `plots/`; see `draw_curves`."""
        return draw_curves(self.folder, baselines, **more) if jax.process_index() == 0 else []

    def finish(
        self,
        *,
        claim: str,
        measured,
        baseline,
        threshold,
        holds: bool | Mapping[str, bool] | None,
        why: Mapping[str, str] | None = None,
        parameters_digest: str | None = None,
        **more,
    ) -> dict[str, Any]:
        """Write result.json, `more` included, and print a summary.

        `holds` is None where nothing was to be compared, or tells of the claim's `parts` by name: it holds where all of
        them do, and is None where there are none. `why` says of a part what was measured that tells the reason; of
        those that fail it is kept.

        Raises:
          ValueError: `why` is of parts that there are not.
        """
        if strangers := set(why or {}) - set(holds if isinstance(holds, Mapping) else {}):
            raise ValueError(f"why tells of {', '.join(sorted(strangers))}; holds has no such parts.")
        if isinstance(holds, Mapping):
            parts = {name: bool(true) for name, true in holds.items()}
            reasons = {name: text for name, text in (why or {}).items() if not parts[name]}
            more |= {"parts": parts, "why": reasons}
            holds = all(parts.values()) if parts else None
        result = {"experiment": self.experiment, "claim": claim, "measured": measured, "baseline": baseline}
        result |= {
            "threshold": threshold,
            "holds": None if holds is None else bool(holds),
            "seconds": round(self.seconds, 1),
            "device": _device(),
        }
        result |= {"jax_version": jax.__version__, "parameters_digest": parameters_digest} | more
        self._undo = None
        self._note_seconds()
        if jax.process_index() == 0:
            write_json(self.folder / "result.json", result)
            print(summary(result))
        return result

    def _note_seconds(self, every: float = 0) -> None:
        if jax.process_index() == 0 and self.seconds - self._noted >= every:
            self._noted = self.seconds
            write_json(self.folder / "seconds.json", {"seconds": self.seconds})


def open_run(config: Config, experiment: str, out: str | Path) -> Run[Config]:
    """The run in folder `out`: a new one, or the one already there when experiment and config are the same.

    More `train.steps` continue a run, a finished one too (its result and table stay, as `result-STEPS.json`). `mesh`
    and `checkpoint` may change. A folder that is refused is left as it is.

    Raises:
      ValueError: the folder is no run, or a run of another experiment or config, or its config.json is broken.
    """
    folder = Path(out)
    run = Run(config, experiment, folder)
    if jax.process_index() == 0:
        run._undo = _claim(folder, {"experiment": experiment} | asdict(config))  # type: ignore[call-overload]
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"open_run {folder}")
    return run


def read_config(folder: str | Path, kind: type[Config]) -> Config:
    """The config of the run in a folder, as the dataclass it was.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: its config.json is broken, or another experiment's.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.json).")
    config = read_json(path)
    missing = [f.name for f in fields(kind) if f.name not in config]  # type: ignore[arg-type]
    if missing:
        raise ValueError(
            f"{folder} holds a run of {config.get('experiment')}, whose config lacks {', '.join(missing)}."
        )
    return _typed(kind, config)


def summary(result: dict[str, Any]) -> str:
    """A result in a few lines for people."""
    verdict = {True: "holds", False: "does not hold", None: "is of nothing that ran"}[result["holds"]]
    numbers = "  ".join(f"{name} {_brief(result[name])}" for name in ("measured", "baseline", "threshold"))
    spent = f"{duration(result['seconds'])} on {result['device']}, jax {result['jax_version']}"
    lines = [f"{result['experiment']}: the claim {verdict}", result["claim"], numbers]
    for name in (name for name, true in result.get("parts", {}).items() if not true):
        reason = result.get("why", {}).get(name)
        lines.append(f"not: {name}" + (f" ({reason})" if reason else ""))
    return "\n  ".join([*lines, spent])


def _claim(folder: Path, config: dict[str, Any]) -> Callable[[], None]:
    """Make the folder this run's, or raise and leave it as it is; and how to undo what a continuation changes."""
    path = folder / "config.json"
    before, moved = read_json(path) if path.exists() else None, []
    if before is not None:
        old, new = _flat(before), _flat(json.loads(json.dumps(finite(config), default=str)))
        grown = new.get("train.steps", 0) > old.get("train.steps", 0)
        if _begun(folder):
            _check_same(folder, old, new | ({"train.steps": old["train.steps"]} if grown else {}))
        for name in ("result", "table") if grown else ():
            if (folder / f"{name}.json").exists():
                moved.append((folder / f"{name}.json", folder / f"{name}-{old['train.steps']}.json"))
                os.replace(*moved[-1])
    elif folder.exists() and (not folder.is_dir() or any(file.suffix != ".tmp" for file in folder.iterdir())):
        raise ValueError(f"{folder} is not empty and holds no run (no config.json); give another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, config)

    def undo() -> None:
        for there, now in moved:
            os.replace(now, there)
        if moved:
            write_json(path, before)

    return undo


def _begun(folder: Path) -> bool:
    """Whether there is anything to lose: a run that was refused before its first step has only its config."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    rows = metrics.exists() and metrics.stat().st_size > 0
    return rows or (checkpoints.exists() and any(checkpoints.iterdir())) or (folder / "result.json").exists()


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for name in sorted(old | new, key=lambda name: name != "experiment"):
        if old.get(name) != new.get(name) and not name.startswith(FREE):
            raise ValueError(
                f"{folder} holds a run with {name}={old.get(name)}, this one has {new.get(name)}; give another --out"
                + (" (train.steps can only grow)." if name == "train.steps" else ".")
            )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"train": {"steps": 5}} as {"train.steps": 5}."""
    if not isinstance(value, dict):
        return {name: value}
    return {n: v for key, inner in value.items() for n, v in _flat(inner, f"{name}.{key}" if name else key).items()}


def _typed(kind: Any, value: Any) -> Any:
    """A JSON value as the type of the field it is for: dataclasses, tuples and paths come back."""
    if is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return kind(**{f.name: _typed(kinds[f.name], value[f.name]) for f in fields(kind) if f.name in value})  # type: ignore[operator]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, str) and Path in options and str not in options:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _seconds(folder: Path) -> float:
    path = folder / "seconds.json"
    return read_json(path)["seconds"] if path.exists() else 0.0


def _device() -> str:
    devices = jax.devices()
    count = os.cpu_count() if devices[0].platform == "cpu" else len(devices)
    return f"{devices[0].device_kind} x {count}"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
