"""State spaces, long convolutions and parallel recurrences at toy size, as a user runs them."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import long_range
from jaxseq.train.optimizer import STATE_SPACE


@pytest.mark.slow
def test_long_range_reports_what_it_trained(run, tmp_path):
    """Two models on generated trees, one of them twice: scores, curves, a plot. What a kill left is found again."""
    out = tmp_path / "r"
    options = ("--seeds", "2", "--dropout", "0.2", "--norm", "layer", "--no-prenorm", "--bidirectional")
    command = ("experiments.long_range", "--preset", "debug", "--models", "s4d-lin,lstm", *options, "--out", str(out))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert set(result["measured"]) == {"s4d-lin", "lstm"} and not result["holds"]
    assert [len(result["seeds"][name]) for name in ("s4d-lin", "lstm")] == [2, 1]
    assert (out / "plots" / "accuracy.png").stat().st_size > 1000

    (out / "result.json").unlink()
    shutil.rmtree(out / "checkpoints" / "s4d-lin-1")
    kept = (out / "checkpoints" / "s4d-lin-0" / "4").stat().st_mtime_ns
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert (out / "checkpoints" / "s4d-lin-0" / "4").stat().st_mtime_ns == kept
    assert json.loads((out / "result.json").read_text())["parameters_digest"] == result["parameters_digest"]

    refused = run("experiments.long_range", "--preset", "debug", "--models", "s4x", "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "none is called 's4x'" in refused.stderr


def test_long_range_asks_each_margin_of_the_models_there_are():
    mean = {"s4d-lin": 0.80, "s4d-inv": 0.78, "s4d-legs": 0.76, "s4d-real": 0.71, "s4d-random": 0.70, "s4": 0.79}
    asked = lambda config, scores, half_rate=None: long_range.asked(config, scores, half_rate or {})
    pooled, pixels, speech = (long_range.PRESETS[name] for name in ("cpu", "gpu", "speech"))
    expected = {"over s4d-real": (0.07, 0.08), "over s4d-random": (0.08, 0.04), "over s4": (-0.03, -0.01)}
    assert asked(pooled, mean) == expected
    assert asked(pixels, mean)["s4d-lin"] == (0.8, 0.98)
    assert asked(pooled, {"s4d-lin": 0.9, "lstm": 0.5}) == {}
    half_rate = {"s4d-lin, dt × 1": 0.5, "s4d-lin, dt × 2": 0.75}
    lost = {"s4d-lin": (0.8, 0.9), "lost with dt × 1": (0.3, 0.2), "kept with dt × 2": (-0.05, -0.1)}
    assert asked(speech, {"s4d-lin": 0.8}, half_rate) == lost


def test_long_range_reads_recordings_at_their_rates(tmp_path):
    """Four samples a step where there were two; as many steps as it says."""
    audio = np.random.default_rng(0).integers(-99, 99, 80).astype(np.int16)
    parts = dict(offsets=np.array([0, 40, 80]), digit=np.array([3, 4]), index=np.array([0, 5]))
    np.savez(tmp_path / "fsdd_recordings.npz", audio=audio, **parts)
    data = long_range.DataConfig(task="spoken_digits", path=tmp_path, length=30, keep_every=2)
    (_, test), (_, slower) = data.read(), data.read(slower=2)
    assert test.inputs.shape == (1, data.steps(), 1) and data.steps() == 15 and slower.inputs.shape == (1, 8, 1)
    np.testing.assert_allclose(
        slower.inputs[0, :7], test.inputs[0, :14].reshape(7, 2, 1).mean(axis=1), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("preset", ["gpu", "speech", "listops", "pathfinder"])
def test_long_range_has_the_papers_settings(preset):
    """The models that have their own can be built and trained."""
    config = long_range.PRESETS[preset]
    x = jnp.zeros((1, 16), jnp.int32) if preset == "listops" else jnp.zeros((1, 16, 1))
    for name in ("s4d-lin", "s5", "lru"):
        params = jax.eval_shape(long_range.build(config, name).init, jax.random.key(0), x)
        jax.eval_shape(long_range.optimizer(config, name).init, params)
        leaves = jax.tree.leaves(params["params"]["stack"]["layers"])
        assert {leaf.shape[0] for leaf in leaves} == {config.depth}
    slow = lambda name: bool(re.search(long_range.SLOW.get(config.data.task, STATE_SPACE), f"params/mixer/{name}"))
    assert slow("A_real") and slow("log_step") and slow("log_dt") == (preset != "listops")


@pytest.mark.slow
def test_the_cost_of_a_token_of_a_long_convolution(run, tmp_path):
    done = run("experiments.long_convolution", "--preset", "debug", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    names = {"hyena", "longconv", "language model"}
    assert set(result["milliseconds"]) == names | {"window"}
    assert all(0 < result["measured"][f"largest error, {name}"] < 1e-4 for name in names)
    assert (tmp_path / "r" / "plots" / "milliseconds.png").stat().st_size > 1000


@pytest.mark.slow
def test_parallel_recurrences_beside_the_loop(run, texts, tmp_path):
    """Of a cell as it starts, trained and chaotic, at two lengths, in two forms."""
    command = ("experiments.parallel_rnn", "--preset", "debug", "--cells", "gru", "--data.path", str(texts))
    done = run(*command, "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert len(result["rows"]) == 3 * 2 * 2
    assert all((row["weights"] == "trained") == ("speed" in row) for row in result["rows"])
    tame = [row for row in result["rows"] if row["weights"] != "chaotic"]
    assert all(row["values"] < 1e-5 and row["gradients"] < 1e-4 for row in tame)
    assert not any(row["fell back"] for row in tame if row["form"] == "full")
    assert all(1 < row["iterations"] <= 100 for row in result["rows"])
    assert (tmp_path / "r" / "plots" / "parallel_rnn.png").stat().st_size > 1000
    refused = run(*command[:3], "--cells", "rnn", "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "none is called 'rnn'; choose lstm, gru" in refused.stderr
