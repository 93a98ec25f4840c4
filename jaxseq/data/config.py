"""Which text, from a command line's words."""

from dataclasses import dataclass
from pathlib import Path

from ..fields import check_counts
from .corpus import Corpus


@dataclass(frozen=True)
class TextConfig:
    """The text: the Python standard library's source files, unless a path or a TensorFlow Datasets name is given."""

    path: Path | None = None
    """A text file, or a folder of them (.gz, .bz2 and .xz are unpacked)."""
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
        """The documents, split by file."""
        if self.path is not None and self.tfds is not None:
            raise ValueError(f"data.path={self.path} and data.tfds={self.tfds} are both given; choose one.")
        if self.tfds is not None:
            return Corpus.from_tfds(self.tfds)
        return Corpus.standard_library() if self.path is None else Corpus.from_path(self.path)
