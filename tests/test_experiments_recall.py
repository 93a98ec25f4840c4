"""What recalls, at toy size, as a user runs it."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampled import by_default
from test_labelled import write_digits

from experiments import mqar, recall_gap
from jaxseq.train import Run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options, measured, baseline",
    [
        ("reset_recall", ("--train.steps", "3", "--task.test-sequences", "8"), {"vector", "scalar"}, {"fixed", "none"}),
        ("selective_copying", ("--preset", "debug"), {"all", "dt"}, {"none"}),
    ],
)
def test_gates_recall_and_are_found_again(run, name, options, measured, baseline, tmp_path):
    """At toy size; a second call trains nothing."""
    command = (f"experiments.{name}", *options, "--out", str(tmp_path))
    first = run(*command)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["measured"]) == measured and set(result["baseline"]) == baseline
    splits = {json.loads(line)["split"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    assert splits == {f"{kind}/{gate}" for kind in ("train", "test") for gate in measured | baseline}
    assert "is finished" in run(*command).stdout


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
