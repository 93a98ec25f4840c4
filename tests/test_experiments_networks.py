"""Recurrent networks and neurons at toy size, as a user runs them."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_labelled import write_digits

from experiments import rich_lazy, timescales
from jaxseq.data import mnist
from jaxseq.train import Curriculum, Run
from jaxseq.train.files import read_arrays

SPIKES = (
    *("experiments.switching_glm", "--seeds", "1", "--training", "2"),
    *("--train.steps", "3", "--train.inner-steps", "2"),
)


SMALL = ("--states", "2", "--data.neurons", "3", "--data.length", "40", "--data.test-sequences", "2")


@pytest.mark.slow
def test_the_switching_glm_reports_and_resumes_fit_by_fit(run, tmp_path):
    out = tmp_path / "run"
    first = run(*SPIKES, *SMALL, "--out", str(out))
    assert first.returncode == 0, first.stderr
    result = json.loads((out / "result.json").read_text())
    assert {"claim", "measured", "baseline", "threshold", "holds", "table", "parameters_digest"} <= set(result)
    assert (out / "plots" / "models.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(result["table"]) == 7 and all(row["loss"] > 0 for row in rows)

    # As a kill before the last fit leaves it: the fits that are there stay, and the result is the same.
    (out / "result.json").unlink()
    (out / "checkpoints" / "one-hot-2-0-3.npz").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "checkpoints").iterdir()}
    again = run(*SPIKES, *SMALL, "--out", str(out))
    assert again.returncode == 0, again.stderr
    assert all((out / "checkpoints" / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert json.loads((out / "result.json").read_text())["parameters_digest"] == result["parameters_digest"]


@pytest.mark.parametrize(
    "test_sequences", ["5", pytest.param("2", marks=pytest.mark.slow)], ids=["too few trials", "fitted"]
)
def test_the_switching_glm_reads_spike_times(run, run_here, test_sequences, tmp_path):
    trials = [f"{n},{trial},{0.1 * i + 0.01 * n}" for trial in range(4) for n in (1, 2) for i in range(30)]
    (tmp_path / "spikes.csv").write_text("\n".join(["neuron,trial,time_s", *trials]))
    options = ("--preset", "spikes", "--data.path", str(tmp_path / "spikes.csv"), "--data.bin-seconds", "0.1")
    command = (*SPIKES, *options, "--out", str(tmp_path / "run"), "--data.test-sequences", test_sequences)
    done = (run if test_sequences == "2" else run_here)(*command)
    if test_sequences == "2":
        assert done.returncode == 0, done.stderr
        assert "constant rates" in done.stdout
    else:
        assert done.returncode == 2 and "has 4 trials; training and test take 7" in done.stderr


@pytest.mark.slow
def test_rich_and_lazy_networks(run, tmp_path):
    """Networks of two ranks and aligned ones, with all measures; a killed run goes on to the same result."""
    command = ("experiments.rich_lazy", "--preset", "debug", "--out", str(tmp_path / "r"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    ranks, small = {name: row["effective rank"] for name, row in result["table"].items()}, ("rank 1", *rich_lazy.SMALL)
    assert ranks.keys() == {f"{kind}, {seed}" for kind in (*small, "rank 6") for seed in (0, 1)}
    assert all(abs(ranks[f"{kind}, 0"] - 1) < 1e-3 for kind in small) and ranks["rank 6, 0"] > 3
    assert all(0 < row["kernel alignment"] <= 1 + 1e-6 for row in result["table"].values())
    assert (tmp_path / "r" / "plots" / "rich_lazy.png").stat().st_size > 1000
    (tmp_path / "r" / "result.json").unlink()
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "aligned")
    assert run(*command).returncode == 0
    again = json.loads((tmp_path / "r" / "result.json").read_text())
    assert again["parameters_digest"] == result["parameters_digest"] and again["table"] == result["table"]
    refused = run(*command[:-1], str(tmp_path / "s"), "--task", "digits")
    assert refused.returncode == 2 and "digits, and they alone, take a path" in refused.stderr


def test_aligned_weights_lie_along_what_was_learned():
    """Of rank 1 and the norm of the change, whose largest singular vectors they have; the others keep their own."""
    rng = np.random.default_rng(0)
    start, change = np.outer(*rng.standard_normal((2, 5))), 0.1 * rng.standard_normal((5, 5))
    networks = [
        {"params": {"recurrent": jnp.asarray(W, jnp.float32), "input": w}} for W, w in ((start, 1), (start + change, 2))
    ]
    aligned, unaligned = rich_lazy.along(*networks)
    U, _, V = np.linalg.svd(change)
    size = np.linalg.norm(change)
    np.testing.assert_allclose(abs(aligned["params"]["recurrent"]), size * abs(np.outer(U[:, 0], V[0])), atol=1e-5)
    np.testing.assert_allclose(unaligned["params"]["recurrent"], start * size / np.linalg.norm(start), rtol=1e-5)
    assert aligned["params"]["input"] == unaligned["params"]["input"] == 1


def test_networks_read_digits_row_after_row(tmp_path):
    """Rows of an image are the steps; probes are none of the digits that are tested, batches are train digits."""
    images, labels = write_digits(tmp_path, np.random.default_rng(0))
    of = replace(rich_lazy.PRESETS["debug"], task="digits", test=20, data=rich_lazy.DataConfig(tmp_path))
    task = rich_lazy.task(of)
    x, y = task.test
    assert x.shape == (20, 4, 4) and task.probes.shape == (4, 4, 4)
    np.testing.assert_array_equal(y, labels[:20])
    scale = np.polyfit(images[:20].ravel().astype(float), np.ravel(x), 1)
    np.testing.assert_allclose(np.polyval(scale, images[-4:]), task.probes, atol=1e-4)
    drawn, labels = jax.device_get(task.draw(jax.random.key(0), 6))
    train, _ = mnist(tmp_path)
    known = {pixels.tobytes(): label for pixels, label in zip(train.inputs, train.labels, strict=True)}
    assert all(known[row.tobytes()] == label for row, label in zip(drawn, labels, strict=True))


@pytest.mark.slow
def test_timescales_of_networks_at_school(run, tmp_path):
    """Both curricula at toy size; what is finished is not taught again."""
    command = ("experiments.timescales", "--preset", "debug", "--tasks", "match", "--out", str(tmp_path / "r"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert set(result["parts"]) == {
        "match, multi: N = 6", "match, multi: keeps N = 2", "match, single: N = 5", "match, single: forgets N = 2"
    }  # fmt: skip
    assert not result["holds"] and (tmp_path / "r" / "plots" / "timescales.png").stat().st_size > 1000
    (tmp_path / "r" / "result.json").unlink()
    table = json.loads((tmp_path / "r" / "table.json").read_text())
    (tmp_path / "r" / "table.json").write_text(json.dumps({"match, single": table["match, single"]}))
    taught = [tmp_path / "r" / "checkpoints" / f"match-{name}.npz" for name in ("single", "multi")]
    single, multi = (path.stat().st_mtime_ns for path in taught)
    assert run(*command).returncode == 0
    assert [path.stat().st_mtime_ns for path in taught] == [single, multi]
    again = json.loads((tmp_path / "r" / "result.json").read_text())
    assert again["parameters_digest"] == result["parameters_digest"]
    refused = run(*command[:3], "--tasks", "sums", "--out", str(tmp_path / "s"))
    assert refused.returncode == 2 and "none is called 'sums'; choose parity, match" in refused.stderr


@pytest.mark.slow
def test_a_curriculum_goes_on_after_its_last_epoch(tmp_path, monkeypatch):
    """Stopped in the second of three epochs it ends as if unbroken."""
    config = replace(timescales.PRESETS["debug"], train=timescales.TrainConfig(epochs=3, steps=2, batch_size=4))
    whole, broken = (Run(config, "timescales", tmp_path / name) for name in ("whole", "broken"))
    rows, record = timescales.schooled(whole, "match", "multi"), Run.record

    def stopping(self, step, split, metrics):
        if step == 4:
            raise KeyboardInterrupt
        record(self, step, split, metrics)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "record", stopping)
        timescales.schooled(broken, "match", "multi")
    assert timescales.schooled(broken, "match", "multi") == rows
    ends = [read_arrays(run.checkpoints / "match-multi.npz") for run in (whole, broken)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_networks_at_school_advance_one_by_one():
    """A network that answers right goes on, one that does not stays; what is not asked does not learn."""
    config = replace(timescales.PRESETS["debug"], width=12, train=timescales.TrainConfig(steps=3, batch_size=8))
    school = timescales.schooling(config, "match", Curriculum(2, 3, 1, threshold=0.51))
    first = jax.jit(jax.vmap(school.start))(jax.random.split(jax.random.key(0), 2))
    after, accuracy, loss = school.run(first, jax.random.split(jax.random.key(1), 2), 13)
    assert accuracy.shape == (2, 2) and np.isfinite(loss).all()
    assert (np.asarray(after.level) == np.where(accuracy[:, 0] > 0.51, 3, 2)).all()
    head = lambda learner: np.asarray(learner.params["params"]["heads"]["kernel"]).reshape(2, 12, 2, 2)
    moved = np.abs(head(after) - head(first)).max(axis=(0, 1, 3))
    assert moved[0] > 0 and moved[1] == 0
    row = timescales.timescales(config, jax.tree.map(lambda x: x[0], first.params))
    assert 1 < row["tau"] < 2 and row["radius"] > 0


@pytest.mark.slow
def test_certificates_and_control_of_an_iclrnn(run, tmp_path):
    """Of three kinds on two tasks: the convex one stays so, others are not."""
    command = ("experiments.iclrnn", "--preset", "debug", "--out", str(tmp_path / "r"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert len(result["rows"]) == 2 * 3 * 2 * 2
    for row in result["rows"]:
        convex = row["kind"] == "iclrnn"
        assert not convex or (min(row["gap before"], row["gap"]) > -1e-9 and row["least weight"] >= 0)
        assert (row["kind"] != "lstm") or row["gap"] < -1e-4
        assert ("energy" in row) == (row["task"] == "reactor")
        assert not convex or 0 <= row["lipschitz"] <= row["lipschitz bound"]
    energy = {name: found["energy"] for name, found in result["baseline"].items()}
    assert 0 < energy["planned with the plant"] < energy["no control"]
    assert result["parts"]["ICLRNN is convex"] and result["parts"]["its kernels are bounded"]
    assert (tmp_path / "r" / "plots" / "iclrnn.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_neuron_adds(run, tmp_path):
    """Neurons and an LSTM of as many parameters on patterns of spikes."""
    command = ("experiments.elm_neuron", "--preset", "debug", "--out", str(tmp_path / "r"))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert set(result["measured"]) == {"version 1", "version 2"} and set(result["baseline"]) == {"short", "lstm"}
    sizes = result["parameters"]
    assert abs(sizes["lstm"] / sizes["version 2"] - 1) < 0.1
    assert all(len(each) == 2 for each in result["accuracies"].values())
    assert (tmp_path / "r" / "plots" / "accuracy.png").stat().st_size > 1000
