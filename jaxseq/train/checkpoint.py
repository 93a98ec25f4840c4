"""Checkpoints: atomic, asynchronous, the last few kept; what does not fit or cannot be read says so in one line."""

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from .config import CheckpointConfig
from .paths import PyTree, named_leaves


class Checkpoints:
    """The checkpoints of one run, `folder/STEP` each; a context manager, since leaving waits for the last save.

    A state is any named tuple with a field `params`. The parameters are stored apart from the rest, so that they can
    be read without knowing the optimizer, together with a table of every array's shape and dtype. `best`, another tree
    of arrays with a name, is kept beside the state where there is one.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig | None = None):
        self.config = config or CheckpointConfig()
        self.folder = Path(folder).absolute()
        with _unheard():
            options = ocp.CheckpointManagerOptions(max_to_keep=self.config.keep)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, best: PyTree = None, best_name: str | None = None) -> None:
        """Start writing; the arrays may be donated as soon as this returns. A step already there is left alone."""
        if step == self.latest_step:
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state, best).items()}
        arrays = ocp.args.JsonSave(_table(state, best, best_name))
        self._manager.save(step, args=ocp.args.Composite(**items, arrays=arrays))

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore_latest(
        self, abstract_state: Any, abstract_best: PyTree = None, best_name: str | None = None
    ) -> tuple[Any, PyTree] | None:
        """State and best of the latest step, None when there is none, laid out as the shardings of both say.

        Raises:
          ValueError: the checkpoint is of another config (names the first array that differs), or cannot be read
            (names its folder and the last one that can).
        """
        step = self.latest_step
        if step is None:
            return None
        try:
            table = _read(self._manager, step, arrays=ocp.args.JsonRestore()).arrays
            difference = _difference(table, _table(abstract_state, abstract_best, best_name))
            if not difference:
                return self._restore(step, abstract_state, abstract_best)
        except _UnreadableError as reason:
            way_out = self._way_out(step, abstract_state, abstract_best)
            raise ValueError(
                f"{self.folder / str(step)} is corrupt ({reason}); remove that folder to {way_out}."
            ) from None
        raise ValueError(f"{self.folder / str(step)} is a checkpoint of another config: {difference}.")

    def _restore(self, step: int, *abstract) -> tuple[Any, PyTree]:
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(*abstract).items()}
        read = _read(self._manager, step, **items)
        return read.training._replace(params=read.parameters), read.best if "best" in items else None

    def _way_out(self, step: int, *abstract) -> str:
        """What removing a corrupt step leads to; an earlier step is offered only when it can be read."""
        for earlier in sorted(self._manager.all_steps(), reverse=True):
            if earlier < step:
                with contextlib.suppress(_UnreadableError):
                    self._restore(earlier, *abstract)
                    return f"resume from step {earlier}"
        return "start from the beginning (no earlier one can be read)"


def restore_parameters(folder: str | Path) -> PyTree:
    """The parameters of the latest checkpoint in a run's checkpoint folder, on one device: nested dictionaries.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the latest checkpoint cannot be read.
    """
    folder, device = Path(folder).absolute(), SingleDeviceSharding(jax.local_devices()[0])
    none = FileNotFoundError(f"There is no checkpoint in {folder}.")
    if not folder.is_dir():
        raise none
    with _unheard(), ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise none
        try:
            table = _read(manager, step, arrays=ocp.args.JsonRestore()).arrays
            entries = {path: entry for path, entry in table.items() if path.startswith("params/")}
            leaves = {path: jax.ShapeDtypeStruct(*entry, sharding=device) for path, entry in entries.items()}
            params = _nested(leaves)["params"]
            return _read(manager, step, parameters=ocp.args.StandardRestore(params)).parameters
        except _UnreadableError as reason:
            path = folder / str(step)
            raise ValueError(f"{path} is corrupt ({reason}); remove that folder to use an earlier one.") from None


class _UnreadableError(Exception):
    """Some file of a checkpoint is missing or damaged."""


def _read(manager: ocp.CheckpointManager, step: int, **items):
    """Items of a step; whatever damaged files make the many readers raise is one error with its reason."""
    with _unheard():
        try:
            return manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            reason = f"{type(error).__name__}: {first_line[:100]}"
        # When one read fails the others are abandoned, and each prints a page once collected: here, after they ended.
        time.sleep(0.5)
        gc.collect()
    raise _UnreadableError(reason)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep what Orbax logs about damaged files, and what its abandoned reads print, from burying our one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    hook, levels = sys.unraisablehook, [logger.level for logger in loggers]
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from the paths of their leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for key in folders:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def _items(state, best) -> dict[str, PyTree]:
    """What is stored apart."""
    items = {"parameters": state.params, "training": state._replace(params=None)}
    return items if best is None else items | {"best": best}


def _table(state, best, best_name: str | None) -> dict[str, list]:
    leaves = named_leaves(state) | named_leaves({} if best is None else {f"best {best_name}": best})
    return {path: [list(x.shape), str(x.dtype)] for path, x in leaves.items()}


def _difference(stored: dict[str, list], wanted: dict[str, list]) -> str | None:
    """The first array that differs, in words; parameters come before what the optimizer keeps about them."""
    show = lambda entry: f"{entry[1]}{tuple(entry[0])}" if entry else "nothing"
    paths = sorted({**wanted, **stored}, key=lambda path: not path.startswith("params"))
    for path in paths:
        if stored.get(path) != wanted.get(path):
            return f"{path} is {show(stored.get(path))} there and {show(wanted.get(path))} here"
    return None
