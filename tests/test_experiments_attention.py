"""Attention and its approximations at toy size, as a user runs them."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import efficient_transformers


@pytest.mark.slow
def test_errors_of_approximations(run, tmp_path):
    done = run("experiments.approximations", "--preset", "debug", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    errors = json.loads((tmp_path / "r" / "result.json").read_text())["errors"]
    performer, reformer = errors["performer, size 0.5"], errors["reformer"]
    assert performer["16"] < performer["8"] and reformer["2"] < reformer["1"] and set(errors["linformer"]) == {"2", "8"}
    assert (tmp_path / "r" / "plots" / "approximations.png").stat().st_size > 1000


@pytest.mark.slow
def test_spans_of_attention_side_by_side(run, texts, tmp_path):
    """All schedules go on from one model; their costs are counted, and what was scored stays."""
    command = ("experiments.mixed_spans", "--preset", "debug", "--data.path", str(texts), "--out", str(tmp_path / "r"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    table = result["table"]
    assert set(table) == {"full", "local", "spread", "bottom"}  # of two layers there are two
    seen = {"full": 32 * 33 // 2, "local": 8 * 10 + 28 * 4}  # blocks of 4, and the block before
    assert table["local"]["multiply-adds"] == seen["local"] / seen["full"]
    assert table["spread"]["multiply-adds"] == pytest.approx((1 + table["local"]["multiply-adds"]) / 2)
    assert table["full"]["cache"] == 1 and table["spread"]["cache"] == (32 + 8) / 64
    assert (tmp_path / "r" / "plots" / "positions.png").stat().st_size > 1000

    (tmp_path / "r" / "result.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "r" / "nats").iterdir()}
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert json.loads((tmp_path / "r" / "result.json").read_text())["parameters_digest"] == result["parameters_digest"]
    refused = run(*command[:-1], str(tmp_path / "s"), "--span", "16")
    assert refused.returncode == 2 and "must be more than two spans of 16" in refused.stderr


@pytest.mark.slow
def test_training_on_subsets_and_reading_ensembles(run, texts, tmp_path):
    """One training goes from subsets to all sources; each model is read densely, by a draw and by ensembles."""
    command = ("experiments.subsampled_attention", "--preset", "debug", "--data.path", str(texts), "--seeds", "1")
    done = run(*command, "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert set(result["table"]) == {"dense-0", "subsets-0", "tuned-0"}
    assert all(set(row) == {"dense", "one", "2", "3"} for row in result["table"].values())
    assert result["measured"]["saved, scores"] == 4
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    last = {row["split"]: row["step"] for row in rows if row["split"].startswith("train/")}
    assert last == {"train/dense-0": 4, "train/subsets-0-3": 4}  # as many steps
    assert (tmp_path / "r" / "plots" / "ensembles.png").stat().st_size > 1000
    refused = run(*command, "--ratio", "5", "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "ratio=5 does not divide data.context=32" in refused.stderr


@pytest.mark.slow
def test_efficient_transformers_in_one_table(run, texts, tmp_path):
    """Two mixers, at two lengths and on two tasks; what is in the table is not measured again."""
    command = ("experiments.efficient_transformers", "--preset", "debug", "--data.path", str(texts))
    command = (*command, "--out", str(tmp_path / "r"), "--mixers", "attention,linformer")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert set(result["table"]) == {"attention", "linformer"} and set(result["times"]) == {"16", "32"}
    assert all(row["training_ms"] > 0 for rows in result["times"].values() for row in rows.values())
    assert all(0 <= row["recall"] <= 1 and 0 < row["text bits"] < 10 for row in result["table"].values())
    assert (tmp_path / "r" / "plots" / "efficient_transformers.png").stat().st_size > 1000

    (tmp_path / "r" / "result.json").unlink()
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "r" / "result.json").read_text())["times"] == result["times"]
    refused = run(*command[:-1], "transformer")
    assert refused.returncode == 2 and "none is called 'transformer'; choose attention, longformer" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_efficient_transformers_of_the_presets_sizes(preset):
    """Every mixer can be built and read, on the text, on the task, and where it is timed."""
    config = efficient_transformers.PRESETS[preset]
    lengths = {config.data.context: 257, config.recall.length: config.recall.vocabulary, max(config.lengths): 257}
    for name, (length, vocabulary) in itertools.product(efficient_transformers.KINDS, lengths.items()):
        model = efficient_transformers.build(config, name, length, vocabulary)
        tokens = jnp.zeros((1, length), jnp.int32)
        with jax.numpy_dtype_promotion("standard"):  # flax's own norms promote
            logits = jax.eval_shape(lambda key, m=model, x=tokens: m.init_with_output(key, x)[0], jax.random.key(0))
        assert logits.shape == (1, length, vocabulary), name
