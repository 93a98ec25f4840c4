"""Series with one label each, in the files of the UCR and UEA archives."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .labelled import Labelled
from .scale import deviations
from .table import archive_text, filled_forward, number

ENDINGS = (".ts", ".txt", ".tsv")


class SeriesSet(NamedTuple):
    """Series to train and to test on, channels of mean 0 and variance 1 in the first, and the classes by name."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]


class _Series(NamedTuple):
    line: int
    values: np.ndarray  # T F, NaN where a value is missing
    label: str


def labelled_series(
    folder: str | os.PathLike[str], name: str, *, missing: str = "raise", test_share: float = 0.5, seed: int = 0
) -> SeriesSet:
    """The set of a name in a folder: `NAME_TRAIN` and `NAME_TEST`, ending in .ts, .txt or .tsv, which may be gzipped.

    A `.ts` file has headers that begin with @ and after `@data` a series a line, its channels between colons, the label
    last; the others have a series of one channel a line, the label first, between commas, tabs or blanks. Series may
    differ in length: values that are missing in all channels up to the end are none, as the files of 2018 fill rows up
    to one length. Any other that is `missing` raises, or takes the last value before it ("forward"). Where there is no
    test file, `test_share` of each class, drawn by `seed`, are left out of training to be one. A channel that never
    changes in training is shifted and not scaled.

    Raises:
      FileNotFoundError: no file to train on is there.
      ValueError: a file is no such file, two series differ in channels, a value is missing, no number or too large, a
        class is not in what is trained on, or `test_share` leaves nothing to train or test on.
    """
    folder = Path(folder).expanduser()
    if missing not in ("raise", "forward"):
        raise ValueError(f"missing={missing!r}; choose 'raise' or 'forward'.")
    train_file = _found(folder, f"{name}_TRAIN")
    if train_file is None:
        raise FileNotFoundError(f"{folder} has no {name}_TRAIN ending in {', '.join(ENDINGS)}, gzipped or not.")
    train, test_file = _read(train_file, missing), _found(folder, f"{name}_TEST")
    classes = tuple(sorted({series.label for series in train}, key=_order))
    if test_file is None:
        train, test = _split(train, classes, test_share, seed, train_file)
    else:
        test = _read(test_file, missing)
    channels, place = train[0].values.shape[1], {label: n for n, label in enumerate(classes)}
    for series in test:
        where = f"{test_file or train_file}, line {series.line}"
        if series.values.shape[1] != channels:
            raise ValueError(f"{where}: {series.values.shape[1]} channels, and {channels} to train on.")
        if series.label not in place:
            raise ValueError(f"{where}: no series to train on is of the class {series.label!r}.")
    steps = np.concatenate([series.values for series in train])
    mean, deviation = steps.mean(axis=0), deviations(steps, str(train_file))
    length = max(len(series.values) for series in (*train, *test))

    def padded(part: list[_Series]) -> Labelled:
        inputs = np.zeros((len(part), length, channels), np.float32)
        for row, series in zip(inputs, part, strict=True):
            row[: len(series.values)] = (series.values - mean) / deviation
        labels, lengths = [place[s.label] for s in part], [len(s.values) for s in part]
        return Labelled(inputs, np.array(labels, np.int32), np.array(lengths, np.int32))

    return SeriesSet(padded(train), padded(test), classes)


def _found(folder: Path, stem: str) -> Path | None:
    paths = (folder / f"{stem}{ending}{zipped}" for ending in ENDINGS for zipped in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _order(label: str) -> tuple:
    """Numbers by size, before words."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def _read(path: Path, missing: str) -> list[_Series]:
    text = archive_text(path)
    found = _of_headers(path, text) if path.name.removesuffix(".gz").endswith(".ts") else _of_rows(path, text)
    if not found:
        raise ValueError(f"{path} holds no series.")
    filled = []
    for series in map(_ended, found):
        if series.values.shape[1] != (channels := found[0].values.shape[1]):
            raise ValueError(
                f"{path}, line {series.line}: {series.values.shape[1]} channels, and {channels} in the first series."
            )
        empty = np.isnan(series.values)
        if empty.all(axis=0).any():
            raise ValueError(f"{path}, line {series.line}: channel {empty.all(axis=0).argmax() + 1} has no values.")
        if empty.any() and missing == "raise":
            raise ValueError(
                f"{path}, line {series.line}: {empty.sum()} values are missing; fill them, or set missing to 'forward'."
            )
        filled.append(series._replace(values=filled_forward(series.values)))
    return filled


def _ended(series: _Series) -> _Series:
    """Without the steps at the end that hold nothing; with all of them where none holds anything."""
    held = np.flatnonzero(~np.isnan(series.values).all(axis=1))
    return series._replace(values=series.values[: held[-1] + 1 if len(held) else None])


def _of_headers(path: Path, text: str) -> list[_Series]:
    headers: dict[str, list[str]] = {}
    series = []
    for line, row in enumerate(text.splitlines(), 1):
        row = row.strip()
        if not row or row.startswith("#"):
            continue
        if row.startswith("@"):
            key, *words = row[1:].split()
            headers[key.lower()] = words
            if key.lower() == "data":
                _check_headers(path, headers)
        elif "data" not in headers:
            raise ValueError(f"{path}, line {line}: {row[:30]!r} comes before @data; is it a .ts file?")
        else:
            *channels, label = row.split(":")
            label, known = label.strip(), headers["classlabel"][1:]
            if not channels:
                raise ValueError(f"{path}, line {line}: a series has its label after a colon; there is none.")
            if known and label not in known:
                raise ValueError(f"{path}, line {line}: {label!r} is none of the classes {', '.join(known)}.")
            values = [_numbers(path, line, channel.split(",")) for channel in channels]
            if len(lengths := sorted({len(x) for x in values})) > 1:
                raise ValueError(f"{path}, line {line}: channels of {lengths[0]} and of {lengths[-1]} values.")
            series.append(_Series(line, np.stack(values, axis=1), label))
    if "data" not in headers:
        raise ValueError(f"{path} has no line @data; is it a .ts file?")
    return series


def _check_headers(path: Path, headers: dict[str, list[str]]) -> None:
    says = lambda key: [word.lower() for word in headers.get(key, [])[:1]] == ["true"]
    if says("timestamps"):
        raise ValueError(f"{path} has times beside its values; save them at equal steps, with @timeStamps false.")
    if not says("classlabel"):
        raise ValueError(f"{path} has no classes; @classLabel true is followed by their names.")


def _of_rows(path: Path, text: str) -> list[_Series]:
    series = []
    for line, row in enumerate(text.splitlines(), 1):
        if not row.strip():
            continue
        # An empty cell between two commas or tabs is a value that is missing; blanks may come several in a row.
        between = next((sign for sign in (",", "\t") if sign in row), None)
        label, *cells = (cell.strip() for cell in row.split(between))
        if not cells:
            raise ValueError(f"{path}, line {line}: a series has values after its label; there are none.")
        if not label:
            raise ValueError(f"{path}, line {line}: a series has its label first; the cell is empty.")
        order = _order(label)
        named = f"{order[1]:g}" if order[0] == 0 else label  # 1.0000000e+00 is class 1
        series.append(_Series(line, _numbers(path, line, cells)[:, None], named))
    return series


def _numbers(path: Path, line: int, cells: list[str]) -> np.ndarray:
    values = np.empty(len(cells))
    for n, cell in enumerate(cells):
        try:
            values[n] = number(cell)
        except ValueError:
            raise ValueError(f"{path}, line {line}: {cell.strip()[:40]!r} is no number.") from None
    if np.isinf(values).any():
        raise ValueError(f"{path}, line {line}: a value is not finite.")
    return values


def _split(series: list[_Series], classes, test_share: float, seed: int, path: Path):
    """Of each class a share for the test, at least one series of it left to train on."""
    if not 0 < test_share < 1:
        raise ValueError(f"test_share={test_share}; a share is above 0 and below 1.")
    rng, train, test = np.random.default_rng(seed), [], []
    for label in classes:
        of_class = [s for s in series if s.label == label]
        order = rng.permutation(len(of_class))
        cut = min(round(test_share * len(of_class)), len(of_class) - 1)
        test += [of_class[n] for n in order[:cut]]
        train += [of_class[n] for n in order[cut:]]
    if not test:
        raise ValueError(f"test_share={test_share} of the {len(series)} series of {path} leaves none to test on.")
    return train, test
