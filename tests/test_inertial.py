"""Inertial recordings: chunks, what is moved in them, and one line for each bad table; the synthetic sensor."""

import gzip
from dataclasses import replace

import jax
import numpy as np
import pytest
from recorded import REFERENCE

from experiments import sensor_to_state
from jaxseq.data import Table, foretold_readings, inertial_motion, inertial_recordings
from jaxseq.tasks import drifting_sensor

DATA = REFERENCE.parent / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the public data sets are not beside the repository")


def write(folder, imu, position, imu_name="imu0_data.csv"):
    line = lambda row: ",".join(map(str, row))
    (folder / imu_name).parent.mkdir(parents=True, exist_ok=True)
    (folder / imu_name).write_text("\n".join(["#timestamp,w,w,w,a,a,a", *map(line, imu)]))
    with gzip.open(folder / "leica0_data.csv.gz", "wt") as file:
        file.write("\n".join(["#timestamp,x,y,z", *map(line, position)]))
    return folder


def samples(count, step=5_000_000, start=10**18):
    return [(start + n * step, *(0.1 * n + c for c in range(6))) for n in range(count)]


def positions(at, start=10**18):
    return [(start + int(1e9 * t), 2 * t, -t, 0.0) for t in at]


def test_what_is_moved_in_each_chunk(tmp_path):
    """2 m/s and −1 m/s; nothing is known across a gap of 0.3 s, or beyond the last position."""
    known = np.concatenate([np.arange(0, 0.3, 0.04), np.arange(0.6, 0.9, 0.04)])
    imu = [*samples(200), ("remark", "", "", "", "", "", ""), ("", "", "", "", "", "", "")]
    motion = inertial_motion(write(tmp_path, imu, positions(known), "mav0/imu0/data.csv"), chunk=10)
    assert motion.inputs.shape == (19, 10, 12) and motion.skipped == 2
    np.testing.assert_allclose(motion.seconds, 0.05 * np.arange(19), atol=1e-6)
    inside = [n for n in range(19) if 0.05 * (n + 1) <= 0.28 or (0.05 * n >= 0.6 - 1e-9 and 0.05 * (n + 1) <= 0.88)]
    np.testing.assert_allclose(motion.targets[inside], [[0.1, -0.05, 0]] * len(inside), atol=1e-5)
    assert np.isnan(np.delete(motion.targets, inside, axis=0)).all()
    np.testing.assert_allclose(motion.inputs[3, 2, :6], 3.2 + np.arange(6), rtol=1e-6)
    np.testing.assert_allclose(motion.inputs[3, 2, 6:], 0.1, rtol=1e-4)
    assert motion.names == ("w", "w", "w", "a", "a", "a", *["step of w"] * 3, *["step of a"] * 3)


@pytest.mark.parametrize(
    "imu, position, message",
    [
        (samples(50)[:20] + samples(50)[25:], positions([0, 1]), "misses samples: 45 of them, 0.030 s apart"),
        (samples(50) + samples(1), positions([0, 1]), "has a time twice"),
        ([(*row[:5], 9.8, row[6]) for row in samples(50)], positions([0, 1]), "imu0_data.csv: 'a' never changes"),
        (
            [*samples(50)[:7], (10**18 + 35_000_000, *"12", "nan", *"123")],
            positions([0, 1]),
            "line 9: 'w' is missing or",
        ),
        (samples(50), [*positions([0]), (10**18 + 1, 1, "inf", 1)], "leica0_data.csv.gz, line 3: 'y' is missing or"),
        ([(1, 2, 3)] * 5, positions([0, 1]), "has 0 rows of 7 numbers"),
        (samples(50), positions([0]), "has 1 rows of 4 numbers"),
    ],
)
def test_bad_tables_are_named(imu, position, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        inertial_motion(write(tmp_path, imu, position))


def test_what_is_missing_or_too_small_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds none of mav0/imu0/data.csv"):
        inertial_motion(tmp_path)
    with pytest.raises(ValueError, match="chunk=0"):
        inertial_motion(tmp_path, chunk=0)
    body = gzip.compress(b"1,2,3,4,5,6,7\n" * 500)
    for damaged in (b"no gzip", body[:20] + b"\xff" * 20 + body[40:], body[:-9]):
        (tmp_path / "imu0_data.csv.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match="imu0_data.csv.gz is damaged"):
            inertial_motion(tmp_path)


def test_a_channel_that_never_changes_in_training_is_named(tmp_path):
    """It would be divided by zero; and so would a sensor that stands still."""
    still = [(*row[:4], 0.0 if n < 300 else n, *row[5:]) for n, row in enumerate(samples(600))]
    data = sensor_to_state.DataConfig(chunks=5, train_seconds=1.0, test_seconds=1.0)
    config = lambda: sensor_to_state.Config(data=replace(data, path=tmp_path))
    write(tmp_path, still, positions(np.arange(0, 3, 0.05)))
    with pytest.raises(ValueError, match="in data.train_seconds=1.0 from the start 'a' never changes"):
        sensor_to_state.recorded(config())
    write(tmp_path, samples(600), positions(np.arange(1.5, 3, 0.05)))
    with pytest.raises(ValueError, match="in data.train_seconds=1.0 from the start no motion is known"):
        sensor_to_state.recorded(config())


def test_many_recordings(tmp_path):
    """Each is cut by time; all are trained on, in the scale of all."""
    for n in range(2):
        write(tmp_path / f"flight {n}", samples(600 + 200 * n), positions(np.arange(0, 4, 0.05)))
    folders = inertial_recordings(tmp_path)
    assert [folder.name for folder in folders] == ["flight 0", "flight 1"]
    assert inertial_recordings(folders[0]) == folders[:1]
    data = sensor_to_state.DataConfig(path=tmp_path, chunks=5, train_seconds=1.0, test_seconds=1.0)
    found = sensor_to_state.recorded(sensor_to_state.Config(data=data))
    # Chunks of 50 ms: 20 to train on from each, 19 and 39 between, the last 21.
    assert [len(inputs) for inputs, _ in found] == [32, 10, 8]
    first, second = found.test[0][0], found.test[0][4]
    assert np.abs(first - second).max() > 0.1
    with pytest.raises(FileNotFoundError, match="and its folders hold none of mav0/imu0/data.csv"):
        inertial_recordings(tmp_path / "flight 2")


def test_readings_are_foretold(tmp_path):
    """The change of each channel's mean to the next chunk; a table is one recording, cut by its times."""
    values = np.random.default_rng(0).standard_normal((206, 2))
    times = np.datetime64("1970-01-01T00:04:40") + np.arange(206) * np.timedelta64(20, "ms")
    motion = foretold_readings(Table(values, ("a", "b"), times), chunk=10)
    assert motion.inputs.shape == (19, 10, 4) and motion.names == ("a", "b", "step of a", "step of b")
    np.testing.assert_allclose(motion.targets[3], values[40:50].mean(axis=0) - values[30:40].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(motion.inputs[3, 0, 2:], values[30] - values[29], atol=1e-6)
    np.testing.assert_allclose(motion.seconds, 0.2 * np.arange(19))
    rows = (f"{time},{a},{b},0" for time, (a, b) in zip(times, values, strict=True))
    (tmp_path / "gait.csv").write_text("\n".join(["timestamp,a,b,label", *rows]))
    data = sensor_to_state.DataConfig(
        csv=tmp_path / "gait.csv", leave_out="label", chunks=3, train_seconds=2.0, test_seconds=0.6
    )
    found = sensor_to_state.recorded(sensor_to_state.Config(data=data))
    assert [len(inputs) for inputs, _ in found] == [8, 1, 1] and found.test[1].shape == (1, 3, 2)
    with pytest.raises(ValueError, match="no column of times"):
        foretold_readings(Table(values, ("a", "b"), None))
    with pytest.raises(ValueError, match="has 206 rows; two chunks of 104"):
        foretold_readings(Table(values, ("a", "b"), times), chunk=104)


def test_how_far_is_the_length_of_where(tmp_path):
    write(tmp_path, samples(200), positions(np.arange(0, 1, 0.05)))
    data = sensor_to_state.DataConfig(path=tmp_path, target="distance")
    (motion,) = sensor_to_state.motions(data).values()
    np.testing.assert_allclose(motion.targets[2:8], [[0.05 * 5**0.5]] * 6, rtol=1e-4)


@pytest.mark.parametrize("name", sensor_to_state.KINDS)
def test_every_kind_reads_once_a_chunk(name):
    config = replace(sensor_to_state.PRESETS["debug"], width=8)
    model, x = sensor_to_state.build(config, name, 3), jax.ShapeDtypeStruct((2, 20, 6), np.float32)
    assert jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], x).shape == (2, 5, 3)
    flat = {"hiss": {"flat"}, "hiss-s4-mamba": {"flat-s4", "flat-mamba"}, "flat-lstm": set()}
    assert sensor_to_state.flat_of(name) == flat.get(name, sensor_to_state.flat_of(name))


@pytest.mark.parametrize("tracker", ["vicon0", "state_groundtruth_estimate0"])
def test_other_trackers(tmp_path, tracker):
    """What a room has in place of leica0, with more columns behind the position."""
    write(tmp_path, samples(200), positions(np.arange(0, 1, 0.05)), "mav0/imu0/data.csv")
    expected = inertial_motion(tmp_path)
    (tmp_path / "leica0_data.csv.gz").unlink()
    rows = [",".join(map(str, (*row, 1, 0, 0, 0))) for row in positions(np.arange(0, 1, 0.05))]
    path = tmp_path / "mav0" / tracker / "data.csv"
    path.parent.mkdir()
    path.write_text("\n".join(["#timestamp,p,p,p,q,q,q,q", *rows]))
    np.testing.assert_array_equal(inertial_motion(tmp_path).targets, expected.targets)


@needs_data
def test_the_recorded_flight():
    """184 s at 200 Hz, with seven rows of remarks at the end; the numbers of the file beside it."""
    motion, other = inertial_motion(DATA / "euroc_imu"), np.load(DATA / "euroc_imu" / "euroc_sequence.npz")
    assert motion.skipped == 7 and motion.inputs.shape == (3681, 10, 12)
    sensors = np.concatenate([other["gyro"], other["acc"]], axis=1)[:36810].reshape(3681, 10, 6)
    np.testing.assert_allclose(motion.inputs[..., :6], sensors, rtol=1e-5, atol=1e-6)
    moved = np.nansum(motion.targets[20:1000], axis=0)
    apart = [np.interp(motion.seconds[n], other["leica_t"], other["leica_pos"][:, 0]) for n in (20, 1000)]
    if not np.isnan(motion.targets[20:1000]).any():
        np.testing.assert_allclose(moved[0], apart[1] - apart[0], atol=1e-2)


def test_the_synthetic_sensor():
    """Velocities of variance 1, that change slowly and that the sensor tells much of; one function of the key."""
    x, y = drifting_sensor(jax.random.key(0), num_examples=256, length=400, chunk=10)
    assert x.shape == (256, 400, 12) and y.shape == (256, 40, 2)
    assert float((y**2).mean()) == pytest.approx(1, abs=0.1)
    assert np.corrcoef(y[:, 1:].ravel(), y[:, :-1].ravel())[0, 1] > 0.8
    means = np.asarray(x[..., :6]).reshape(256, 40, 10, 6).mean(axis=2).reshape(-1, 6)
    residual = np.linalg.lstsq(means, np.asarray(y).reshape(-1, 2), rcond=None)[1].sum() / np.asarray(y).size
    assert residual < 0.7
    np.testing.assert_allclose(x[:, 1:, 6:], np.diff(x[..., :6], axis=1), atol=1e-6)
    np.testing.assert_array_equal(drifting_sensor(jax.random.key(0), num_examples=256)[0], x)
    with pytest.raises(ValueError, match="length=15 is no multiple of chunk=10"):
        drifting_sensor(jax.random.key(0), num_examples=1, length=15)
