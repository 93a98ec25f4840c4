"""Measures of detected anomalies against their definitions, one point or one pair at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxseq.analysis import alarm_rates, anomaly_scores, auroc, average_precision, point_adjusted, runs_found
from jaxseq.data import Recording

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


def recording(values, fitted=0, calibrated=0, dates=None):
    values = np.asarray(values, np.float32)[:, None]
    return Recording("r", values, np.zeros(len(values), bool), fitted, calibrated, dates)


def test_rules_score_what_they_say():
    """Each by a loop over rows; a fixed weekday's value comes again a day later, where clocks went back too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30)
    (z,) = anomaly_scores.moving_z_score([recording(x)], 4)
    expected = [(x[t] - x[t - 4 : t].mean()) ** 2 / (x[t - 4 : t].var() + 1e-5) for t in range(4, 30)]
    assert np.isnan(z[:4]).all()
    np.testing.assert_allclose(z[4:], expected, rtol=1e-4)
    (near,) = anomaly_scores.nearest_window([recording(x, fitted=12)], 4)
    window = lambda t: x[t - 3 : t + 1]
    distances = [min(np.mean((window(t) - window(s)) ** 2) for s in range(3, 12)) for t in range(3, 30)]
    np.testing.assert_allclose(near[3:], distances, atol=1e-5)
    hours = np.datetime64("2020-01-01T00:00:00") + np.arange(72) * np.timedelta64(3600, "s")
    hours[50] = hours[40]
    (day,) = anomaly_scores.a_day_before([recording(np.arange(72) % 24, dates=hours)], 4)
    assert np.flatnonzero(day[24:]).tolist() == [26]
    whole = [recording(x, fitted=30, calibrated=30), recording(-x, fitted=30, calibrated=30), recording(x)]
    np.testing.assert_allclose(anomaly_scores.mean_series(whole, 4)[2], x.astype(np.float32) ** 2, rtol=1e-5)
    assert anomaly_scores.anomaly_rules(whole) == ["last value", "moving z-score", "mean series", "nearest window"]
