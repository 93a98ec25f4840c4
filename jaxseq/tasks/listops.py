"""ListOps: nested operations on digits, in the format of the Long Range Arena."""

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

#: Tokens are places in this list; 15, after its end, is padding.
VOCABULARY = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
PADDING = len(VOCABULARY)
OPERATIONS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda x: int(median(x)),
    "[SM": lambda x: sum(x) % 10,
}


def listops(
    seed: int,
    num_examples: int,
    *,
    lengths: tuple[int, int] = (500, 2000),
    max_depth: int = 10,
    max_arguments: int = 10,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct trees: tokens `N T` padded to the longest, labels `N` in 0 … 9, and lengths `N`, all int32.

    A node is a digit with probability 3/4, and at `max_depth`; else an operation of 2 to `max_arguments` nodes, with
    an opening and a closing token. Trees of more tokens than `lengths[0]` and fewer than `lengths[1]` are kept (Long
    Range Arena, arXiv 2011.04006, section 2.2.1). The example is a function of the seed; it runs on the host.

    Raises:
      ValueError: a number is too small for any tree.
    """
    least, most = lengths
    if num_examples < 1 or max_depth < 2 or max_arguments < 2 or not 0 <= least < most - 1:
        raise ValueError(
            f"num_examples={num_examples}, lengths={lengths}, max_depth={max_depth}, max_arguments={max_arguments}; "
            "listops takes 1 or more examples, lengths with a whole number between, and at least 2 of the others."
        )
    rng = np.random.default_rng(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(200_000 * num_examples):
        tokens: list[int] = []
        if _grow(rng, tokens, most, max_depth, max_arguments) and least < len(tokens) < most:
            found[tuple(tokens)] = None
        if len(found) == num_examples:
            break
    else:
        raise ValueError(f"lengths={lengths}: hardly any tree of depth {max_depth} is as long; choose other ones.")
    labels = np.array([evaluate(tokens) for tokens in found], np.int32)
    return padded(list(found)), labels, np.array([len(tokens) for tokens in found], np.int32)


def _grow(rng: np.random.Generator, tokens: list[int], most: int, depth: int, arguments: int) -> bool:
    """Append a random node; False once there are too many tokens."""
    if depth == 1 or rng.random() < 0.75:
        tokens.append(int(rng.integers(10)))
        return len(tokens) < most
    tokens.append(10 + int(rng.integers(4)))
    for _ in range(int(rng.integers(2, arguments + 1))):
        if not _grow(rng, tokens, most, depth - 1, arguments):
            return False
    tokens.append(PADDING - 1)
    return len(tokens) < most


def evaluate(tokens: Sequence[int]) -> int:
    """The value of a tree.

    Raises:
      ValueError: the tokens are none.
    """
    stack: list[list] = [[]]
    for token in tokens:
        word = VOCABULARY[token]
        if word in OPERATIONS:
            stack.append([word])
        elif word == "]" and len(stack) > 1 and len(stack[-1]) > 1:
            operation, *values = stack.pop()
            stack[-1].append(OPERATIONS[operation](values))
        elif word.isdigit():
            stack[-1].append(int(word))
        else:
            raise ValueError(f"tokens={tokens} close an operation that has none or no values.")
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"tokens={tokens} are no tree.")
    return stack[0][0]


def padded(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Sequences of tokens `N T`, PADDING after each."""
    rows = np.full((len(sequences), max(map(len, sequences))), PADDING, np.int32)
    for row, tokens in zip(rows, sequences, strict=True):
        row[: len(tokens)] = tokens
    return rows
