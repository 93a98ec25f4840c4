"""Which tokens are associative recall, and how much of a gap they are."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxseq.analysis import bootstrap, gap_closed, recall_hits, share_of_gap, sliced_perplexity


def pair_by_pair(contexts, training, most):
    """The definition: all pairs of positions, and a count of the whole of training for each."""
    hits = np.zeros(contexts.shape, bool)
    known = [tuple(pair) for pair in itertools.pairwise(training.tolist())]
    for row, t in itertools.product(range(len(contexts)), range(1, contexts.shape[1])):
        x, pair = contexts[row].tolist(), tuple(contexts[row, t - 1 : t + 1].tolist())
        earlier = any((x[s - 1], x[s]) == pair for s in range(1, t))
        hits[row, t] = earlier and known.count(pair) <= most
    return hits


def test_planted_pairs_are_found():
    """(7, 8) and (8, 1) are new to training and repeated, (1, 2) is repeated and known, (3, 4) comes once."""
    training = np.array([1, 2, 1, 2, 1, 2, 5, 6, 3, 4])
    contexts = np.array([[7, 8, 1, 2, 3, 4, 7, 8, 1, 2], [7, 8, 0, 0, 0, 9, 9, 1, 7, 8]])
    hits = recall_hits(contexts, training, most=2)
    assert np.argwhere(hits).tolist() == [[0, 7], [0, 8], [1, 4], [1, 9]]  # 0 0 0 holds (0, 0) twice
    assert np.argwhere(recall_hits(contexts, training, most=3)).tolist() == [[0, 7], [0, 8], [0, 9], [1, 4], [1, 9]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 25), st.integers(0, 60), st.integers(1, 6), st.data())
def test_hits_are_those_of_the_definition(seed, rows, length, stream, vocabulary, data):
    rng = np.random.default_rng(seed)
    contexts, training = rng.integers(0, vocabulary, (rows, length)), rng.integers(0, vocabulary, stream)
    most = data.draw(st.integers(0, 5))
    np.testing.assert_array_equal(recall_hits(contexts, training, most=most), pair_by_pair(contexts, training, most))


def test_large_tokens_do_not_overflow_and_small_types_do():
    """Pairs of tokens of a real vocabulary are beyond 32 bits."""
    contexts = np.array([[65_535, 65_534, 3, 65_535, 65_534]], np.uint16)
    assert recall_hits(contexts, contexts[0, :0], most=0).tolist() == [[False] * 4 + [True]]
    assert recall_hits(contexts, np.tile(contexts[0], 3), most=5).sum() == 0


def gaps(seed=0, rows=40, length=30):
    rng = np.random.default_rng(seed)
    hits = rng.random((rows, length)) < 0.2
    reference = rng.exponential(size=(rows, length))
    return rng, hits, reference


def test_masks_are_of_bool_and_tokens_whole_numbers():
    """Numbers 0 and 1 would be taken for rows; other tokens would be cut to whole numbers."""
    _, hits, reference = gaps()
    for call in (
        lambda mask: sliced_perplexity(reference, mask),
        lambda mask: share_of_gap(reference + 1, reference, mask),
    ):
        with pytest.raises(ValueError, match="hits is of int64; it is of bool"):
            call(hits.astype(np.int64))
    with pytest.raises(ValueError, match="where is of float64; it is of bool"):
        gap_closed(reference, reference, reference, where=hits.astype(float))
    with pytest.raises(ValueError, match="contexts is of float64; tokens are whole numbers"):
        recall_hits(np.zeros((1, 3)), np.zeros(3, int), most=1)


def test_share_is_the_equation():
    rng, hits, reference = gaps()
    nats = reference + 0.1 + 2 * hits + 0.01 * rng.standard_normal(hits.shape)
    found = share_of_gap(nats, reference, hits)
    share = hits.mean() * (nats[hits].mean() - reference[hits].mean()) / (nats.mean() - reference.mean())
    assert found["share"].value == pytest.approx(share)
    assert found["tokens"].value == pytest.approx(hits.mean())
    assert found["gap"].value == pytest.approx(nats.mean() - reference.mean())
    assert found["excess"].low > 0.5 and all(x.low <= x.value <= x.high for x in found.values())
    even = share_of_gap(reference + 0.1 + 0.01 * rng.standard_normal(hits.shape), reference, hits)
    assert even["excess"].low < 0 < even["excess"].high


def test_intervals_cover_what_they_promise():
    """Of a mean of normals: 95 % of the intervals hold it, within what 300 draws of 60 contexts allow."""
    rng = np.random.default_rng(0)
    mean = lambda total, count: {"mean": total / count}
    held = 0
    for _ in range(300):
        each = np.stack([1 + rng.standard_normal(60), np.ones(60)], axis=1)
        interval = bootstrap(each, mean, resamples=500)["mean"]
        held += interval.low <= 1 <= interval.high
    assert 0.90 <= held / 300 <= 0.98


def test_groups_are_drawn_whole():
    """Copies of a context in its group tell nothing new: the interval stays as wide."""
    _, hits, reference = gaps()
    nats = reference + np.random.default_rng(1).random(hits.shape)
    alone = share_of_gap(nats, reference, hits)
    copies = [np.repeat(x, 5, axis=0) for x in (nats, reference, hits)]
    grouped = share_of_gap(*copies, groups=np.repeat(np.arange(len(hits)), 5))
    apart = share_of_gap(*copies)
    width = lambda found: found["gap"].high - found["gap"].low
    assert width(grouped) == pytest.approx(width(alone)) and width(apart) < 0.6 * width(alone)


def test_closed_gap_and_perplexity():
    _, hits, reference = gaps()
    assert gap_closed(reference, reference + 1, reference).value == pytest.approx(1)
    assert gap_closed(reference + 0.25, reference + 1, reference).value == pytest.approx(0.75)
    half = gap_closed(reference + np.where(hits, 0.5, 1), reference + 1, reference, where=hits)
    assert half == pytest.approx((0.5, 0.5, 0.5))  # of the hits alone, and so is every resample
    found = sliced_perplexity(np.where(hits, 1.0, 2.0), hits)
    assert found["hits"] == pytest.approx(np.e) and found["other"] == pytest.approx(np.e**2)
    assert np.isnan(sliced_perplexity(reference, np.zeros_like(hits))["hits"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, m: recall_hits(x[0], x[0], most=1), "contexts has shape"),
        (lambda x, m: recall_hits(-1 - x, x[0], most=1), "is negative; tokens are 0 or more"),
        (lambda x, m: recall_hits(x, x[0], most=-1), "most=-1"),
        (lambda x, m: share_of_gap(x[:2], x, m), r"nats \(2, 3\), reference \(4, 3\)"),
        (lambda x, m: share_of_gap(x, x, m, groups=np.zeros(4, int)), "groups: 1; a bootstrap takes two"),
        (lambda x, m: share_of_gap(x, x, m, groups=np.arange(3)), r"groups has shape \(3,\); there are 4"),
        (lambda x, m: gap_closed(x, x, x, resamples=1), "resamples: 1"),
        (lambda x, m: gap_closed(x, x, x, where=m[:1]), r"where \(1, 3\)"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(12).reshape(4, 3), np.zeros((4, 3), bool))
