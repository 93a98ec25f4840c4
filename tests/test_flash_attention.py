"""Which blocks of queries and keys meet, and in which of them nothing needs a mask."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxseq.ops.flash_attention import Sight

REACH = st.none() | st.integers(0, 70)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(0, 60), REACH, REACH, st.sampled_from([16, 32]), st.booleans())
def test_blocks_that_meet(queries, past, behind, ahead, size, segments):
    """Spans follow one another, hold every pair that is seen, and are clear where each query sees each key."""
    keys = past + queries
    sight = Sight(past, keys, behind, ahead, None, segments)
    rows, columns = (-(-length // size) for length in (queries, keys))
    lag = past + np.arange(rows * size)[:, None] - np.arange(columns * size)
    seen = (np.arange(columns * size) < keys) & (lag <= (lag if behind is None else behind))
    seen &= -lag <= (-lag if ahead is None else ahead)
    blocks = seen.reshape(rows, size, columns, size).transpose(0, 2, 1, 3)
    for of, met in ((blocks, sight.keys_met), (blocks.swapaxes(0, 1), sight.queries_met)):
        for i, row in enumerate(of):
            spans = met(np.int32(i), size)
            assert all(int(a.stop) == int(b.start) for a, b in itertools.pairwise(spans))
            for j, block in enumerate(row):
                (clear,) = [span.clear for span in spans if span.start <= j < span.stop] or [None]
                assert block.any() <= (clear is not None)
                assert bool(clear) == (block.all() and not segments)
