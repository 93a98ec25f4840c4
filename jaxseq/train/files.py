"""Files that are whole or absent: written beside their place, then moved into it."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A path to write to; what was written moves into place at the end."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    with atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False, default=str) + "\n")


def read_json(path: Path, remedy: str = "; repair it, or give another --out") -> dict[str, Any]:
    """The object in a JSON file; `remedy` is what to do where there is none.

    Raises:
      ValueError: the file holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}){remedy}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object{remedy}.")
    return value


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An npz file of arrays by name, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def finite(value: Any) -> Any:
    """The value with null for every number JSON has no word for."""
    if isinstance(value, dict):
        return {str(name): finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
