"""Tables over time: what is read, how it is split and scaled, and one clear line for each bad table."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxseq.data import ETT_HOURLY, Borders, Table, forecasting_series, read_table
from jaxseq.data.series import time_marks
from jaxseq.data.table import filled_forward
from jaxseq.tasks import lagged_copies

DATA = Path(__file__).parents[2] / "shared" / "data"
public = pytest.mark.skipif(not DATA.exists(), reason="the public data sets are not beside the repository")
GOOD = "date,load,oil\n2020-01-01 00:00:00,1.5,20\n2020-01-01 01:00:00,2.5,21\n2020-01-01 02:00:00,,22\n"


@pytest.fixture
def written(tmp_path):
    def write(content: str | bytes, name="table.csv"):
        path = tmp_path / name
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@public
def test_public_tables():
    """Numbers of windows as published for the hourly transformers; a table without header; one in another encoding."""
    electricity = read_table(DATA / "ett" / "ETTh1.csv.gz")
    assert electricity.names == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    series = forecasting_series(electricity, 96, 96, ETT_HOURLY, marks=True)
    assert [part.number for part in (series.train, series.validation, series.test)] == [8449, 2785, 2785]
    rates = read_table(DATA / "exchange_rate" / "exchange_rate.txt.gz")
    assert rates.values.shape == (7588, 8) and rates.dates is None
    weather = read_table(DATA / "weather_part" / "weather.csv.gz")
    assert weather.values.shape[1] == 21 and weather.names[1] == "T (degC)"
    illness = read_table(DATA / "illness" / "national_illness.csv.gz")
    assert illness.values.shape == (966, 7) and illness.dates[0] == np.datetime64("2002-01-01")


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_table_with_gaps(written, name):
    table = read_table(written(GOOD, name), missing="forward")
    np.testing.assert_array_equal(table.values, [[1.5, 20], [2.5, 21], [2.5, 22]])
    assert table.names == ("load", "oil") and table.dates[1] - table.dates[0] == np.timedelta64(3600, "s")


BAD = {
    "no numbers": ("a,b\nx,y\n", "line 2: 'a' is 'x', which is no number"),
    "gaps": (GOOD, "line 4: 'load' is missing, one of 1 values; fill them, or choose missing='forward'"),
    "empty column": ("a,b\n1,\n2,\n", "column 'b' holds no numbers"),
    "no rows": ("date,a\n", "has a header and no rows"),
    "empty": ("\n\n", "is empty"),
    "ragged": ("a,b\n1,2\n3\n", "line 3: 1 cells, and 2 in the first row"),
    "binary": (b"PK\0\1", "is no text"),
    "infinite": ("a\n1\ninf\n", "line 3: 'a' is 'inf', which is not finite"),
    "twice": ("date,a\n2020-01-01,1\n2020-01-01,2\n", "line 3: 2020-01-01 00:00:00 comes twice"),
    "back": ("date,a\n2020-01-02,1\n2020-01-01,2\n", "line 3: 2020-01-01 00:00:00 comes after 2020-01-02 00:00:00"),
    "no times": ("date,a\n01.02.2020,1\n", "line 2: '01.02.2020' is no time as 2016-07-01 00:00:00"),
    "dates alone": ("date\n2020-01-01\n", "has no column beside 'date'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_in_one_line(name, written):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        read_table(written(content))
    assert "\n" not in str(error.value)


def test_wrong_arguments_are_named(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; name a table"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="missing='drop'"):
        read_table(written(GOOD), missing="drop")
    with pytest.raises(ValueError, match="is damaged"):
        path = tmp_path / "cut.gz"
        path.write_bytes(gzip.compress(GOOD.encode())[:-9])
        read_table(path)
    table = Table(np.stack([np.arange(40.0), np.ones(40)], axis=1), ("a", "b"), None)
    with pytest.raises(ValueError, match="'b' never changes in the 28 rows for training"):
        forecasting_series(table, 4, 2)
    table = Table(np.arange(40.0)[:, None], ("a",), None)
    with pytest.raises(ValueError, match="lookback=0 must be at least 1"):
        forecasting_series(table, 0, 2)
    with pytest.raises(ValueError, match="4 rows for validation of 40 are too few for lookback=4 and horizon=5"):
        forecasting_series(table, 4, 5)
    with pytest.raises(ValueError, match="take 14400 rows; the table has 40"):
        forecasting_series(table, 4, 2, ETT_HOURLY)
    with pytest.raises(ValueError, match="marks=True; the table has no dates"):
        forecasting_series(table, 4, 2, marks=True)
    with pytest.raises(ValueError, match="batch_size=99 is more than the 3 windows"):
        forecasting_series(table, 4, 2).validation.batches(99, 0)


def test_later_parts_forecast_nothing_seen_before():
    """Targets of the three parts are disjoint runs of rows, in order; scales are of the first alone."""
    table = Table(np.arange(100.0)[:, None] ** 2, ("a",), None)
    series = forecasting_series(table, 5, 3, Borders(60, 20, 20))
    rows = lambda part: np.sqrt(part.at(np.arange(part.number))["targets"] * series.deviation + series.mean).round()
    for part, (first, last) in zip(series[:3], [(5, 59), (60, 79), (80, 99)], strict=True):
        assert rows(part).min() == first and rows(part).max() == last
    np.testing.assert_allclose(series.train.series.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(series.train.series.std(), 1, atol=1e-6)


def test_batches_are_a_function_of_the_step():
    table = Table(np.random.default_rng(0).standard_normal((100, 3)), ("a", "b", "c"), None)
    batch = forecasting_series(table, 6, 4).train.batches(8, seed=0)
    np.testing.assert_array_equal(batch(13)["inputs"], batch(13)["inputs"])
    assert batch(0)["inputs"].shape == (8, 6, 3) and batch(0)["targets"].shape == (8, 4, 3)
    epoch = np.concatenate([batch(step)["inputs"] for step in range(7)])
    assert len(np.unique(epoch[:, 0, 0])) == 56  # no window twice


def test_marks_of_time():
    """A Friday at noon, and a leap year's last hour."""
    dates = np.array(["2016-07-01T12:00:00", "2016-12-31T23:00:00"], "datetime64[s]")
    np.testing.assert_allclose(time_marks(dates)[0], np.array([12 / 23, 4 / 6, 0 / 30, 182 / 365]) - 0.5, atol=1e-6)
    np.testing.assert_allclose(time_marks(dates)[1], np.array([1, 5 / 6, 1, 1]) - 0.5, atol=1e-6)


@given(st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=1, max_size=20).filter(lambda x: any(x)))
def test_filling_forward(column):
    """Against a loop."""
    values = np.array([np.nan if x is None else x for x in column])[:, None]
    expected, last = [], next(x for x in column if x is not None)
    for x in column:
        last = last if x is None else x
        expected.append(last)
    np.testing.assert_array_equal(filled_forward(values)[:, 0], expected)


def test_copies_follow_their_parents():
    """Each series but the roots is another one of an earlier column, some steps later, up to the noise."""
    x = lagged_copies(0, 3000, num_series=6, num_roots=2, max_delay=5, noise=0.3)
    assert x.shape == (3000, 6)
    np.testing.assert_allclose(x[:, :2].std(axis=0), 1, atol=0.1)
    for n in range(2, 6):
        rest = {(p, d): x[d:, n] - 0.9 * x[:-d, p] for p in range(n) for d in range(1, 6)}
        assert min(r.std() for r in rest.values()) == pytest.approx(0.3, rel=0.05)
    with pytest.raises(ValueError, match="num_roots=9 must be at most num_series=6"):
        lagged_copies(0, 10, num_series=6, num_roots=9)
