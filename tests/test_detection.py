"""Measures of detected anomalies against their definitions, one point or one pair at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxseq.analysis import alarm_rates, auroc, average_precision, point_adjusted, runs_found

POINTS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda points: len({anomalous for _, anomalous in points}) == 2
)
split = lambda points: (np.array([float(s) for s, _ in points]), np.array([a for _, a in points]))


@given(POINTS)
def test_auroc_is_the_share_of_pairs_in_order(points):
    scores, anomalous = split(points)
    pairs = [(a > b) + (a == b) / 2 for a in scores[anomalous] for b in scores[~anomalous]]
    assert auroc(scores, anomalous) == pytest.approx(np.mean(pairs))


@given(POINTS)
def test_average_precision_is_the_area_under_steps(points):
    """Precision at every threshold, times what it adds to the recall; blind to any rising map of the scores."""
    scores, anomalous = split(points)
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        rates = alarm_rates(scores >= threshold, anomalous)
        area, before = area + (rates.recall - before) * rates.precision, rates.recall
    assert average_precision(scores, anomalous) == pytest.approx(area)
    assert average_precision(np.exp(scores) - 3, anomalous) == pytest.approx(area)


@given(POINTS)
def test_adjusting_fills_the_runs_that_are_found(points):
    """A loop over runs; alarms only grow, and so do recall and F1: false ones stay as they are."""
    alarms, anomalous = split(points)[0] > 4, split(points)[1]
    expected, found, start = alarms.copy(), [], None
    for n, inside in enumerate([*anomalous, False]):
        if inside and start is None:
            start = n
        elif not inside and start is not None:
            found.append(alarms[start:n].any())
            expected[start:n] |= found[-1]
            start = None
    adjusted = point_adjusted(alarms, anomalous)
    np.testing.assert_array_equal(adjusted, expected)
    assert runs_found(alarms, anomalous) == pytest.approx(np.mean(found))
    honest, claimed = alarm_rates(alarms, anomalous), alarm_rates(adjusted, anomalous)
    assert claimed.f1 >= honest.f1 and claimed.false_alarms == honest.false_alarms


def test_adjustment_praises_a_random_score():
    """Alarms on one point in a hundred, anywhere, where a tenth of the points are anomalies in runs of 400."""
    alarms = np.random.default_rng(0).uniform(size=40_000) < 0.01
    anomalous = np.arange(40_000) % 4000 >= 3600
    assert alarm_rates(alarms, anomalous).f1 < 0.03
    assert alarm_rates(point_adjusted(alarms, anomalous), anomalous).f1 > 0.9


def test_rates_of_nothing_are_zero():
    none = np.zeros(3, bool)
    assert alarm_rates(none, none) == (0, 0, 0, 0)
    assert alarm_rates(none, ~none) == (0, 0, 0, 0)
    assert alarm_rates(~none, none).false_alarms == 1


@pytest.mark.parametrize("measure", [auroc, average_precision])
def test_wrong_input_is_named(measure):
    with pytest.raises(ValueError, match="0 of the 3 points are anomalous"):
        measure(np.arange(3.0), np.zeros(3, bool))
    with pytest.raises(ValueError, match="scores holds 1 values that are not finite"):
        measure(np.array([1, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match=r"scores float64 \(3,\), anomalous bool \(2,\): all are of one length"):
        measure(np.arange(3.0), np.array([True, False]))
    with pytest.raises(ValueError, match="anomalous holds no run"):
        runs_found(np.ones(2, bool), np.zeros(2, bool))
