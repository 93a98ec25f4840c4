"""Tables over time: what is read, how it is split and scaled, and one clear line for each bad table."""

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import forecasting
from jaxseq.data import (
    ETT_HOURLY,
    ETT_MINUTES,
    Borders,
    Table,
    dates_ahead,
    forecasting_series,
    read_table,
    season_length,
    write_forecast,
)
from jaxseq.data.series import time_marks
from jaxseq.data.table import filled_forward
from jaxseq.tasks import lagged_copies, lagged_copies_forecast

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
    steps = read_table(DATA / "daphnet" / "S06R02E0.csv.gz").dates  # 64 a second, in whole milliseconds
    assert dates_ahead(steps, 64)[-1] - steps[-1] == np.timedelta64(1000, "ms")


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_a_table_with_gaps(written, name):
    table = read_table(written(GOOD, name), missing="forward")
    np.testing.assert_array_equal(table.values, [[1.5, 20], [2.5, 21], [2.5, 22]])
    assert table.names == ("load", "oil") and table.dates[1] - table.dates[0] == np.timedelta64(3600, "s")


BAD = {
    "no numbers": ("a,b\nx,y\n", "line 2: 'a' is 'x', which is no number"),
    "gaps": (GOOD, "line 4: 'load' is missing, one of 1 values; fill them, or set missing to 'forward'"),
    "empty column": ("a,b\n1,\n2,\n", "column 'b' holds no numbers"),
    "no rows": ("date,a\n", "has a header and no rows"),
    "empty": ("\n\n", "is empty"),
    "ragged": ("a,b\n1,2\n3\n", "line 3: 1 cells, and 2 in the first row"),
    "binary": (b"PK\0\xff", "is no text"),
    "Cyrillic of Windows": (
        "нет\n1\n".encode("cp1251"),
        "line 1: the byte 0xed is not in utf-8; .* set encoding to its own, as 'cp1252'",
    ),
    "Japanese of Windows": ("a\n1\n2 度\n".encode("cp932"), "line 3: the byte 0x93 is not in utf-8"),
    "infinite": ("a\n1\ninf\n", "line 3: 'a' is 'inf', which is not finite"),
    "twice": ("date,a\n2020-01-01,1\n2020-01-01,2\n", "line 3: 2020-01-01 00:00:00 comes twice"),
    "back": ("date,a\n2020-01-02,1\n2020-01-01,2\n", "line 3: 2020-01-01 00:00:00 comes after 2020-01-02 00:00:00"),
    "a jump": (
        "date,a\n2020-01-01 00:00,1\n2020-01-01 01:00,2\n2020-01-05 01:00,3\n2020-01-05 02:00,4\n",
        "line 4: 2020-01-05 01:00:00 is not 1:00:00 after 2020-01-01 01:00:00, which is .* set uneven to 'keep'",
    ),
    "a month left out": (
        "date,a\n2020-01,1\n2020-02,2\n2020-03,3\n2020-05,4\n",
        "line 5: 2020-05-01 00:00:00 is not 1 month after 2020-03-01 00:00:00",
    ),
    "a holiday": (
        "date,a\n" + "".join(f"2024-01-{day:02},1\n" for day in (2, 3, 4, 5, 8, 9, 10, 11, 12, 16, 17)),
        "line 11: 2024-01-16 00:00:00 is not 1 business day after 2024-01-12 00:00:00",
    ),
    "an empty row": ("a,b\n1,2\n,\n3,4\n", "line 3: 'a' is missing, one of 2 values"),
    "an empty line": ("a\n1\n\n3\n\n \n", "line 3: 'a' is missing, one of 1 values"),
    "nothing but commas": (",\n,\n", "is empty"),
    "a long cell": ("a\n" + "1" * 140_000, "line 2: field larger than field limit"),
    "a long word": ("a\n" + "x" * 1000, "line 2: 'a' is 'x{40}', which is no number"),
    "times in another column": (
        "when,a\n2020-01-01,1\n",
        "'2020-01-01', which is no number; leave_out can name .* or date if",
    ),
    "an index": (",a\n0,1\n1,2\n", "column 1 has no name; call it 'date' if it is of times, and take it out"),
    "two of one name": ("a,b,a\n1,2,3\n", "two columns are called 'a'"),
    "python's own": ("a\n1_000\n", "line 2: 'a' is '1_000', which is no number"),
    "no times": ("date,a\n01.02.2020,1\n", "line 2: '01.02.2020' is no time as 2016-07-01 00:00:00"),
    "dates alone": ("date\n2020-01-01\n", "has no column beside 'date'"),
    "seconds since 1970": (
        "timestamp,a\n1577836800,1\n1577836801,2\n",
        "'timestamp' counts up in plain numbers; write times as 2016-07-01 00:00:00, name the column in leave_out",
    ),
    "two bytes a character": ("a\n1\n".encode("utf-16"), "is no text; save it .* set encoding to its own, as 'utf-16'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_in_one_line(name, written):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        read_table(written(content))
    assert "\n" not in str(error.value)


def stamps(dates) -> str:
    return "date,a\n" + "".join(f"{date},{n}\n" for n, date in enumerate(dates))


EVEN = {
    "hours": (np.arange("2020-02-28T20", "2020-03-01T02", dtype="M8[h]"), ["2020-03-01T02", "2020-03-01T03"]),
    "tenths of a second": (
        np.datetime64("2020-01-01T00:00:00.0") + np.arange(7) * np.timedelta64(100, "ms"),
        ["2020-01-01T00:00:00.7", "2020-01-01T00:00:00.8"],
    ),
    "thirds of a second, rounded": (
        np.datetime64("2020-01-01T00:00:00.000") + np.array([0, 333, 667, 1000, 1333, 1667, 2000], "m8[ms]"),
        ["2020-01-01T00:00:02.333", "2020-01-01T00:00:02.667"],
    ),
    "weeks": (np.arange("2020-01-01", "2020-03-01", 7, dtype="M8[D]"), ["2020-03-04", "2020-03-11"]),
    "months": (np.arange("2020-01", "2021-02", dtype="M8[M]"), ["2021-02-01", "2021-03-01"]),
    "months of 31 days": (np.arange("2020-07", "2020-10", dtype="M8[M]"), ["2020-10-01", "2020-11-01"]),
    "ends of months": (
        np.arange("2020-02", "2020-12", dtype="M8[M]").astype("M8[D]") - 1, ["2020-11-30", "2020-12-31"],
    ),
    "the 30th": (["2021-10-30", "2021-11-30", "2021-12-30", "2022-01-30"], ["2022-02-28", "2022-03-30"]),
    "quarters at noon": (
        [f"{year}-{month}-01 12:00" for year in (2019, 2020) for month in ("01", "04", "07", "10")],
        ["2021-01-01T12", "2021-04-01T12"],
    ),
    "years": ([f"{year}-06-15" for year in range(1890, 1906)], ["1906-06-15", "1907-06-15"]),
    "business days": (
        [day for day in np.arange("2024-01-01", "2024-02-03", dtype="M8[D]") if np.is_busday(day)],
        ["2024-02-05", "2024-02-06"],
    ),
    "two days": (["2020-01-31", "2020-02-01"], ["2020-02-02", "2020-02-03"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EVEN)
def test_even_times_go_on(written, name):
    """What is read without complaint, and the two times that follow it."""
    dates, after = EVEN[name]
    read = read_table(written(stamps(dates))).dates
    assert read.dtype == "datetime64[us]"
    np.testing.assert_array_equal(dates_ahead(read, 2), np.array(after, "datetime64[us]"))
    if len(dates) > 3:  # and a row that is left out is seen
        with pytest.raises(ValueError, match="set uneven to 'keep'"):
            read_table(written(stamps(np.delete(dates, len(dates) // 2))))


def test_uneven_times_may_stay(written):
    """Ahead by the step of most rows; times that were set back are the other argument's."""
    jump = stamps(["2020-01-01T00", "2020-01-01T01", "2020-01-03T00", "2020-01-03T01"])
    read = read_table(written(jump), uneven="keep").dates
    assert dates_ahead(read, 1)[0] == np.datetime64("2020-01-03T02")
    back = stamps(["2020-01-01T00", "2020-01-01T01", "2020-01-01T01", "2020-01-01T00", "2020-01-01T01"])
    assert len(read_table(written(back), unordered="keep").dates) == 5
    with pytest.raises(ValueError, match="uneven='drop'; choose 'raise' or 'keep'"):
        read_table(written(jump), uneven="drop")
    with pytest.raises(ValueError, match="1 times, of which none is later"):
        dates_ahead(read[:1], 1)
    with pytest.raises(ValueError, match="count=-1 must be at least 0"):
        dates_ahead(read, -1)


def test_empty_rows_are_missing_values(written):
    table = read_table(written("a,b\n1,2\n,\n3,4\n\n"), missing="forward")
    np.testing.assert_array_equal(table.values, [[1, 2], [1, 2], [3, 4]])
    table = read_table(written("1\n\n3\n\n\n"), missing="forward")
    np.testing.assert_array_equal(table.values, [[1], [1], [3]])
    table = read_table(written("\na,b\n1,N/A\n#N/A,4\nNULL,5\n"), missing="forward")
    np.testing.assert_array_equal(table.values, [[1, 4], [1, 4], [1, 5]])


def test_times_keep_fractions_and_are_in_utc(written):
    rows = ["2020-01-01T00:00:00.25+01:00", "2019-12-31 23:00:00.5", "2019-12-31T23:00:00.750000Z"]
    dates = read_table(written(stamps(rows))).dates
    np.testing.assert_array_equal(np.diff(dates), [np.timedelta64(250, "ms")] * 2)
    assert dates[0] == np.datetime64("2019-12-31T23:00:00.25")


@pytest.mark.parametrize("name", ["Date", "TIME", "timestamp", "DateTime"])
def test_the_column_of_times_is_found(written, name):
    table = read_table(written(f"a,{name}\n1,2020-01-01\n2,2020-01-02\n"))
    assert table.names == ("a",) and table.dates[1] == np.datetime64("2020-01-02")


def test_the_column_of_times_may_be_named(written):
    """One called `time` is a variate where it does not rise from row to row."""
    table = read_table(written("time,when\n0.5,2020-01-01\n1.0,2020-01-02\n"), date="when")
    assert table.names == ("time",) and table.dates is not None
    table = read_table(written("time,a\n,1\n0.5,1\n1.0,2\n"), missing="forward")
    assert table.names == ("time", "a") and table.dates is None
    with pytest.raises(ValueError, match="has no column 'ds', which date names; choose from time, a"):
        read_table(written("time,a\n0.5,1\n1.0,2\n"), date="ds")


@pytest.mark.parametrize("encoding", ["cp1251", "cp932", "utf-16", "utf-8-sig"])
def test_an_encoding_may_be_named(written, encoding):
    assert read_table(written("да,a\n1,2\n".encode(encoding)), encoding=encoding).names == ("да", "a")


def test_columns_may_be_left_out(written):
    """By names with commas between on the command line: words, times written in other ways, and all of them."""
    path = written("date,site,load,oil\n1.2.20,north,1,2\n2.2.20,south,3,4\n")
    table = forecasting.DataConfig(csv=path, leave_out="site, date").read(0)
    assert table.names == ("load", "oil") and table.dates is None
    np.testing.assert_array_equal(table.values, [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="no column 'cite', which leave_out names; choose from date, site, load, oil"):
        read_table(path, leave_out=["cite"])
    with pytest.raises(TypeError, match="leave_out='site' is one name"):
        read_table(path, leave_out="site")
    with pytest.raises(ValueError, match="has no column beside 'date', 'site', 'load', 'oil'"):
        read_table(path, leave_out=["oil", "date", "load", "site"])


def test_wrong_arguments_are_named(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; name a table"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="is a folder; name a table"):
        read_table(tmp_path)
    with pytest.raises(ValueError, match="encoding='cp99' is none that Python knows"):
        read_table(written(GOOD), encoding="cp99")
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


@pytest.mark.parametrize("row", [3, 35])
def test_values_without_a_finite_deviation_are_refused(row):
    """In the rows for training, or in deviations of these."""
    values = np.stack([np.arange(40.0), np.arange(40.0)], axis=1)
    values[row, 1] = 1e300
    with pytest.raises(ValueError, match="'b' holds 1e\\+300; in deviations of the rows for training it is not finite"):
        forecasting_series(Table(values, ("a", "b"), None), 4, 2)


def test_the_forecast_goes_on_in_calendar_months(written, tmp_path):
    """From a table whose column of times is named on the command line."""
    months = np.arange("2020-01", "2023-05", dtype="M8[M]")
    path = written(stamps(months).replace("date,", "when,"))
    table = forecasting.DataConfig(csv=path, date="when").read(0)
    series = forecasting_series(table, 4, 2, forecasting.BORDERS["shares"])
    write_forecast(tmp_path / "forecast.csv", series.latest["inputs"][0, -2:], series)
    lines = (tmp_path / "forecast.csv").read_text().split()
    assert lines == ["date,a", "2023-05-01", "00:00:00,38", "2023-06-01", "00:00:00,39"]


def test_the_forecast_goes_on_from_the_last_row(written, tmp_path):
    """Whatever the parts for training and test; in digits that tell a small movement at a high level."""
    days, a = np.arange("2020-01-01", "2020-02-10", dtype="M8[D]"), 12_345_678 + np.sin(np.arange(40))
    path = written("date,a,b\n" + "".join(f"{days[n]},{a[n]},{2e6 * n}\n" for n in range(40)))
    table = read_table(path)
    series = forecasting_series(table, 4, 2, Borders(20, 5, 5), marks=True)
    assert series.latest["marks"].shape == (1, 4, 4)
    write_forecast(tmp_path / "forecast.csv", series.latest["inputs"][0, -2:], series)
    lines = (tmp_path / "forecast.csv").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines[1:]] == ["2020-02-10", "2020-02-11"]
    cells = np.array([line.split(",")[1:] for line in lines[1:]], float)
    np.testing.assert_allclose(cells[:, 0], a[-2:], rtol=0, atol=1e-3)
    np.testing.assert_allclose(cells[:, 1], [76e6, 78e6], rtol=1e-5)


def test_a_forecast_that_is_none_is_not_written(tmp_path):
    """Of one variate of two, of a batch, or one that diverged; nothing is left behind."""
    table = Table(np.random.default_rng(0).standard_normal((40, 2)), ("a", "b"), None)
    series = forecasting_series(table, 4, 2)
    for scaled, message in (
        (np.zeros((2, 1)), r"scaled has shape \(2, 1\); a forecast is \(steps, 2\)"),
        (np.zeros((1, 2, 2)), r"scaled has shape \(1, 2, 2\)"),
        (np.array([[0.0, np.nan]]), "scaled is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            write_forecast(str(tmp_path / "forecast.csv"), scaled, series)
    assert not any(tmp_path.iterdir())


def test_a_share_of_the_variates():
    """The same for inputs and targets, in their order, another one each step, and a function of the step."""
    table = Table(np.random.default_rng(0).standard_normal((100, 6)), tuple("abcdef"), None)
    windows = forecasting_series(table, 6, 4).train
    whole, some = (windows.batches(8, seed=0, variates=share) for share in (1.0, 0.5))
    at = lambda step: [
        np.flatnonzero([(x == y).all() for y in np.moveaxis(whole(step)["inputs"], 2, 0)])[0]
        for x in np.moveaxis(some(step)["inputs"], 2, 0)
    ]
    assert len(set(at(0))) == 3 and at(0) == sorted(at(0)) and len({tuple(at(step)) for step in range(8)}) > 1
    np.testing.assert_array_equal(some(2)["targets"], whole(2)["targets"][..., at(2)])
    with pytest.raises(ValueError, match=r"variates=1\.5; a share is above 0 and at most 1"):
        windows.batches(8, seed=0, variates=1.5)


def test_what_is_asked_of_forecasters():
    """Of the first horizon, and of the mean where all four were forecast; of a table of one's own no paper's figure."""
    data = replace(forecasting.DataConfig(), csv=Path("ETTh1.csv.gz"))
    config = forecasting.Config(horizon=96, horizons=(192, 336, 720), data=data)
    mse = {"last value": 1.0, "dlinear": 0.4, "itransformer": 0.39, "chimera": 0.41}
    asked = forecasting.asked(config, mse, {name: 0.45 for name in mse})
    assert asked["itransformer: the paper's of 96 and 3 %"] == (0.39, round(1.03 * 0.386, 6))
    assert asked["chimera: the paper's of 96, 192, 336, 720 and 3 %"] == (0.45, round(1.03 * 0.405, 6))
    assert asked["chimera: the best linear map and 3 %"] == (0.41, 0.412) and len(asked) == 7
    own = replace(config, horizons=(), data=replace(data, csv=Path("mine.csv")))
    assert set(forecasting.asked(own, mse, mse)) == {name for name in asked if "paper" not in name}


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


def test_minutes_have_a_mark_where_they_change():
    """Hourly tables have the four marks of old, at half past too."""
    quarters = np.arange("2016-07-01T12:00", "2016-07-01T14:00", 15, dtype="datetime64[m]").astype("datetime64[us]")
    marks = time_marks(quarters)
    assert marks.shape == (8, 5)
    np.testing.assert_allclose(marks[:, 0], np.array([0, 15, 30, 45] * 2) / 59 - 0.5, atol=1e-6)
    np.testing.assert_array_equal(marks[::4, 1:], time_marks(quarters[::4]))
    np.testing.assert_array_equal(time_marks(quarters[2::4]), time_marks(quarters[::4]))
    assert ETT_MINUTES == (34560, 11520, 11520)


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


def test_no_forecast_of_copies_is_better_than_the_one_that_knows_the_delays():
    """At first its errors are the noise; later too nothing linear in the window is left in them."""
    x = lagged_copies(0, 4000, num_series=6, num_roots=2, max_delay=5)
    seen = x[np.arange(3980)[:, None] + np.arange(5)]
    after = x[np.arange(3980)[:, None] + 5 + np.arange(8)]
    forecast = jax.jit(partial(lagged_copies_forecast, horizon=8, seed=0, length=4000, num_roots=2, max_delay=5))
    error = after - forecast(jnp.asarray(seen, jnp.float32))
    np.testing.assert_allclose((error[:, 0] ** 2).mean(axis=0), [0.36] * 2 + [0.09] * 4, rtol=0.1)
    window, error = seen.reshape(3980, -1), error.reshape(3980, -1)
    left = error - window @ np.linalg.lstsq(window, error, rcond=None)[0]
    assert (left.var(axis=0) >= 0.97 * error.var(axis=0)).all()


def test_the_floor_of_copies_is_in_deviations():
    """As forecasts of the experiment's models are; the next step of each copy is known up to the noise."""
    config = forecasting.PRESETS["debug"]
    series = forecasting_series(config.data.read(0), 24, 8)
    batch = series.test.at(np.arange(series.test.number))
    error = forecasting.floor(config, series)((), batch, None)[:, 0] - batch["targets"][:, 0]
    np.testing.assert_allclose(np.mean((error * series.deviation[None])[:, 4:] ** 2), 0.09, rtol=0.1)


@pytest.mark.parametrize(
    "first, step, most, season",
    [
        ("2020-01-01T00", "1 h", 96, 24), ("2020-01-01T00:00", "15 m", 96, 96), ("2020-01-01T00:00", "1 m", 96, 60),
        ("2020-01-01", "1 D", 96, 7), ("2020-01-07", "7 D", 96, 52), ("2020-01-07", "7 D", 20, None),
        ("2020-01", "1 M", 96, 12), ("2020-01", "3 M", 96, 4), ("2020-01-01T00:00:00", "1 s", 96, None),
    ],
)  # fmt: skip
def test_the_season_of_a_step(first, step, most, season):
    size, unit = step.split()
    assert season_length(np.datetime64(first, unit) + int(size) * np.arange(60), most) == season


def test_a_working_week_is_a_season():
    days = np.busday_offset(np.datetime64("2020-01-01"), np.arange(60), roll="forward")
    assert season_length(days, 96) == 5


@pytest.mark.parametrize("sign", [";", "\t"])
def test_other_separators_are_named(tmp_path, sign):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(sign.join(row) for row in (("date", "a"), ("2020-01-01", "0,5"))))
    with pytest.raises(ValueError, match=f"has {sign!r} between its columns; save it with commas".replace("\\", r"\\")):
        read_table(path)
