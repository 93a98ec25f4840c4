"""Metrics on disk: one JSON object a line, and the same as TensorBoard events."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from .files import finite, write_text


class MetricsWriter:
    """Appends to `folder/metrics.jsonl` and `folder/tensorboard`; a context manager.

    Training that goes on from `step` repeats what came after it, so those rows are dropped first: the curve is that of
    an unbroken run. Evaluations of `step` itself are repeated too. With None every row stays. With `part`, the name of
    one of several models of a run, splits are called `split/part`, and rows of the others stay.
    """

    def __init__(
        self, folder: str | Path, *, step: int | None = None, tokens_per_step: int | None = None, part: str = ""
    ):
        self._path, self._suffix = Path(folder) / "metrics.jsonl", f"/{part}" if part else ""
        self._tokens_per_step = tokens_per_step
        if step is not None and self._path.exists():
            train = f"train{self._suffix}"
            stays = lambda row: (
                not row["split"].endswith(self._suffix)
                or row["step"] < step
                or (row["step"] == step and row["split"] == train)
            )
            write_text(self._path, "".join(_line(row) for row in filter(stays, read_metrics(folder))))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=step + 1 if step else None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        self._events.close()

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        split += self._suffix
        row: dict[str, Any] = {"step": step, "split": split}
        if self._tokens_per_step:
            row["tokens"] = step * self._tokens_per_step
        self._file.write(_line(row | metrics))
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(f"{split}/{name}", value, step)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of `folder/metrics.jsonl`; a line that a kill cut short is left out."""
    rows = []
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"
