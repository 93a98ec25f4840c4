"""The time in which activity forgets itself."""

import numpy as np
import pytest
from scipy.signal import lfilter

from jaxseq.analysis import autocorrelation, autocorrelation_timescale


def decaying(tau, steps=100_000, seed=0):
    """A process whose autocorrelation is e^{−k/τ}."""
    a = np.exp(-1 / tau)
    noise = np.random.default_rng(seed).standard_normal(steps)
    return lfilter([np.sqrt(1 - a**2)], [1, -a], noise)


@pytest.mark.parametrize("tau", [5, 20, 50])
@pytest.mark.parametrize("model", ["single", "best"])
def test_the_time_constant_is_found(tau, model):
    """Within a tenth, of 10⁵ steps."""
    found = autocorrelation_timescale(decaying(tau), 4 * tau, model=model)
    assert found.tau == pytest.approx(tau, rel=0.1)


def test_two_time_constants_are_told_from_one():
    """A sum of two independent processes: the better model has two, near theirs; noise at lag 0 can be left out."""
    x = decaying(3) + decaying(60, seed=1)
    found = autocorrelation_timescale(x, 200)
    assert len(found.taus) == 2
    assert found.taus[0] == pytest.approx(3, rel=0.3) and found.taus[1] == pytest.approx(60, rel=0.3)
    noisy = decaying(20) + np.random.default_rng(2).standard_normal(100_000)
    assert autocorrelation_timescale(noisy, 80, model="single", least_lag=1).tau == pytest.approx(20, rel=0.15)


def test_autocorrelation_is_its_definition():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 50))
    centred = x - x.mean(axis=1, keepdims=True)
    expected = [np.mean([np.mean(row[: 50 - k] * row[k:]) / np.mean(row**2) for row in centred]) for k in range(8)]
    np.testing.assert_allclose(autocorrelation(x, 7), expected, atol=1e-12)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: autocorrelation(x, 30), "max_lag=30; of 30 steps it is 1 to 29"),
        (lambda x: autocorrelation(0 * x, 5), "constant or not finite"),
        (lambda x: autocorrelation_timescale(x, 10, model="triple"), "model='triple'; choose one of single"),
        (lambda x: autocorrelation_timescale(x, 3), "least_lag=0 to max_lag=3 are too few lags for 4 numbers"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.random.default_rng(0).standard_normal(30))
