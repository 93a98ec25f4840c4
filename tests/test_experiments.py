"""The main job, and the measurements, at toy size, as a user runs them."""

import json

import pytest


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
@pytest.mark.parametrize("mixers", ["s4d", "mamba", "attention", "gla,attention"])
def test_every_mixer_trains_on_the_main_job(run, mixers, texts, tmp_path):
    done = run(
        "experiments.language_model", "--preset", "debug", "--data.path", str(texts), "--out", str(tmp_path / "run"),
        "--model.mixers", mixers, "--model.depth", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
