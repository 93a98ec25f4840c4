"""Between text and tokens, as they are drawn."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..data import BEGIN, encode


class Text(NamedTuple):
    """How text becomes tokens and tokens text, and the tokens that end it."""

    encode: Callable[[str], np.ndarray]
    decode: Callable[[list[int]], str]
    stops: tuple[int, ...] = ()

    @property
    def stop(self) -> int | None:
        """The first of the tokens that end a text, which decoding itself may stop at."""
        return next(iter(self.stops), None)

    def pieces(self, blocks: Iterable[np.ndarray], prompt: Iterable[int] = ()) -> Iterator[str]:
        """The text of tokens that arrive in blocks after those of a prompt, up to the end.

        A character is handed over once it is whole. All are decoded together, as some tokens are the space between two
        words only where there is one before.
        """
        tokens = [int(token) for token in prompt]
        text = self.decode(tokens) if tokens else ""
        shown = len(text)
        for block in blocks:
            produced = block.tolist()
            end = next((i for i, token in enumerate(produced) if token in self.stops), len(produced))
            tokens += produced[:end]
            text = self.decode(tokens)
            whole = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
            yield text[shown:whole]
            shown = max(shown, whole)
            if end < len(produced):
                break
        yield text[shown:]


def byte_text() -> Text:
    """The bytes of UTF-8 themselves, as `jaxseq.data` has them; a document ends where another begins."""
    return Text(encode, lambda tokens: bytes(t for t in tokens if t != BEGIN).decode(errors="replace"), (BEGIN,))
