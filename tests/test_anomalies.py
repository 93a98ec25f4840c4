"""Recordings with anomalies: what is read, what is kept apart, and one clear line for each bad file."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxseq.data import nab_recordings, one_class_recordings, pooled, read_table, smd_recordings

DATA = Path(__file__).parents[2] / "shared" / "data"
WINDOW = [["2020-01-02 06:00:00", "2020-01-02 15:30:00"]]


@pytest.fixture
def nab(tmp_path):
    """A folder like a release's, of one series of 40 hours, whose last one comes twice."""

    def write(windows=WINDOW, header="timestamp,value", labels=None) -> Path:
        hours = np.datetime64("2020-01-01T00:00:00") + np.minimum(np.arange(40), 38) * np.timedelta64(3600, "s")
        rows = [f"{str(hour).replace('T', ' ')},{n**2}" for n, hour in enumerate(hours)]
        for folder in ("data/real", "labels"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/real/a.csv").write_text("\n".join([header, *rows]))
        content = json.dumps({"real/a.csv": windows}) if labels is None else labels
        (tmp_path / "labels/combined_windows.json").write_text(content)
        return tmp_path

    return write


def test_a_release_of_the_benchmark(nab):
    """Six rows are not scored, four of them to train on, whose scale is that of all."""
    (recording,) = nab_recordings(nab())
    assert recording.name == "real/a.csv" and (recording.fitted, recording.calibrated) == (4, 6)
    assert np.flatnonzero(recording.anomalous).tolist() == list(range(30, 40))
    squares = np.arange(40.0) ** 2
    np.testing.assert_allclose(recording.values[:, 0], (squares - 3.5) / squares[:4].std(), rtol=1e-6)


@pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")
def test_public_recordings():
    """No anomaly is among what is trained on; of heartbeats all are left out of training but normal ones."""
    recordings = nab_recordings(DATA / "nab", only="realAdExchange")
    assert [len(r.values) for r in recordings] == [1624, 1624, 1538, 1538, 1643, 1643]
    assert not any(r.anomalous[: r.calibrated].any() for r in recordings)
    assert all(0.09 < r.anomalous.mean() < 0.11 for r in recordings)
    beats = one_class_recordings(DATA / "ecg5000", "ECG5000", "1")
    parts = [(r.fitted > 0, r.calibrated > 0, r.anomalous.any()) for r in beats]
    assert [parts.count(x) for x in [(True, True, False), (False, True, False)]] == [97, 49]
    assert [parts.count(x) for x in [(False, False, False), (False, False, True)]] == [146, 104]


def test_windows_and_rows_are_in_utc(nab):
    """A window written with an offset is that of the rows it is in, and values too large are refused."""
    (recording,) = nab_recordings(nab(windows=[["2020-01-02 07:00:00+01:00", "2020-01-02 06:00:00Z"]]))
    assert np.flatnonzero(recording.anomalous).tolist() == [30]
    folder = nab()
    series = folder / "data/real/a.csv"
    series.write_text(series.read_text().replace(",4\n", ",1e300\n"))
    with pytest.raises(ValueError, match="real/a.csv: column 1 holds 1e\\+300; its deviation is not finite"):
        nab_recordings(folder)


def test_machines(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.standard_normal((20, 3)) * 5 + 1, rng.standard_normal((8, 3))
    for part, values in {"train": train, "test": test, "test_label": np.arange(8)[:, None] > 5}.items():
        (tmp_path / part).mkdir()
        np.savetxt(tmp_path / part / "machine-1-1.txt", values, delimiter=",", fmt="%.6f")
    (recording,) = smd_recordings(tmp_path)
    assert recording.name == "machine-1-1" and (recording.fitted, recording.calibrated) == (16, 20)
    assert np.flatnonzero(recording.anomalous).tolist() == [26, 27]
    np.testing.assert_allclose(recording.values[:16].std(axis=0), 1, rtol=1e-4)
    np.savetxt(tmp_path / "test_label" / "machine-1-1.txt", np.arange(8), fmt="%d")
    with pytest.raises(ValueError, match="has to hold a 0 or 1 for each of 8 rows"):
        smd_recordings(tmp_path)
    (tmp_path / "test_label" / "machine-1-1.txt").unlink()
    with pytest.raises(FileNotFoundError, match="test_label/machine-1-1.txt does not exist"):
        smd_recordings(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no machine"):
        smd_recordings(tmp_path / "none")


BAD = {
    "no pair": (dict(windows=[["2020-01-02"]]), "of real/a.csv is no pair of times"),
    "no list": (dict(windows="2020-01-02"), "holds no windows: an object of lists"),
    "end first": (dict(windows=[WINDOW[0][::-1]]), "begins at 2020-01-02 15:30:00 and ends at 2020-01-02 06:00:00"),
    "empty": (dict(windows=[["2021-01-01", "2021-01-02"]]), "has to hold rows after the first 6, and none of these"),
    "early": (dict(windows=[["2020-01-01 02:00:00", "2020-01-01 09:00:00"]]), "after the first 6, and none of these"),
    "no JSON": (dict(labels="{"), "is not valid JSON"),
    "another header": (dict(header="timestamp,load"), "has columns load; its header has to be timestamp,value"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_in_one_line(name, nab):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        nab_recordings(nab(**content))
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(nab, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"combined_windows.json does not exist"):
        nab_recordings(tmp_path / "none")
    folder = nab(labels='{"real/b.csv": []}')
    with pytest.raises(FileNotFoundError, match=r"real/b.csv does not exist"):
        nab_recordings(folder)
    with pytest.raises(ValueError, match="only='tweets' is in none of 1 names, of which 'real/b.csv' is one"):
        nab_recordings(folder, only="tweets")
    with pytest.raises(ValueError, match="unordered='drop'"):
        read_table(folder / "data/real/a.csv", date="timestamp", unordered="drop")


def test_one_class(tmp_path):
    """Of unequal lengths; a class that is none is named."""
    for split in ("TRAIN", "TEST"):
        rows = [f"{n % 3},{','.join(str(n + k) for k in range(5 + n % 2))}" for n in range(12)]
        (tmp_path / f"toy_{split}.txt").write_text("\n".join(rows))
    recordings = one_class_recordings(tmp_path, "toy", "1", calibrate=0.25)
    roles = [(r.fitted > 0, r.calibrated > 0, bool(r.anomalous.any())) for r in recordings]
    assert [roles.count(x) for x in [(True, True, False), (False, True, False), (False, False, True)]] == [3, 1, 8]
    trained = np.concatenate([r.values for r in recordings if r.fitted])
    assert trained.mean() == pytest.approx(0, abs=1e-5) and trained.std() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="normal='7' is no class of toy; choose 0, 1, 2"):
        one_class_recordings(tmp_path, "toy", "7")
    with pytest.raises(ValueError, match=r"calibrate=0.01 of the 4 series of class 1 leaves a part empty"):
        one_class_recordings(tmp_path, "toy", "1", calibrate=0.01)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_pooled_windows_stay_in_their_series(stride):
    """Every row past the lookback is forecast, from its own series alone, where the stride is at most the horizon."""
    parts = [np.full((length, 1), n, np.float32) for n, length in enumerate((9, 4, 12, 6))]
    windows, starts = pooled(parts, 3, 3, stride=stride)
    batch = windows.at(starts)
    assert (batch["inputs"] == batch["targets"][:, :1]).all()
    forecast = np.unique(starts[:, None] + 3 + np.arange(3))
    assert forecast.tolist() == [*range(3, 9), *range(16, 25), *range(28, 31)]
    first = windows.batches(2, 0, starts)(0)["inputs"]
    assert first.shape == (2, 3, 1)
    with pytest.raises(ValueError, match="no series is as long as a window of lookback=9 and horizon=9"):
        pooled(parts, 9, 9)
    with pytest.raises(ValueError, match="stride=0 must be at least 1"):
        pooled(parts, 3, 3, stride=0)
