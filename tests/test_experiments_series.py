"""Forecasts, classes, anomalies and motion at toy size, as a user runs them."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import by_default

from experiments import anomaly
from jaxseq.data import Recording
from jaxseq.models import named_forecaster


def test_forecasting_of_ones_own_table(run_here, tmp_path):
    """The steps after the last row, in the units and times of the table; a bad table in one line."""
    table, out = tmp_path / "table.csv", tmp_path / "r"
    hours = np.datetime64("2020-01-01T00:00:00") + np.arange(300) * np.timedelta64(3600, "s")
    rows = [f"{str(hour).replace('T', ' ')},{100 + n % 24},{np.sin(n):.3f}" for n, hour in enumerate(hours)]
    table.write_text("\n".join(["date,load,oil", *rows]))
    command = ("experiments.forecasting", "--preset", "debug", "--data.csv", str(table), "--horizon", "6")
    command = (*command, "--models", "season,rlinear,itransformer,chimera-trend", "--data.marks", "--horizons", "3")
    command = (*command, "--model.inverted", "mingru", "--variates", "0.5")
    done = run_here(*command, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "300 rows of 2 variates (load, oil)" in done.stdout and f"{out / 'forecast.csv'} is by " in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert set(result["measured"]["mse"]) == {"season", "rlinear", "itransformer", "chimera-trend"}
    assert result["by_horizon"]["6"]["mse"] == result["measured"]["mse"] and set(result["by_horizon"]) == {"6", "3"}
    with open(out / "forecast.csv") as file:
        forecast = list(csv.DictReader(file))
    assert [row["date"] for row in forecast][:2] == ["2020-01-13 12:00:00", "2020-01-13 13:00:00"]
    assert len(forecast) == 6
    assert all(90 < float(row["load"]) < 130 for row in forecast)
    assert (out / "plots" / "forecast.png").stat().st_size > 1000

    table.write_text("\n".join(["date,load,oil", *rows, "2020-01-13 12:00:00,100,0.5"]))
    refused = run_here(*command, "--out", str(out))  # a table that has grown is another one
    assert refused.returncode == 2 and "began with another table" in refused.stderr
    table.write_text("date,load\n2020-01-01,1\n2020-01-01,2\n")
    refused = run_here(*command, "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "comes twice" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_motion_from_a_sensor(run, tmp_path):
    """Of the synthetic sensor, and of a recording without positions for a while; what is in the table stays."""
    command = ("experiments.sensor_to_state", "--preset", "debug", "--out", str(tmp_path / "r"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert set(result["baseline"]) == {"no motion", "mean velocity"} and set(result["errors"]) == {"hiss", "flat"}
    assert set(result["parts"]) == {"error beside the flat model", "time beside the flat model"}
    assert (tmp_path / "r" / "plots" / "motion.png").stat().st_size > 1000
    (tmp_path / "r" / "result.json").unlink()
    assert run(*command).returncode == 0
    assert json.loads((tmp_path / "r" / "result.json").read_text())["errors"] == result["errors"]

    times, recording = 10**18 + 5_000_000 * np.arange(1000), tmp_path / "flight"
    recording.mkdir()
    sensors = np.concatenate([times[:, None], np.random.default_rng(0).standard_normal((1000, 6))], axis=1)
    np.savetxt(recording / "imu0_data.csv", sensors, delimiter=",", header="t,w,w,w,a,a,a", fmt=["%d"] + ["%.6f"] * 6)
    known = np.concatenate([times[:400:8], times[600::8]])
    moved = np.stack([known, *np.sin([known * 1e-9, known * 2e-9, known * 3e-9])], axis=1)
    np.savetxt(recording / "leica0_data.csv", moved, delimiter=",", header="t,x,y,z", fmt=["%d"] + ["%.6f"] * 3)
    options = ("--data.path", str(recording), "--data.train-seconds", "3", "--data.test-seconds", "1.5")
    done = run(*command[:-1], str(tmp_path / "s"), *options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert "ahead of all" in result["parts"] and all(np.isfinite(x) for x in result["measured"].values())
    refused = run(*command[:-1], str(tmp_path / "t"), "--data.path", str(recording))
    assert refused.returncode == 2 and "overlap the first to train on" in refused.stderr
    refused = run(*command[:-1], str(tmp_path / "t"), *options[:-1], "1.9")
    assert refused.returncode == 2 and f"the validation part of {recording} has 3 chunks" in refused.stderr


@pytest.mark.parametrize("part", by_default([], ["rules and a model", "chimera"]))
def test_series_are_classified(run, part, tmp_path):
    """Of two channels and unequal lengths; what a kill left is found again; a bad file in one line."""
    out, rng = tmp_path / "r", np.random.default_rng(0)
    row = lambda label: ":".join(
        ",".join(f"{x:.3f}" for x in rng.standard_normal(9 + label) / 4 + label) for _ in range(2)
    )
    for split in ("TRAIN", "TEST"):
        cases = [f"{row(n % 2)}:{('low', 'high')[n % 2]}" for n in range(12)]
        header = "@timeStamps false\n@classLabel true low high\n@data\n"
        (tmp_path / f"toy_{split}.ts").write_text(header + "\n".join(cases))
    command = ("experiments.series_classification", "--preset", "debug", "--data.path", str(tmp_path))
    command = (*command, "--data.name", "toy", "--models", "lstm" if part != "chimera" else "chimera,chimera-time")
    done = run(*command, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert set(result["baseline"]) == {"majority", "nearest series", "ridge regression"}
    assert result["baseline"]["majority"] == 0.5 and result["baseline"]["ridge regression"] > 0.9
    assert (out / "plots" / "accuracy.png").stat().st_size > 1000
    assert set(result["threshold"]) == ({"the better rule"} if part == "chimera" else set())

    (out / "result.json").unlink()
    assert run(*command, "--out", str(out)).returncode == 0
    assert json.loads((out / "result.json").read_text())["parameters_digest"] == result["parameters_digest"]
    (tmp_path / "toy_TRAIN.ts").write_text("no series")
    refused = run(*command, "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "comes before @data" in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_anomalies_are_scored(run, tmp_path):
    """By errors of forecasts and by rules; what a kill left is found again; a bad file in one line."""
    (tmp_path / "real").mkdir()
    hours = np.datetime64("2020-01-01T00:00:00") + np.arange(240) * np.timedelta64(3600, "s")
    times = [str(hour).replace("T", " ") for hour in hours]
    for name, spike in (("a", 200), ("b", 999)):
        values = [np.sin(n / 4) + 5 * (n in (spike, spike + 2)) for n in range(240)]
        rows = [f"{time},{value:.4f}" for time, value in zip(times, values, strict=True)]
        (tmp_path / "real" / f"{name}.csv").write_text("\n".join(["timestamp,value", *rows]))
    labels = tmp_path / "combined_windows.json"
    labels.write_text(json.dumps({"real/a.csv": [[times[198], times[203]]], "real/b.csv": []}))
    out = tmp_path / "r"
    command = ("experiments.anomaly", "--preset", "debug", "--data.path", str(tmp_path))
    done = run(*command, "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    rules = {"random", "last value", "moving z-score", "a day before", "nearest window"}
    assert set(result["baseline"]) == rules and set(result["measured"]) == {"s4d"}
    assert all(0 <= row["AP"] <= row["AUROC"] <= 1 for row in result["baseline"].values())
    # Of 204 points 6 are marked: the two spikes, and what follows each, are the largest of steps.
    assert result["baseline"]["last value"]["AUROC"] > 0.8
    assert (out / "plots" / "scores.png").stat().st_size > 1000
    assert set(json.loads((out / "table.json").read_text())["s4d"]) == {"0", "1"}

    (out / "result.json").unlink()
    assert run(*command, "--out", str(out)).returncode == 0
    assert json.loads((out / "result.json").read_text())["measured"] == result["measured"]
    labels.write_text(json.dumps({"real/a.csv": [[times[203], times[198]]]}))
    refused = run(*command, "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "a window of real/a.csv begins at" in refused.stderr
    assert refused.stderr.count("\n") == 1


def recording(values, fitted=0, calibrated=0, dates=None):
    values = np.asarray(values, np.float32)[:, None]
    return Recording("r", values, np.zeros(len(values), bool), fitted, calibrated, dates)


def test_a_row_is_scored_by_all_its_forecasts(key):
    """Of every seed and recording, from windows that end before it, by a loop over windows."""
    config = anomaly.Config(seeds=2, lookback=4, horizon=2, stride=1)
    recordings = [recording(np.random.default_rng(n).standard_normal(9 + 3 * n)) for n in range(2)]
    model = named_forecaster(config.model, "rlinear", config.horizon)
    params = jax.vmap(lambda key: model.init(key, jnp.zeros((1, 4, 1))))(jax.random.split(key, 2))
    found = anomaly.errors(config, "rlinear", params, recordings, size=3)
    for seed, scores in enumerate(found):
        own = jax.tree.map(lambda x, seed=seed: x[seed], params)
        for r, score in zip(recordings, scores, strict=True):
            squares = [[] for _ in score]
            windows = np.stack([r.values[start : start + 4] for start in range(len(score) - 5)])
            for start, forecast in enumerate(np.asarray(model.apply(own, windows))):
                for lead, value in enumerate(forecast[:, 0]):
                    squares[start + 4 + lead].append((value - r.values[start + 4 + lead, 0]) ** 2)
            assert np.isnan(score[:4]).all()
            np.testing.assert_allclose(score[4:], [np.mean(each) for each in squares[4:]], rtol=1e-4)


@pytest.mark.slow
def test_the_chain_of_variates(run, tmp_path):
    done = run("experiments.variate_chain", "--preset", "debug", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert set(result["errors"]) == {"coupled", "uncoupled", "time alone", "both directions"}
    assert set(result["milliseconds"]) == {"T", "V"} and len(result["parts"]) == 10
    assert all(set(row) == {"chain", "chain in reverse", "two steps"} for row in result["errors"].values())
    assert (tmp_path / "r" / "plots" / "chain.png").stat().st_size > 1000
