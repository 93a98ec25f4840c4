"""Which text or table, from a command line's words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..fields import check_counts
from .corpus import Corpus
from .table import Table, read_table


@dataclass(frozen=True)
class TextConfig:
    """The text: the Python standard library's source files, unless a path or a TensorFlow Datasets name is given."""

    path: Path | None = None
    """A text file, or a folder of them (.gz, .bz2, .xz and .zip are unpacked)."""
    tfds: str | None = None
    """A TensorFlow Datasets text set."""
    context: int = 1024
    """Bytes in a window, in training and in evaluation."""
    packed: bool = False
    """Keep documents apart in training: the state restarts at each one's beginning."""
    evaluation_windows: int = 16
    """Windows of the validation split used while training; the test split is always used whole."""

    def __post_init__(self):
        check_counts(self, "context", "evaluation_windows", section="data.")

    def corpus(self) -> Corpus:
        """The documents, split by file or by the names of files."""
        if self.path is not None and self.tfds is not None:
            raise ValueError(f"data.path={self.path} and data.tfds={self.tfds} are both given; choose one.")
        if self.tfds is not None:
            return Corpus.from_tfds(self.tfds)
        return Corpus.standard_library() if self.path is None else Corpus.from_path(self.path)


@dataclass(frozen=True)
class TableConfig:
    """A table of one's own, as `read_table` takes it."""

    csv: Path | None = None
    """A table separated by commas, which may be gzipped."""
    date: str | None = None
    """The column of times; where none is given one called date, time, timestamp or datetime, if there is one."""
    leave_out: str = ""
    """Columns by name, with commas between them, that are not read."""
    encoding: str = "utf-8"
    """What the table is written in: cp1252, cp1251 or cp932, say, where it is not UTF-8."""
    missing: Literal["raise", "forward"] = "raise"
    """Whether missing values are an error, or the last ones before them again."""
    unordered: Literal["raise", "keep"] = "raise"
    """Whether times that come twice or go back are an error, or stay, as where clocks were set back."""
    uneven: Literal["raise", "keep"] = "raise"
    """Whether times that step unevenly are an error, or rows are taken as steps all the same."""

    def table(self) -> Table:
        """The table.

        Raises:
          ValueError: there is none, or as `read_table`.
        """
        if self.csv is None:
            raise ValueError("data.csv is needed: a table separated by commas.")
        return read_table(
            self.csv,
            date=self.date,
            leave_out=[name.strip() for name in self.leave_out.split(",")] if self.leave_out else (),
            encoding=self.encoding,
            missing=self.missing,
            unordered=self.unordered,
            uneven=self.uneven,
        )
