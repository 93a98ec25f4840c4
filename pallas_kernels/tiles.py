"""Tile sizes of the kernels: `tiles.json` holds a table for each, with a row for a platform or a kind of device.

A row serves heads, or states of a channel, `up_to` a width, or all of them, and says its reason. What no device has
been measured for comes from the platform's rows. `experiments/tune_kernels.py` measures, and rewrites the file.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

PATH = Path(__file__).with_name("tiles.json")

Row = dict[str, Any]
Table = dict[str, list[Row]]

IN_TIME = {"block": 16, "columns": 16, "warps": 1, "stages": 1, "programs": 1}
BEFORE = {"warps_before": 1, "channels": 16}
BY_TOKEN = {
    "tpu": {"width": 128, "strides": 1},
    "gpu": {"width": 8, "warps": 1, "ahead": 0, "programs": 1},
}

#: What is to be chosen for each kernel on each platform, and the least of it. A program works on a `block` of tokens at
#: once, or of so many `strides`; on `columns` of a matrix state, at most so many `sums` over them, states of so many
#: `heads`, or a `width` of channels, with rows of a stride `ahead` on their way or not, or so many `steps` of a
#: pipeline (0: by Triton instead); it is one of about so many `programs`, with Triton's `warps` and `stages`, and
#: `warps_before` for what is prepared, of so many `channels` at once.
CHOICES: dict[str, dict[str, dict[str, int]]] = {
    "gated_linear_attention_by_key": {"tpu": {"block": 16}, "gpu": IN_TIME | BEFORE},
    "gated_linear_attention_by_value": {"tpu": {"block": 16}, "gpu": IN_TIME},
    "gated_linear_attention_by_head": {"tpu": {"block": 16}, "gpu": IN_TIME | {"sums": 1}},
    "delta_rule": {"tpu": {"block": 16}, "gpu": IN_TIME | BEFORE},
    "dplr_recurrence": {"tpu": {"block": 16}, "gpu": IN_TIME | BEFORE | {"sums": 1}},
    "over_pairs": {"tpu": {"block": 16}, "gpu": {"block": 16, "warps": 1, "stages": 1}},
    "by_token": BY_TOKEN,
    "by_token_backward": BY_TOKEN,
    "in_pipeline": {"gpu": {"steps": 0, "programs": 1}},
    "one_token": {"tpu": {"heads": 1}, "gpu": {"columns": 16, "warps": 1}},
}

_TRIED: ContextVar[Mapping[tuple[str, str], dict[str, int]]] = ContextVar("tried", default=MappingProxyType({}))


def tile(kernel: str, platform: str, width: int) -> dict[str, int]:
    """The choices for heads, or states of a channel, of this width, on the device there is, or on its platform."""
    here = jax.devices()[0]
    serving = [row for row in _read()[kernel] if width <= row.get("up_to", width)]
    of_device = [row for row in serving if here.platform == platform and row["on"] == here.device_kind]
    rows = of_device or [row for row in serving if row["on"] == platform]
    nearest = min(rows, key=lambda row: row.get("up_to", math.inf))
    chosen = {name: nearest[name] for name in CHOICES[kernel][platform]}
    return chosen | _TRIED.get().get((kernel, platform), {})


@contextmanager
def tried(kernel: str, platform: str, **choices: int) -> Iterator[None]:
    """What is traced inside takes these choices instead of the table's."""
    already = _TRIED.get().get((kernel, platform), {})
    token = _TRIED.set({**_TRIED.get(), (kernel, platform): {**already, **choices}})
    try:
        yield
    finally:
        _TRIED.reset(token)


@cache
def _read() -> Table:
    return parsed(PATH.read_text(encoding="utf-8"), str(PATH))


def parsed(text: str, name: str) -> Table:
    """The tables in a text; `name` is what messages call it.

    Raises:
      ValueError: a kernel or one of its platforms has no row, or a row is none of the kind.
    """
    try:
        tables = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON ({error}).") from error
    if not isinstance(tables, dict) or set(tables) != set(CHOICES):
        raise ValueError(f"{name} must hold a table for each of {', '.join(CHOICES)}, and no other.")
    for kernel, rows in tables.items():
        for row in rows:
            _check(row, kernel, name)
        for platform in CHOICES[kernel]:
            if not any(row["on"] == platform and "up_to" not in row for row in rows):
                raise ValueError(f"{name}: {kernel} has no row on {platform!r} that serves every width.")
    return tables


def _check(row: Row, kernel: str, name: str) -> None:
    where, platforms = f"{name}: {kernel} has a row {row}", CHOICES[kernel]
    if not all(isinstance(row.get(word), str) for word in ("on", "reason")):
        raise ValueError(f"{where}; it must say what it is `on` and its `reason`.")
    sizes = {word: size for word, size in row.items() if word not in ("on", "reason", "up_to")}
    fitting = [platforms[row["on"]]] if row["on"] in platforms else list(platforms.values())
    least = next((choices for choices in fitting if set(choices) == set(sizes)), None)
    if least is None:
        raise ValueError(f"{where}; what it chooses must be {' or '.join(map(', '.join, fitting))}.")
    for word, size in (sizes | {"up_to": row.get("up_to", 1)}).items():
        lowest, any_number = least.get(word, 1), word in ("up_to", "stages", "sums", "ahead", "steps")
        if not isinstance(size, int) or size < lowest or (size & (size - 1) and not any_number):
            kind = "whole number" if any_number else "power of two"
            raise ValueError(f"{where}; {word} must be a {kind}, {lowest} at least.")


def rewritten(tables: Table, kernel: str, row: Row) -> Table:
    """The tables with this row, in the place of the one for the same device and widths if there is one."""
    same = lambda other: (other["on"], other.get("up_to")) == (row["on"], row.get("up_to"))
    return tables | {kernel: [other for other in tables[kernel] if not same(other)] + [row]}


def text_of(tables: Table) -> str:
    """What `parsed` reads: a line for a row."""
    lines = {kernel: ",\n".join(f"    {json.dumps(row)}" for row in rows) for kernel, rows in tables.items()}
    return "{\n" + ",\n".join(f'  "{kernel}": [\n{rows}\n  ]' for kernel, rows in lines.items()) + "\n}\n"
