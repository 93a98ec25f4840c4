"""Runs from the command line: resuming after any end, one-line errors, the files a run leaves."""

import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import by_default

from jaxseq.train import (
    CheckpointConfig,
    MeshConfig,
    MetricsWriter,
    Progress,
    TrainConfig,
    digest,
    draw_curves,
    main,
    open_run,
    read_config,
    read_metrics,
)
from jaxseq.train.command_line import parse
from jaxseq.train.files import read_arrays, read_json, write_arrays
from jaxseq.train.plots import points_and_mean, saved_figure
from jaxseq.train.rows import grouped, mean_of, where

TRAIN = TrainConfig(steps=40, batch_size=4, warmup_steps=5, evaluate_every=15, log_every=2)
CHECKPOINT, MESH = CheckpointConfig(every=7), MeshConfig()
PATIENCE = 300  # seconds: a busy machine can keep a new process waiting for minutes
SIGNALS = [[signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]]
TWO_DEVICES = "--xla_force_host_platform_device_count=2"


@dataclass(frozen=True)
class Config:
    """A straight line."""

    seed: int = 0
    """Seed of everything random."""
    slope: float = 2.0
    """What is learned."""
    names: tuple[str, ...] = ("a", "b")
    """Several words."""
    path: Path | None = None
    """A file."""
    train: TrainConfig = TRAIN
    checkpoint: CheckpointConfig = CHECKPOINT
    mesh: MeshConfig = MESH


PRESETS = {"small": Config(), "large": Config(slope=3.0)}


def measure(run):
    """Fit a line through the origin."""
    config = run.config

    def batches(step):
        time.sleep(float(os.environ.get("PAUSE", 0)))  # time for a signal to arrive
        return np.random.default_rng(step).normal(size=(config.train.batch_size, 8)).astype(np.float32)

    def loss(params, x, key):
        value = jnp.mean((params["kernel"] * x - config.slope * x) ** 2)
        return value, {"bits_per_byte": value}

    evaluate = lambda params: {"validation": {"loss": float(jnp.abs(params["kernel"] - config.slope).sum())}}
    init = lambda key: {"kernel": jnp.zeros((1, 8))}
    result = run.fit(loss, init, batches, evaluate=evaluate, tokens_per_step=32)
    run.record(result.step, "test", {"loss": 0.0})
    run.plot({"chance": 4.0})
    error = result.evaluation["validation"]["loss"]
    shown = {
        "claim": "The line is found.",
        "measured": error,
        "baseline": 16.0,
        "threshold": 16.0,
        "holds": error < 16.0,
    }
    run.finish(**shown, parameters_digest=digest(result.params), steps=result.step)


def command(*arguments):
    return [sys.executable, __file__, *map(str, arguments)]


def start(*arguments, **environment):
    """The experiment in its own process, as a user would start it, compiled as here: its numbers are those of here."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command(*arguments), **pipes, env=os.environ | environment)


def run_here(capsys, *arguments):
    """The same in this process: exit code, standard output, standard error."""
    code = 0
    try:
        main("line", PRESETS, measure, [str(a) for a in arguments])
    except SystemExit as leaving:
        code = leaving.code
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing broke off, in its own process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start("--out", folder)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "the claim holds" in out and "step 40/40" in err
    return folder


def test_a_finished_run_has_everything(finished):
    files = {"config.json", "metrics.jsonl", "result.json", "checkpoints", "tensorboard", "plots"}
    assert files <= {file.name for file in finished.iterdir()} and not list(finished.glob("*.tmp"))
    assert {file.name for file in (finished / "plots").iterdir()} == {"loss.png", "bits_per_byte.png"}
    result = json.loads((finished / "result.json").read_text())
    verdict, machine = ["claim", "measured", "baseline", "threshold", "holds"], ["seconds", "device", "jax_version"]
    assert list(result)[:10] == ["experiment", *verdict, *machine, "parameters_digest"]
    assert result["experiment"] == "line" and result["holds"] is True and result["steps"] == 40
    assert result["seconds"] > 0 and len(result["parameters_digest"]) == 64
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 40
    assert read_config(finished, Config) == Config()
    rows = read_metrics(finished)
    assert [row["step"] for row in rows if row["split"] == "validation"] == [15, 30, 40]
    assert all({"step", "split", "loss", "tokens"} <= set(row) for row in rows)


def running(*arguments, pause):
    """The process, once it has written a row more than there were."""
    path = Path(arguments[1]) / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0
    process = start(*arguments, PAUSE=str(pause))
    while not path.exists() or path.stat().st_size <= before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("times", by_default([1], [1, 3]))
def test_killed_at_random_moments_ends_as_if_unbroken(capsys, finished, times, tmp_path):
    for _ in range(times):
        process = running("--out", tmp_path, pause=0.15)
        time.sleep(random.uniform(0, 1.2))
        process.kill()
        process.communicate()
    code, _, err = run_here(capsys, "--out", tmp_path)
    assert code == 0, err
    assert read_metrics(tmp_path) == read_metrics(finished)
    result, whole = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path, finished))
    assert result["parameters_digest"] == whole["parameters_digest"]


@pytest.mark.parametrize("numbers", by_default(SIGNALS[:1], SIGNALS), ids=["ended", "interrupted after that"])
def test_signals_save_and_leave_with_code_0(capsys, finished, numbers, tmp_path):
    step = 0
    for number in numbers:
        process = running("--out", tmp_path, pause=0.2)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
        assert step == 0 or f"goes on from step {step}" in err
        step = int(err.split("interrupted after step ")[1].split(";")[0])
        assert (tmp_path / "checkpoints" / str(step)).is_dir() and step < 40
    _, _, err = run_here(capsys, "--out", tmp_path)
    assert f"goes on from step {step}" in err
    assert read_metrics(tmp_path) == read_metrics(finished)


def test_a_finished_run_says_so_and_more_steps_continue_it(capsys, finished, tmp_path):
    code, out, _ = run_here(capsys, "--out", finished)
    assert code == 0 and "is finished" in out and "the claim holds" in out
    folder = tmp_path / "short"
    assert run_here(capsys, "--out", folder, "--train.steps", 10)[0] == 0
    code, _, err = run_here(capsys, "--out", folder, "--train.steps", 20, "--checkpoint.keep", 1)
    assert code == 0 and "goes on from step 10" in err
    assert json.loads((folder / "result-10.json").read_text())["steps"] == 10
    assert json.loads((folder / "result.json").read_text())["steps"] == 20
    code, _, err = run_here(capsys, "--out", folder, "--train.steps", 15)
    assert code == 2 and "train.steps=20, this one has 15" in err and "can only grow" in err
    before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    code, _, err = run_here(capsys, "--out", folder, "--train.steps", 30, "--mesh.data", 97)
    assert code == 2 and "97" in err  # what is refused before its first step leaves the finished run as it is
    assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == before
    assert "is finished" in run_here(capsys, "--out", folder, "--train.steps", 20)[1]


def one_line(outcome, *words):
    code, out, err = outcome
    assert code == 2 and out == "" and err.count("\n") == 1, outcome
    assert all(word in err for word in words), err


def test_bad_arguments_are_one_line(capsys, tmp_path):
    out = ("--out", tmp_path / "run")
    one_line(run_here(capsys, *out, "--train.steps", "many"), "--train.steps", "many")
    one_line(run_here(capsys, *out, "--trian.steps", "3"), "--trian.steps", "did you mean --train.steps?")
    one_line(run_here(capsys, *out, "--preset", "huge"), "--preset huge", "small, large")
    one_line(run_here(capsys, *out, "--train.batch-size", "-4"), "train.batch_size=-4 must be above 0")
    one_line(run_here(capsys, *out, "--train.steps"), "--train.steps")
    one_line(run_here(capsys, *out, "surplus"), "surplus")
    one_line(run_here(capsys, *out, "--preset"), "--preset")
    assert not (tmp_path / "run").exists()


def test_help_explains_every_field(capsys):
    code, out, _ = run_here(capsys, "--preset", "large", "--help")
    assert code == 0 and "Presets: small, large" in out and "default: 3.0" in out
    for option in ("train.steps", "train.batch-size", "train.learning-rate", "checkpoint.every", "mesh.fsdp", "seed"):
        assert f"--{option} " in out
    assert "What is learned." in out and "Peak learning rate." in out


def test_help_keeps_the_paragraphs_of_a_docstring(capsys):
    """Claim, Source, Expect and Run begin lines."""
    with pytest.raises(SystemExit):
        parse(
            {"cpu": Config()}, ["--help"], out="runs/x", description="What.\n\nClaim   One\n        line.\nSource  Two."
        )
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines.index("Source  Two.") > next(n for n, line in enumerate(lines) if line.startswith("Claim   One"))


def test_folders_that_are_refused_are_left_alone(capsys, finished, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    one_line(run_here(capsys, "--out", foreign), "foreign is not empty and holds no run", "--out")
    assert [file.name for file in foreign.iterdir()] == ["thesis.txt"]
    one_line(run_here(capsys, "--out", foreign / "thesis.txt"), "thesis.txt")
    one_line(run_here(capsys, "--out", finished, "--slope", 5), "slope=2.0, this one has 5.0", "another --out")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"experiment": "li')
    one_line(run_here(capsys, "--out", broken), "broken/config.json is not valid JSON")
    with pytest.raises(ValueError, match="experiment=line, this one has other"):
        open_run(Config(), "other", finished)


@pytest.mark.usefixtures("little_garbage")
def test_a_corrupt_checkpoint_is_one_line(tmp_path, capsys):
    assert run_here(capsys, "--out", tmp_path, "--train.steps", 10)[0] == 0
    for damaged in ("parameters/**/d/*", "**/*"):
        for file in filter(Path.is_file, (tmp_path / "checkpoints" / "10").glob(damaged)):
            file.write_bytes(file.read_bytes()[:-9])
        if damaged == "**/*":
            code, _, err = run_here(capsys, "--out", tmp_path, "--train.steps", 12)
        else:  # also nothing from beneath Python
            process = start("--out", tmp_path, "--train.steps", "12")
            err, code = process.communicate(timeout=PATIENCE)[1], process.returncode
        lines = [line for line in err.splitlines() if "goes on from" not in line]
        assert code == 2 and len(lines) == 1, err
        assert "checkpoints/10 is corrupt" in err and "remove that folder to resume from step 7." in err


def test_a_run_refused_before_its_first_step_holds_no_folder(tmp_path, capsys):
    def refusing(run):
        raise ValueError(f"slope={run.config.slope} is not for us.")

    with pytest.raises(ValueError, match="not for us"):
        main("line", PRESETS, refusing, ["--slope", "7", "--out", str(tmp_path / "run")])
    code, *_ = run_here(capsys, "--out", tmp_path / "run")
    assert code == 0
    assert read_config(tmp_path / "run", Config) == Config()
    code, _, err = run_here(capsys, "--slope", "7", "--out", tmp_path / "run")
    assert code == 2 and "slope" in err


def test_a_fact_that_changed_is_refused(tmp_path):
    run = open_run(Config(), "line", tmp_path)
    run.require_same(text="a")
    run.require_same(text="b")  # nothing was begun
    run.record(1, "train", {"loss": 1.0})
    run.require_same(text="b")
    with pytest.raises(ValueError, match="began with another text .b, now c.; give another --out"):
        open_run(Config(), "line", tmp_path).require_same(text="c")
    assert read_json(tmp_path / "facts.json") == {"text": "b"}


def test_a_bug_keeps_its_traceback(tmp_path):
    def buggy(run):
        np.zeros(3).reshape(2)

    with pytest.raises(ValueError, match="reshape"):
        main("line", PRESETS, buggy, ["--out", str(tmp_path / "run")])


def test_a_diverged_run_is_one_line_and_code_1(tmp_path, capsys):
    diverging = ("--slope", "nan", "--out", tmp_path)
    code, _, err = run_here(capsys, *diverging)
    assert code == 1 and "not finite at steps 1 to 10, 10 in a row" in err
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] is None and first["skipped"] == 1


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": float(step)})
            writer.write(step, "validation", {"loss": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "spl')
    with MetricsWriter(tmp_path, step=2) as writer:
        writer.write(3, "train", {"loss": 9.0})
    rows = [(row["step"], row["split"], row["loss"]) for row in read_metrics(tmp_path)]
    assert rows == [(1, "train", 1.0), (1, "validation", None), (2, "train", 2.0), (3, "train", 9.0)]


def test_progress_is_one_live_line_on_a_terminal_and_rare_elsewhere():
    class Terminal(io.StringIO):
        isatty = lambda self: True

    for stream, shown in ((Terminal(), "\r\x1b[2K"), (io.StringIO(), "")):
        with Progress(100, tokens_per_step=10, stream=stream) as progress:
            for step in range(1, 101):
                progress.update(step, {"loss": 1.0, "bits_per_byte": 2.5})
        text = stream.getvalue()
        assert text.startswith(f"{shown}step 1/100  loss 1.0000  2.500 bits/byte")
        assert "step 100/100" in text and text.count("\n") <= 2 and "tokens/s  0 s left" in text


VALUES = (("b", 0, 2, 3.0), ("b", 1, 2, 5.0), ("b", 0, 1, 1.0), ("a", 0, 1, None))
ROWS = [dict(zip(("kind", "seed", "x", "y"), values, strict=True)) for values in VALUES]


def test_rows_are_chosen_grouped_and_averaged():
    """What JSON has no number for makes a mean none, or counts for nothing where told; groups stay in order."""
    assert where(ROWS, kind="b", seed=0) == [ROWS[0], ROWS[2]] and where(ROWS, kind="c") == []
    assert list(grouped(ROWS, "kind")) == ["b", "a"] and grouped(ROWS, "kind")["a"] == [ROWS[3]]
    assert list(grouped(ROWS, "kind", "x")) == [("b", 2), ("b", 1), ("a", 1)]
    assert mean_of(ROWS, "y", known=True) == 3 and np.isnan(mean_of(ROWS, "y"))
    assert np.isnan(mean_of(where(ROWS, kind="a"), "y", known=True)) and np.isnan(mean_of([], "y"))
    with pytest.raises(KeyError, match="speed"):
        where(ROWS, speed=1)


def test_a_line_goes_through_the_means_of_points(tmp_path):
    """In the order of x, past rows without a value; points have the colour of their line."""
    with saved_figure(tmp_path / "plots" / "line.png") as figure:
        axes = figure.subplots()
        points_and_mean(axes, ROWS, "x", "y", label="all", color="red")
    line, points = axes.lines
    assert line.get_xydata().tolist() == [[1, 1], [2, 4]] and line.get_label() == "all"
    assert points.get_xydata().tolist() == [[2, 3], [2, 5], [1, 1]] and points.get_color() == "red"


def test_arrays_come_back_from_a_folder_that_was_not_there(tmp_path):
    write_arrays(tmp_path / "a" / "b" / "x.npz", {"layer/kernel": np.eye(2), "bias": np.arange(3)})
    found = read_arrays(tmp_path / "a" / "b" / "x.npz")
    assert list(found) == ["layer/kernel", "bias"] and found["bias"].tolist() == [0, 1, 2]
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["x.npz"]


def test_curves_are_drawn_from_metrics(tmp_path):
    with MetricsWriter(tmp_path, tokens_per_step=4) as writer:
        for step in range(1, 200):
            writer.write(step, "train", {"loss": 5 / step, "accuracy": step / 200})
    paths = draw_curves(tmp_path, accuracy={"chance": 0.1})
    assert [path.name for path in paths] == ["loss.png", "accuracy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.slow
def test_two_processes_train_as_one(finished, tmp_path):
    with socket.create_server(("localhost", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"
    mesh = ("--mesh.data", "2", "--mesh.fsdp", "2", "--out", tmp_path)
    both = [start(*mesh, PROCESS=f"{address} {i}", XLA_FLAGS=TWO_DEVICES) for i in range(2)]
    outputs = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "the claim holds" in outputs[0][0] and "claim" not in outputs[1][0]
    rows, whole = read_metrics(tmp_path), read_metrics(finished)
    assert [row["step"] for row in rows] == [row["step"] for row in whole]
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in whole], atol=1e-4)


if __name__ == "__main__":
    if "PROCESS" in os.environ:
        address, process = os.environ["PROCESS"].split()
        jax.distributed.initialize(address, num_processes=2, process_id=int(process))
    main("line", PRESETS, measure)


def test_a_row_is_made_once_and_a_figure_is_whole(tmp_path):
    """By all runs in a folder; what fails while it is made leaves nothing."""
    run = open_run(Config(), "line", tmp_path / "run")
    made = []
    row = lambda: made.append(1) or {"error": 0.5, "least": float("nan")}
    assert run.kept("a", row) == {"error": 0.5, "least": None}
    assert open_run(Config(), "line", tmp_path / "run").kept("a", row) == {"error": 0.5, "least": None}
    assert len(made) == 1
    longer = Config(train=replace(TRAIN, steps=TRAIN.steps + 1))
    assert open_run(longer, "line", tmp_path / "run").kept("a", row) and len(made) == 2  # of more steps: another row

    def broken():
        raise RuntimeError("no figures")

    with pytest.raises(RuntimeError, match="no figures"):
        run.kept("b", broken)
    with pytest.raises(RuntimeError, match="no figures"), run.figure("broken"):
        broken()
    assert list(read_json(tmp_path / "run" / "table.json")) == ["a"]
    with run.figure("line", figsize=(2, 2)) as figure:
        figure.subplots().plot([1, 2])
    assert (tmp_path / "run" / "plots" / "line.png").read_bytes()[1:4] == b"PNG"
    assert [file.name for file in (tmp_path / "run" / "plots").iterdir()] == ["line.png"]


def test_a_claim_of_parts_tells_which_fail_and_why(tmp_path, capsys):
    run = open_run(Config(), "line", tmp_path / "run")
    shown = dict(claim="Both.", measured=1, baseline=2, threshold=3)
    reasons = {"up": "not told, as it holds", "down": "by 0.2"}
    result = run.finish(**shown, holds={"up": np.True_, "down": np.False_, "level": False}, why=reasons)
    assert result == json.loads((tmp_path / "run/result.json").read_text())
    assert result["holds"] is False and result["parts"] == {"up": True, "down": False, "level": False}
    assert result["why"] == {"down": "by 0.2"}
    lines = capsys.readouterr().out.splitlines()
    assert "  not: down (by 0.2)" in lines and "  not: level" in lines and not any("not: up" in line for line in lines)
    assert run.finish(**shown, holds={"up": True})["holds"] is True
    assert run.finish(**shown, holds={})["holds"] is None  # nothing was to be compared
