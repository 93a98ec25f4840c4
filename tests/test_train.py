"""The training loop on a two-layer network: what a step does, what resuming and sharding leave unchanged."""

import os
import re
import signal
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sampled import by_default

from jaxseq import Attention, Mamba
from jaxseq.models import ModelConfig, named_language_model
from jaxseq.train import (
    CheckpointConfig,
    Checkpoints,
    Interrupted,
    MeshConfig,
    TrainConfig,
    cross_entropy,
    device_mesh,
    digest,
    fit,
    make_optimizer,
    mean_metrics,
    restore_parameters,
    shard_batch,
    shardings,
    with_sown,
)
from jaxseq.train.optimizer import DECAYED, HIDDEN, STATE_SPACE, learning_rate
from jaxseq.train.paths import matching, named_leaves

CONFIG = TrainConfig(
    steps=12, batch_size=8, learning_rate=1e-2, warmup_steps=3, evaluate_every=4, log_every=1, max_bad_steps=3
)
VOCAB, WIDTH, TIME = 16, 8, 4
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


def init(key):
    draws = iter(
        jnp.split(jax.random.uniform(key, (80, WIDTH), minval=-0.6, maxval=0.6), 10)
    )  # one draw: fast to compile
    table = {"embedding": jnp.concatenate([next(draws) for _ in range(2)])}
    up, down = (jnp.concatenate([next(draws) for _ in range(4)]) for _ in range(2))
    block = {"up": {"kernel": up.T, "bias": jnp.zeros(32)}, "down": {"kernel": down}}
    return {
        "params": {"table": table, "block": block | {"log_dt": jnp.zeros(WIDTH)}, "norm": {"scale": jnp.ones(WIDTH)}}
    }


def loss(params, tokens, key):
    """Predict the next token; the key drops inputs, so that a wrong key shows."""
    p = params["params"]
    table = p["table"]["embedding"]
    kept = jax.random.bernoulli(key, 0.9, (VOCAB, 1)).astype(jnp.float32)
    x = (table * kept)[tokens[:, :-1]] * p["norm"]["scale"][None, None] * jnp.exp(p["block"]["log_dt"])[None, None]
    up = x @ p["block"]["up"]["kernel"] + p["block"]["up"]["bias"][None, None]
    return cross_entropy((x + jnp.tanh(up) @ p["block"]["down"]["kernel"]) @ table.T, tokens[:, 1:])


def quiet_loss(params, tokens, key):
    return loss(params, tokens, jax.random.key(7))


def batches(step, poison=()):
    first = np.random.default_rng(step).integers(0, VOCAB, (8, 1))
    tokens = (first + 3 * np.arange(TIME + 1)) % VOCAB
    return tokens.astype(np.int32)


def train(loss=loss, batches=batches, config=CONFIG, init=init, **options):
    """The result and the rows reported."""
    rows = []
    report = lambda step, split, metrics: rows.append({"step": step, "split": split, **metrics})
    return fit(loss, init, batches, config=config, report=report, **options), rows


def losses(rows):
    return np.array([row["loss"] for row in rows if row["split"] == "train"])


@pytest.fixture(scope="module")
def unbroken():
    return train()


def test_golden_step(unbroken):
    _, rows = unbroken
    np.testing.assert_allclose(
        [rows[0]["loss"], rows[0]["gradient_norm"]],
        GOLDEN,
        rtol=1e-4,
        err_msg="The first step has other numbers than recorded. If you meant to change initialisation, loss, keys or"
        " random numbers, record the new ones in GOLDEN; if you did not, this is a mistake.",
    )


GOLDEN = [2.842069, 1.078297]


def test_learns_and_reports_evaluations_in_order():
    result, rows = train(evaluate=lambda params: {"validation": {"loss": 1.0}})
    assert losses(rows)[-1] < losses(rows)[0] - 0.2
    assert [(row["step"]) for row in rows if row["split"] == "validation"] == [4, 8, 12]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert result.evaluation == {"validation": {"loss": 1.0}} and result.step == 12 and result.skipped == 0


def evaluations(*values):
    """An evaluation with these values, one after the other, and the parameters it was given."""
    given, rest = [], iter(values)
    return lambda params: given.append(digest(params)) or {"validation": {"loss": next(rest)}}, given


@pytest.mark.parametrize("mesh", by_default([MeshConfig()], [MeshConfig(), CUBE]))
def test_the_parameters_that_did_best_come_back_after_a_restart_too(tmp_path, mesh):
    options = {"mesh": device_mesh(mesh), "best": "validation/loss"}
    evaluate, given = evaluations(np.nan, 1.0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Interrupted):
            train(batches=interrupt_at(9), evaluate=evaluate, checkpoints=checkpoints, **options)
        result, _ = train(evaluate=evaluations(2.0)[0], checkpoints=checkpoints, **options)
    assert (result.params_step, result.step) == (8, 12) and digest(result.params) == given[1]


def test_the_last_parameters_come_back_where_none_are_better(unbroken):
    result, _ = train(evaluate=evaluations(np.nan, np.nan, np.nan)[0], best="validation/loss")
    assert result.params_step == 12 and digest(result.params) == digest(unbroken[0].params)


def test_best_is_of_one_metric_in_all_of_a_run(tmp_path):
    evaluate = lambda params: {"validation": {"loss": 1.0, "error": 2.0}}
    for name, said in (("validation/loss", ""), ("validation/error", "another config: best validation/")):
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=said) if said else nullcontext():
            train(evaluate=evaluate, checkpoints=checkpoints, best=name)


def test_rules_speak_of_whole_paths():
    rules = ((r"^params/", P("fsdp")),)
    result, _ = train(mesh=device_mesh(MeshConfig(fsdp=4)), rules=rules)
    assert result.params["params"]["norm"]["scale"].sharding.spec == P("fsdp")


def test_best_names_what_is_evaluated():
    with pytest.raises(ValueError, match="best='test/loss' is not evaluated; there is validation/loss"):
        train(evaluate=evaluations(1.0)[0], best="test/loss")
    with pytest.raises(ValueError, match="best='test/loss' takes evaluate=, which gives it"):
        train(best="test/loss")


def interrupt_at(step):
    """Batches that send this process SIGTERM while it makes the one of this step."""

    def interrupting(n):
        if n == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(n)

    return interrupting


def test_resumed_equals_unbroken_to_the_bit(tmp_path, unbroken):
    whole, rows = unbroken
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Checkpoints(tmp_path / "a", CheckpointConfig(every=5)) as checkpoints:
        with pytest.raises(Interrupted) as leaving:
            train(batches=interrupt_at(6), checkpoints=checkpoints)
        assert leaving.value.code == 0 and leaving.value.step == 7 == checkpoints.latest_step
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    with Checkpoints(tmp_path / "a", CheckpointConfig(every=5)) as checkpoints:
        resumed, rest = train(checkpoints=checkpoints)
    assert resumed.first_step == 7
    assert digest(resumed.params) == digest(whole.params)
    assert rest == [row for row in rows if row["step"] > 7]
    assert digest(restore_parameters(tmp_path / "a")) == digest(whole.params)


def test_one_device_equals_a_cube_of_eight(unbroken):
    _, rows = unbroken
    many, many_rows = train(mesh=device_mesh(CUBE))
    np.testing.assert_allclose(losses(many_rows), losses(rows), atol=1e-4)
    placed = {path: x.sharding.spec for path, x in named_leaves(many.params["params"]).items()}
    assert placed["block/up/kernel"] == P("fsdp", "tensor") and placed["block/down/kernel"] == P("tensor", "fsdp")
    assert many.params["params"]["block"]["up"]["kernel"].addressable_shards[0].data.shape == (WIDTH // 2, 16)
    assert many.params["params"]["table"]["embedding"].addressable_shards[0].data.shape == (VOCAB // 4, WIDTH)


@pytest.mark.slow
def test_a_model_with_muon_and_ngrams_trains_on_the_cube():
    """The parts of the main job: a model, its parameter groups and places, on one device and on eight."""
    config = ModelConfig(mixers="gla", width=16, depth=2, ngrams=(2, 3), ngram_buckets=64)
    model = named_language_model(config, VOCAB, remat=False)
    model_loss = lambda params, tokens, key: cross_entropy(model.apply(params, tokens[:, :-1]), tokens[:, 1:])
    setting = dict(loss=model_loss, config=replace(CONFIG, steps=3, optimizer="muon"))
    setting["init"] = lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))
    _, rows = train(**setting)
    many, many_rows = train(**setting, mesh=device_mesh(CUBE))
    np.testing.assert_allclose(losses(many_rows), losses(rows), atol=1e-4)
    params = named_leaves(many.params["params"])
    places = {re.sub(r".*(block_\d.*)", r"\1", path): x.sharding.spec[-2:] for path, x in params.items()}
    assert places["ngrams/embedding"] == (("tensor", "fsdp"), None)
    assert places["block_0/mixer/q_proj/kernel"] == places["block_0/mlp/up_proj/kernel"] == ("fsdp", "tensor")
    assert places["block_0/mixer/out_proj/kernel"] == ("tensor", "fsdp")
    assert places["block_0/mixer/q_conv/kernel"] == (None, "tensor")
    mamba = jax.eval_shape(Mamba(16).init, jax.random.key(0), jnp.zeros((1, 1, 16)))
    groups = {
        group: {
            path.rpartition("/")[2] for path, yes in named_leaves(matching(pattern)([params, mamba])).items() if yes
        }
        for group, pattern in (("decayed", DECAYED), ("state space", STATE_SPACE), ("hidden", HIDDEN))
    }
    assert groups["decayed"] == {"kernel", "dt_kernel", "embedding"} and groups["hidden"] == {"kernel"}
    assert not groups["state space"]


def test_sharded_compilation_gathers_nothing_whole(capfd):
    train(mesh=device_mesh(CUBE), config=replace(CONFIG, steps=1))
    assert "rematerialization" not in capfd.readouterr().err


MOVES = [(CUBE, MeshConfig()), (MeshConfig(), MeshConfig(fsdp=4))]


@pytest.mark.parametrize(("before", "after"), by_default(MOVES[:1], MOVES))
def test_restores_onto_another_number_of_devices(tmp_path, unbroken, before, after):
    _, rows = unbroken
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(Interrupted):
            train(batches=interrupt_at(5), mesh=device_mesh(before), checkpoints=checkpoints)
        resumed, rest = train(mesh=device_mesh(after), checkpoints=checkpoints)
    assert resumed.first_step == 6
    assert len(jax.tree.leaves(resumed.params)[0].devices()) == np.prod(list(vars(after).values()))
    np.testing.assert_allclose(losses(rest), losses(rows)[6:], atol=1e-4)


def test_accumulation_equals_the_large_batch():
    whole, rows = train(quiet_loss)
    parts, part_rows = train(quiet_loss, config=replace(CONFIG, accumulate=4))
    np.testing.assert_allclose(losses(part_rows), losses(rows), rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), parts.params, whole.params)


def poisoned(steps):
    """A loss that is not a number at these steps, told to it by a token out of range."""

    def bad_loss(params, batch, key):
        value, metrics = loss(params, batch["tokens"], key)
        return value * batch["factor"][0], metrics

    factors = lambda n: np.full((8,), np.nan if n + 1 in steps else 1, np.float32)
    return bad_loss, lambda n: {"tokens": batches(n), "factor": factors(n)}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    result, rows = train(*poisoned([5, 6]), config=replace(CONFIG, steps=6, warmup_steps=3))
    before, _ = train(
        *poisoned([]), config=replace(CONFIG, steps=4), optimizer=make_optimizer(replace(CONFIG, steps=6))
    )
    assert result.skipped == 2 and [row["skipped"] for row in rows] == [0, 0, 0, 0, 1, 2]
    assert digest(result.params) == digest(before.params)


def test_a_run_of_steps_that_are_not_finite_stops_with_their_numbers():
    with pytest.raises(FloatingPointError, match=r"steps 5 to 7, 3 in a row; lower train.learning_rate"):
        train(*poisoned([2, 5, 6, 7, 8]))


def test_groups_of_parameters():
    """With a zero gradient only decay moves a parameter; with an equal one, state-space parameters move less."""
    params = init(jax.random.key(0))
    config = replace(CONFIG, warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(config)
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):
        update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])
        still, moved = update(zero), update(jax.tree.map(jnp.ones_like, params))
    decayed = {path for path, x in named_leaves(still).items() if np.any(x)}
    assert decayed == {f"params/{name}" for name in ("table/embedding", "block/up/kernel", "block/down/kernel")}
    block = moved["params"]["block"]
    np.testing.assert_allclose(block["log_dt"], -config.state_space_learning_rate, rtol=1e-4)
    np.testing.assert_allclose(block["up"]["bias"], -config.learning_rate, rtol=1e-4)


def test_muon_moves_matrices_along_orthogonal_directions():
    """All singular values of a step are about the same, on every layer of a stack; other parameters step by Adam."""
    rng = np.random.default_rng(0)
    shapes = {"a_proj": {"kernel": (3, 8, 32)}, "head": {"kernel": (8, 32)}}
    is_shape = lambda x: isinstance(x, tuple)
    grads = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=is_shape)
    params, steps = jax.tree.map(jnp.zeros_like, grads), {}
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(replace(CONFIG, warmup_steps=0, optimizer=name))
        update = jax.jit(lambda grads, own=optimizer: own.update(grads, own.init(params), params)[0])
        with jax.numpy_dtype_promotion("standard"):
            steps[name] = update(grads)
    np.testing.assert_allclose(steps["muon"]["head"]["kernel"], steps["adamw"]["head"]["kernel"], rtol=1e-5)
    singular = np.linalg.svd(steps["muon"]["a_proj"]["kernel"], compute_uv=False)
    equal = 0.2 * 32**0.5 * CONFIG.learning_rate
    assert singular.shape == (3, 8) and (0.6 * equal < singular).all() and (singular < 1.3 * equal).all()


def test_state_space_names_are_whole_names():
    tree = {"layer": dict.fromkeys(("A_real", "B", "log_dt", "Lambda_re", "b", "kernel_B", "BB", "bias", "A_log"), 0)}
    found = named_leaves(matching(STATE_SPACE)(tree))
    assert {path for path, yes in found.items() if yes} == {
        f"layer/{n}" for n in ("A_real", "B", "log_dt", "Lambda_re")
    }


def test_learning_rate_rises_then_falls_to_its_final_ratio():
    schedule = learning_rate(replace(CONFIG, steps=100, warmup_steps=10, final_learning_rate_ratio=0.1))
    np.testing.assert_allclose([schedule(10), schedule(100)], [1e-2, 1e-3], rtol=1e-5)
    assert 0 < schedule(0) < schedule(5) < schedule(10) > schedule(50) > schedule(100)


def test_rules_speak_of_trailing_axes_and_leave_out_what_does_not_divide():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {"stack": {"up": {"kernel": shape(3, 8, 6)}}, "odd": {"kernel": shape(7, 6)}, "scale": shape(8)}
    placed = {path: s.spec for path, s in named_leaves(shardings(tree, device_mesh(CUBE))).items()}
    assert placed == {"stack/up/kernel": P(None, "fsdp", "tensor"), "odd/kernel": P(None, "tensor"), "scale": P()}


def test_cross_entropy_counts_what_is_asked():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.bfloat16)
    targets = jnp.array([[1, -100, 4], [0, 2, -100]])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), jnp.maximum(targets, 0))
    value, metrics = cross_entropy(logits, targets, bytes_per_token=2.0)
    np.testing.assert_allclose(value, np.mean(np.asarray(expected)[np.asarray(targets) >= 0]), rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_byte"], value / np.log(2) / 2, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(logits, targets, mask=targets >= 0)[0], value)
    beyond = targets.at[0, 0].set(5)
    with pytest.raises(ValueError, match="targets holds 5; the vocabulary of logits is 0 to 4"):
        cross_entropy(logits, beyond)
    assert np.isnan(jax.jit(cross_entropy)(logits, beyond)[0])
    left_out = beyond != 5  # as where padding is a token more
    kept = cross_entropy(logits, targets, mask=left_out & (targets >= 0))[0]
    for call in (cross_entropy, jax.jit(cross_entropy)):
        np.testing.assert_allclose(call(logits, beyond, mask=left_out & (targets >= 0))[0], kept, rtol=1e-6)


def test_what_layers_sow_is_part_of_the_loss():
    """The cost of a learned span; of a model that sows nothing 0."""
    x = jnp.ones((1, 6, 8))
    for mixer, cost in ((Attention(8, max_span=4, span_loss=0.5), 0.5 * 4 * 0.25), (Attention(8), 0.0)):
        params = jax.jit(mixer.init)(jax.random.key(0), x)
        params = jax.tree_util.tree_map_with_path(lambda path, p: p + 0.25 * ("span" in str(path)), params)
        y, sown = jax.jit(partial(with_sown, mixer))(params, x)
        np.testing.assert_allclose(sown, cost, rtol=1e-6)
        np.testing.assert_array_equal(y, jax.jit(mixer.apply)(params, x))


def test_metrics_in_parts_are_those_of_the_whole():
    x = np.random.default_rng(0).standard_normal(7).astype(np.float32)
    loss = lambda params, batch, key: (0.0, {"square": jnp.mean((params * batch) ** 2), "no key": float(key is None)})
    for size in (1, 3, 7, 100):
        found = mean_metrics(loss, 2.0, lambda rows: x[rows], len(x), size=size)
        assert found == pytest.approx({"square": np.mean((2 * x) ** 2), "no key": 1.0}, rel=1e-6)
    with pytest.raises(ValueError, match="count=0 and size=100 must be at least 1"):
        mean_metrics(loss, 2.0, lambda rows: x[rows], 0)


def test_config_mesh_and_batch_must_agree():
    with pytest.raises(
        ValueError, match=r"^train.batch_size=6 is not divisible by mesh.data=2 x mesh.fsdp=2; choose 8.$"
    ):
        train(config=replace(CONFIG, batch_size=6), mesh=device_mesh(CUBE))
    with pytest.raises(ValueError, match=r"train.batch_size=16 rows"):
        train(config=replace(CONFIG, batch_size=16))
    with pytest.raises(ValueError, match=r"mesh.data=4 x mesh.tensor=4 needs 16 devices; 8 here"):
        device_mesh(MeshConfig(data=4, tensor=4))
    with pytest.raises(ValueError, match=r"build it with device_mesh"):
        train(mesh=jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "tensor", "sequence")))
    with pytest.raises(ValueError, match=r"mesh.sequence=2 does not divide axis 1 of all arrays .* \[5\]"):
        train(mesh=device_mesh(MeshConfig(sequence=2)))
    with pytest.raises(ValueError, match=r"alike \(lengths \[50, 8\]\); it is their time"):
        shard_batch({"x": np.zeros((8, 50, 2)), "y": np.zeros((8, 8))}, device_mesh(MeshConfig(sequence=2)))
    with pytest.raises(ValueError, match=r"^train.learning_rate=-1 must be above 0.$"):
        TrainConfig(learning_rate=-1)


def saved(folder, steps=6):
    with Checkpoints(folder, CheckpointConfig(every=3)) as checkpoints:
        train(config=replace(CONFIG, steps=steps), checkpoints=checkpoints)


def test_checkpoint_of_another_config(tmp_path):
    saved(tmp_path)
    wider = lambda key: jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.shape == (VOCAB, WIDTH) else x, init(key))
    halved = lambda key: jax.tree.map(lambda x: x.astype(jnp.bfloat16), init(key))
    for other, difference in (
        (wider, r"params/params/table/embedding is float32\(16, 8\) there and float32\(32, 8\) here"),
        (halved, r"params/params/block/down/kernel is float32\(32, 8\) there and bfloat16\(32, 8\) here"),
    ):
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(ValueError, match=rf"of another config: {difference}.$"),
        ):
            fit(loss, other, batches, config=CONFIG, checkpoints=checkpoints)


def wreck(folder, how):
    for file in filter(lambda f: f.is_file(), sorted(folder.rglob("*"))):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if how == "truncated" else b"\xffgarbage" * 20)


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("how", by_default(["garbage"], ["truncated", "garbage"]))
def test_corrupt_checkpoint_names_itself_and_the_way_out(tmp_path, how):
    saved(tmp_path)
    wreck(tmp_path / "6", how)
    files = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError) as caught:
        train(checkpoints=checkpoints)
    assert re.search(r"/6 is corrupt \(.*\); remove that folder to resume from step 3\.$", str(caught.value))
    assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == files
    with pytest.raises(ValueError, match=r"/6 is corrupt"):
        restore_parameters(tmp_path)
    wreck(tmp_path / "3", how)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=r"start from the beginning"):
        train(checkpoints=checkpoints)


@pytest.mark.slow
def test_every_damaged_file_is_noticed_or_harmless(tmp_path):
    """Each file of a checkpoint in turn: the error is ours, or the state is the one saved."""
    saved(tmp_path, steps=3)
    whole, _ = train(config=replace(CONFIG, steps=3))
    for file in filter(lambda f: f.is_file(), sorted((tmp_path / "3").rglob("*"))):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        try:
            with Checkpoints(tmp_path) as checkpoints:
                result, _ = train(config=replace(CONFIG, steps=3), checkpoints=checkpoints)
            assert digest(result.params) == digest(whole.params), file
        except ValueError as error:
            assert "is corrupt" in str(error), file
        file.write_bytes(content)


def test_no_checkpoint_to_restore(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        restore_parameters(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
