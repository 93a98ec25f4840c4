"""What general compressors make of the same bytes: the baselines of a language model's bits per byte."""

import lzma
import zlib
from collections.abc import Callable, Iterable, Sequence

from .corpus import Document, joined
from .text import evaluation_windows


def baselines(documents: Sequence[Document], length: int) -> dict[str, float]:
    """Bits per byte of zlib and lzma at their strongest, on the evaluation windows each alone and on the text whole.

    `zlib`, `lzma`: each window of `length` bytes compressed by itself, all windows' bits over all windows' bytes.
    `zlib_whole`, `lzma_whole`: the documents end to end, as one file would be. Everything written is counted: headers
    and checksums of zlib (6 bytes) and .xz (about 60). Windows go through lzma raw, with no container: on so few bytes
    it would be most of the figure.

    Raises:
      ValueError: `length` below 1, or less text than one window.
    """
    windows = [window.tobytes() for window in evaluation_windows(documents, length)]
    raw = [{"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, length)}]
    return {
        "zlib": _bits_per_byte(_zlib, windows),
        "lzma": _bits_per_byte(lambda text: lzma.compress(text, lzma.FORMAT_RAW, filters=raw), windows),
        "zlib_whole": _bits_per_byte(_zlib, [joined(documents)]),
        "lzma_whole": _bits_per_byte(lambda t: lzma.compress(t, preset=9 | lzma.PRESET_EXTREME), [joined(documents)]),
    }


def _zlib(text: bytes) -> bytes:
    return zlib.compress(text, level=9)


def _bits_per_byte(compress: Callable[[bytes], bytes], texts: Iterable[bytes]) -> float:
    sizes = [(len(compress(text)), len(text)) for text in texts]
    return 8 * sum(after for after, _ in sizes) / sum(before for _, before in sizes)
