"""The scripts at toy size, as a user runs them."""

import csv
import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import by_default
from test_labelled import write_digits

from experiments import anomaly, efficient_transformers, long_range, mqar, recall_gap, rich_lazy, timescales
from jaxseq.data import Recording, mnist
from jaxseq.models import named_forecaster
from jaxseq.train import Curriculum, Run
from jaxseq.train.files import read_arrays
from jaxseq.train.optimizer import STATE_SPACE

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run():
    """Runs a script in a process of its own."""

    def completed(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)

    return completed


@pytest.fixture
def run_here(capsys, monkeypatch):
    """Runs a script that has nothing to compute in this process: the exit code, and what it wrote."""

    def completed(name: str, *arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        code = 0
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as leaving:
            code = leaving.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return completed


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog; " * 400)
    return folder


def test_the_main_job_trains_reports_resumes_and_generates(run, run_here, texts, tmp_path):
    out = tmp_path / "run"
    command = ("experiments.language_model", "--preset", "debug", "--data.path", str(texts), "--out", str(out))
    first = run(*command)
    assert first.returncode == 0, first.stderr
    result = json.loads((out / "result.json").read_text())
    assert {
        "experiment",
        "claim",
        "measured",
        "baseline",
        "threshold",
        "holds",
        "seconds",
        "device",
        "jax_version",
    } <= set(result)
    assert len(result["parameters_digest"]) == 64
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "validation"} <= {row["split"] for row in rows}
    assert (out / "plots" / "bits_per_byte.png").stat().st_size > 1000
    assert rows[-1]["loss"] < rows[0]["loss"]

    again = run_here(*command)
    assert again.returncode == 0 and "is finished" in again.stdout

    text = run_here("experiments.generate", "--run", str(out), "--prompt", "the ", "--max-tokens", "20")
    assert text.returncode == 0 and text.stdout.startswith("the "), text.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--model.mixers", "nothing"), "no mixer is called 'nothing'"),
        pytest.param(("--data.path", "no/such/folder"), "does not exist", marks=pytest.mark.slow),
        pytest.param(("--train.batch-size", "0"), "train.batch_size=0", marks=pytest.mark.slow),
        (("--unknown", "1"), "Unrecognized options"),
        pytest.param(("--data.evaluation-windows", "0"), "data.evaluation_windows=0", marks=pytest.mark.slow),
        pytest.param(("--model.heads", "3"), "num_heads=3 does not divide d_model=32", marks=pytest.mark.slow),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(run_here, arguments, message, tmp_path):
    refused = run_here("experiments.language_model", "--preset", "debug", "--out", str(tmp_path / "run"), *arguments)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1 and message in refused.stderr


@pytest.mark.slow
def test_the_main_job_on_split_time_is_the_same(run, texts, tmp_path):
    command = ("experiments.language_model", "--preset", "debug", "--data.path", str(texts), "--train.steps", "10")
    measured = []
    for mesh in ("1", "2"):
        out = tmp_path / mesh
        done = run(*command, "--mesh.sequence", mesh, "--out", str(out))
        assert done.returncode == 0, done.stderr
        measured.append(json.loads((out / "result.json").read_text())["measured"])
    assert abs(measured[0] - measured[1]) < 1e-3


@pytest.mark.slow
def test_the_table_of_mixers_measures_each_once(run, texts, tmp_path):
    """Parameters are the target's, a state that grows or does not; what is in the table is not trained again."""
    command = ("experiments.mixer_table", "--preset", "debug", "--data.path", str(texts), "--out", str(tmp_path))
    first = run(*command, "--mixers", "gla,attention")
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    table = result["table"]
    assert [table[name]["grows"] for name in ("gla", "attention")] == [False, True]
    assert all(abs(row["parameters"] / 12_000 - 1) < 0.01 for row in table.values())
    assert all(row["decoding_long"] > 0 and row["training_tokens_per_second"] > 0 for row in table.values())
    assert 1 <= table["attention"]["state_bytes"] / (256 * 2 * 4 * table["attention"]["width"]) < 1.1
    assert (tmp_path / "plots" / "quality.png").stat().st_size > 1000

    (tmp_path / "result.json").unlink()
    again = run(*command, "--mixers", "gla,attention")
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "result.json").read_text())["table"] == table


@pytest.mark.slow
def test_gates_recall_and_are_found_again(run, tmp_path):
    """At toy size; a second call trains nothing."""
    command = ("experiments.reset_recall", "--train.steps", "3", "--task.test-sequences", "8", "--out", str(tmp_path))
    first = run(*command)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["measured"]) == {"vector", "scalar"} and set(result["baseline"]) == {"fixed", "none"}
    splits = {json.loads(line)["split"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    assert splits == {f"{kind}/{gate}" for kind in ("train", "test") for gate in ("vector", "scalar", "fixed", "none")}
    assert "is finished" in run(*command).stdout


@pytest.mark.slow
@pytest.mark.parametrize("mixers", ["s4d", "mamba", "attention", "gla,attention"])
def test_every_mixer_trains_on_the_main_job(run, mixers, texts, tmp_path):
    done = run(
        "experiments.language_model", "--preset", "debug", "--data.path", str(texts), "--out", str(tmp_path / "run"),
        "--model.mixers", mixers, "--model.depth", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
def test_bench_scan_measures_every_op_at_two_lengths(run, tmp_path):
    sizes = "--batch 1 --width 4 --states 2 --heads 1 --head-width 4 --window 4 --repeats 1 --seconds 0"
    lengths = "--lengths 8 16 --other-lengths 8 16 --most-pairs 100"
    done = run("experiments.bench_scan", *sizes.split(), *lengths.split(), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    rows = {(row["op"], row["form"], row["length"]): row for row in table["rows"]}
    assert all(row["training_ms"] > 0 and row["training_compile_seconds"] > 0 for row in rows.values())
    assert ("softmax_attention/window", "None", 16) in rows and ("softmax_attention/full", "None", 16) not in rows
    fits = {(fit["op"], fit["form"]): fit for fit in table["exponents"]}
    states = fits["gated_linear_attention/vector_gate", "parallel"]["training_mib"]
    assert 0.8 < states < 1.2  # a state a step
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())["measured"]) >= {"raw / None, ms"}


@pytest.mark.slow
def test_orchid_meets_its_ablation(run, tmp_path):
    """On sequences to recall, and on digits where there are any, or on digits alone."""
    write_digits(tmp_path, np.random.default_rng(0))
    digits = ("--data.path", str(tmp_path), "--data.pool", "2")
    for asked, tasks in (((), ("recall", "digits")), (("--tasks", "digits"), ("digits",))):
        out = tmp_path / "-".join(tasks)
        done = run("experiments.orchid", "--preset", "debug", *digits, *asked, "--out", str(out))
        assert done.returncode == 0, done.stderr
        result = json.loads((out / "result.json").read_text())
        kinds = itertools.product(tasks, ("correlation", "magnitude"))
        assert set(result["measured"]) == {f"{task}-{kind}" for task, kind in kinds}
        assert set(result["baseline"]) == {f"{task}-none" for task in tasks}
        assert {part.split()[0] for part in result["parts"]} == set(tasks)
        assert not result["parts"].get("recall learned", False)  # in three steps
        assert min(result["seconds_a_step"].values()) > 0
        assert all(len(of_seeds) == 3 for of_seeds in result["accuracies"].values())
        assert (out / "plots" / "accuracy.png").stat().st_size > 1000


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
def test_mqar_trains_side_by_side_and_resumes(run, tmp_path):
    """Two tasks, two learning rates of two seeds; what is in the table is not trained again."""
    command = ("experiments.mqar", "--preset", "debug", "--out", str(tmp_path))
    first = run(*command)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    table = result["table"]
    assert len(table) == 3 * 2 and result["parts"] == {} and result["holds"] is None  # such tasks have no limits
    assert all(0 <= row["accuracy"] <= 1 and set(row["accuracies"]) == {"0.001", "0.01"} for row in table.values())
    keys, values, inputs = 16 * 8, 16 * 8, 2 * 8  # the cache, and the window before it
    assert 1 <= table["attention-8-16-4"]["state_bytes"] / (4 * (keys + values + inputs)) < 1.1
    assert (tmp_path / "plots" / "recall.png").stat().st_size > 1000

    (tmp_path / "result.json").unlink()
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "result.json").read_text())["table"] == table
    refused = run("experiments.mqar", "--mixers", "nothing", "--out", str(tmp_path / "r"))
    assert refused.returncode == 2 and "mixers=nothing: none is called 'nothing'; choose abc, " in refused.stderr


MQAR_NAMES = mqar.PRESETS["gpu"].names()


@pytest.mark.parametrize("name", by_default(["blocks", "kroneckerattention", "rwkv7"], MQAR_NAMES))
def test_mqar_builds_every_mixer(name):
    for preset in ("debug", "gpu"):
        config = mqar.PRESETS[preset]
        longest = max(length for length, _ in (*config.tasks, *config.beyond))
        model = mqar.language_model(config, name, min(config.widths), longest)
        tokens = jax.ShapeDtypeStruct((1, config.tasks[0][0]), jnp.int32)
        logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens)
        assert logits.shape == (*tokens.shape, config.vocab_size)


def test_mqar_judges_what_has_limits(tmp_path):
    """The mixers that it asks something of are there; of each task what the paper says of it, of others nothing."""
    assert {*mqar.FIXED, *mqar.ORDER, *itertools.chain(*mqar.LIMITS.values())} <= set(MQAR_NAMES)

    run = Run(replace(mqar.PRESETS["gpu"], test_examples=64), "mqar", tmp_path)

    def judged(setting, beyond=None, **accuracies):
        sizes = dict(zip(("width", "length", "pairs"), setting, strict=True))
        facts = lambda name: {"mixer": name, "beyond": (beyond or {}).get(name, {}), "state_bytes": 2048}
        row = lambda name, x: facts(name) | {"accuracy": x} | sizes
        table = {name: row(name, x) for name, x in accuracies.items()}
        mqar.verdict(run, table)
        found = json.loads((tmp_path / "result.json").read_text())
        why.update({part.partition(" (")[0]: reason for part, reason in found["why"].items()})
        return found["holds"], [part.partition(" (")[0] for part, true in found["parts"].items() if not true]

    why = {}
    small = dict(attention=1.0, hyena=0.2, deltanet=0.9, mamba2=0.3)
    far = {"deltanet": {"128-16": 0.5, "128-32": 0.3}, "mamba2": {"128-16": 0.3, "128-32": 0.1}}
    assert judged(mqar.SMALL, far, **small) == (True, [])
    assert judged(mqar.SMALL, far, **small | {"hyena": 0.36}) == (False, ["hyena", "the rest is between"])
    assert judged(mqar.SMALL, far | {"mamba2": {"128-16": 0.6}}, **small) == (False, ["in the order of the authors"])
    assert judged((128, 256, 16), attention=0.99, baseconv=0.5, based16=0.81) == (True, [])
    worse = dict(attention=0.98, baseconv=0.6, based16=0.8)
    assert judged((128, 256, 16), **worse) == (False, ["attention", "baseconv", "based16 leads baseconv"])
    assert judged((64, 512, 64), attention=0.1) == (None, [])
    assert why["in the order of the authors"] == "deltanet 0.400 with 2.0 KiB, mamba2 0.600 with 2.0 KiB"
    assert judged(mqar.SMALL, attention=1.0, blocks=0.5) == (False, ["blocks"])
    assert why["blocks"].startswith("0.500, of 0.6") and "hyena" not in why


@pytest.mark.slow
def test_the_bench_of_a_checkpoint(run, tmp_path):
    done = run("experiments.bench_checkpoint", "--preset", "debug", "--kind", "mamba2", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    measured = result["measured"]
    assert measured["forward"] > 0 and measured["decoding"] > 0
    assert (result["holds"] is None) == (result["baseline"] is None)  # with no other library nothing is compared


@pytest.mark.slow
def test_the_bench_of_kernels(run, tmp_path):
    out = tmp_path / "r"
    sizes = "--tokens 40 --lengths 40 --error-length 40 --repeats 1 --copied-mib 1 --product 16"
    done = run("experiments.bench_kernels", "--ops", "attention,gla_step", *sizes.split(), "--out", str(out))
    assert done.returncode == 0, done.stderr
    table = json.loads((out / "table.json").read_text())
    rows = {(row["op"], row["form"]): row for row in table["rows"]}
    assert {("attention/16", "chunked"), ("attention/16", "pallas"), ("gla_step/16", "sequential")} <= rows.keys()
    assert all(row["forward_ms"] > 0 and row["error"] < 2e-2 for row in rows.values())
    assert not json.loads((out / "result.json").read_text())["holds"]  # nothing is claimed of a CPU
    assert (out / "plots" / "times.png").stat().st_size > 1000


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
def test_the_gap_of_recall(run, texts, tmp_path):
    """At toy size, with a mixer of the library; a run that was killed after some models goes on with the rest."""
    out = tmp_path / "r"
    hits = ("--data.most", "100000", "--data.context", "64")  # in every window
    command = ("experiments.recall_gap", "--preset", "debug", "--data.path", str(texts), *hits)
    command = (*command, "--models", "mingru,hybrid", "--out", str(out))
    done = run(*command)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["table"].keys() >= {"attention", "convolution", "hybrid, selected keys", "hybrid, all keys"}
    gap = result["table"]["convolution"]["gap"]
    assert gap["low"] <= gap["value"] <= gap["high"] and not result["holds"]
    for name, part in itertools.product(("mingru", "hybrid, all keys"), ("closed", "closed on hits")):
        interval = result["table"][name].get(part)
        assert (interval is None) == (gap["low"] <= 0)  # of a gap that may be none
        assert interval is None or interval["low"] <= interval["value"] <= interval["high"]
    assert "mean selection" not in result["models"]["mingru"]
    assert 0.4 < result["models"]["hybrid"]["mean selection"] < 0.6  # weights are as good as untrained
    assert (out / "plots" / "recall_gap.png").stat().st_size > 1000

    scored = {name: (out / "nats" / f"{name}-3.npz").stat().st_mtime_ns for name in ("attention", "hybrid")}
    for path in (out / "result.json", out / "nats" / "hybrid-3.npz"):
        path.unlink()
    again = run(*command)
    assert again.returncode == 0, again.stderr
    assert json.loads((out / "result.json").read_text())["table"] == result["table"]
    assert (out / "nats" / "attention-3.npz").stat().st_mtime_ns == scored["attention"]
    assert (out / "nats" / "hybrid-3.npz").stat().st_mtime_ns > scored["hybrid"]


def test_the_gap_of_recall_is_of_any_mixer():
    """Those written out there and those of the library, as long as the context; another name is refused."""
    config = replace(recall_gap.PRESETS["debug"], depth=2, data=recall_gap.DataConfig(context=1100))
    tokens = jnp.zeros((1, config.data.context), jnp.int32)
    for name in (*recall_gap.MIXERS, "hyena", "rwkv7", "gla+rwkv7+attention"):
        jax.eval_shape(recall_gap.build(config, name).init, jax.random.key(0), tokens)
    assert replace(config, models="hyena,gla,hyena").names() == ["attention", "convolution", "hyena", "gla"]
    assert replace(config, models="").names() == list(recall_gap.MIXERS)
    assert replace(config, models="rwkv7 + gla").names() == ["attention", "convolution", "rwkv7+gla"]
    three = replace(config, models="gla+rwkv7+attention")
    of = lambda name: [mixer.func.__name__ for mixer in recall_gap.build(three, name).mixers[1::2]]
    assert of("gla+rwkv7+attention") == ["GLA", "RWKV7", "Attention"]
    assert of("convolution") == ["BaseConv"] * 3 and of("rwkv7") == ["RWKV7"] * 3  # all are as deep
    message = "none is called 'transformer'; choose attention, convolution, gla, mamba2, hybrid, abc, baseconv"
    with pytest.raises(ValueError, match=f"models=transformer: {message}"):
        replace(config, models="transformer")


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
def test_errors_of_approximations(run, tmp_path):
    done = run("experiments.approximations", "--preset", "debug", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    errors = json.loads((tmp_path / "r" / "result.json").read_text())["errors"]
    performer, reformer = errors["performer, size 0.5"], errors["reformer"]
    assert performer["16"] < performer["8"] and reformer["2"] < reformer["1"] and set(errors["linformer"]) == {"2", "8"}
    assert (tmp_path / "r" / "plots" / "approximations.png").stat().st_size > 1000


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


@pytest.mark.slow
def test_triples_by_pairs_of_keys(run, tmp_path):
    """Third-order attention beside softmax attention, and the polynomial's errors by degree and bound.

    Three steps learn nothing, and a few tokens are no measure of time. What is by hand, and the errors, are as always.
    """
    done = run("experiments.higher_order_recall", "--preset", "debug", "--out", str(tmp_path / "r"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    measured, parts = result["measured"], result["parts"]
    assert result["holds"] is False and parts["pairs of keys"] is False
    assert measured["by hand"] == 1.0 and parts["by hand"] is True
    assert measured["error at degree 2 over 4, entries up to 1.0"] == pytest.approx(329, rel=0.02)
    assert measured["error at degree 2 over 4, entries up to 3.0"] == pytest.approx(1.6, rel=0.02)
    assert parts["the polynomial where entries are small"] and parts["the polynomial where they are not"]
    breaks = [measured[f"entries at which the bound says nothing, degree {degree}"] for degree in (0, 2, 4, 6)]
    assert breaks == pytest.approx([0.828, 1.067, 1.22, 1.339], abs=1e-3)
    rows = [row for by_bound in result["errors"].values() for row in by_bound.values()]
    assert len(rows) == 20 and all(row["drawn"] <= row["largest drawn"] for row in rows)
    assert all(max(row["largest drawn"], row["worst"]) <= min(row["bound"], 2.0) for row in rows)
    assert measured["largest share of the bound"] == pytest.approx(0.44, abs=0.01)
    assert parts["no error above its bound"] is True
    assert (tmp_path / "r" / "plots" / "kronecker.png").stat().st_size > 1000
