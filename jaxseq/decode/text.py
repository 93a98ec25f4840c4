"""Between text and tokens, as they are drawn."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..data import BEGIN, encode


class Text(NamedTuple):
    """How text becomes tokens and tokens text, and the token that ends it."""

    encode: Callable[[str], np.ndarray]
    decode: Callable[[list[int]], str]
    stop: int | None

    def pieces(self, blocks: Iterable[np.ndarray]) -> Iterator[str]:
        """The text of tokens that arrive in blocks, up to the end; a character is handed over once it is whole."""
        tokens: list[int] = []
        shown, text = 0, ""
        for block in blocks:
            produced = block.tolist()
            ended = self.stop is not None and self.stop in produced
            tokens += produced[: produced.index(self.stop)] if ended else produced
            text = self.decode(tokens)
            whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
            yield text[shown:whole]
            shown = max(shown, whole)
            if ended:
                break
        yield text[shown:]


def byte_text() -> Text:
    """The bytes of UTF-8 themselves, as `jaxseq.data` has them; a document ends where another begins."""
    return Text(encode, lambda tokens: bytes(tokens).decode(errors="replace"), BEGIN)
