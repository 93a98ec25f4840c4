"""Checkpoints of other libraries, read and written: the same logits, the same tokens, and one clear error."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import random_params
from recorded import REFERENCE, assert_near, load, recorded
from sampled import by_default

from experiments import generate as generation
from jaxseq import GLA, LanguageModel, Mamba
from jaxseq.decode import byte_text, generate
from jaxseq.interop import fla_layer, load_huggingface, save_huggingface, tokenizer_text
from jaxseq.layers import GatedMLP
from jaxseq.mixers import HGRN2, DeltaNet, GatedDeltaNet, Mamba2, RetNet
from jaxseq.train import MeshConfig, device_mesh

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
TINY = ["hf_mamba_tiny", "hf_mamba2_tiny"]


@pytest.fixture(scope="module")
def tiny():
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = (*load_huggingface(REFERENCE / name), dict(np.load(REFERENCE / name / "io.npz")))
        return kept[name]

    return of


def written(model, tree, folder):
    """A tree of ours under their names, by way of a checkpoint."""
    save_huggingface(model, tree, folder)
    return safetensors.load_file(folder / "model.safetensors")


@recorded
@pytest.mark.parametrize("name", TINY)
def test_logits_loss_and_gradients(name, tiny, tmp_path):
    model, params, z = tiny(name)
    tokens = jnp.asarray(z["input_ids"])

    def loss(params):
        logits = model.apply(params, tokens)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)
        return -picked.mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, z["logits_fp64"], atol=1e-4)
    np.testing.assert_allclose(value, z["loss"], atol=1e-5)
    named = written(model, gradients, tmp_path)
    expected = {key.removeprefix("grad/"): z[key] for key in z if key.startswith("grad/")}
    assert set(named) == set(expected)
    assert_near(named, {key: expected[key] for key in named}, 5e-4)


@recorded
@pytest.mark.parametrize("name", by_default(TINY[:1], TINY))
def test_greedy_continuation_is_identical(name, tiny):
    """Sixteen tokens, by the decoder; the logits of each step and the states after the prompt."""
    model, params, z = tiny(name)
    length = int(z["prompt_len"])
    prompt, greedy = z["greedy_ids"][:, :length], z["greedy_ids"][:, length:]
    drawn = generate(model, params, prompt, max_tokens=16, key=jax.random.key(0), temperature=0.0)
    np.testing.assert_array_equal(drawn, greedy)

    @jax.jit
    def replay(params):
        logits, state = model.apply(params, jnp.asarray(prompt), model.init_state(2), method="prefill")
        step = lambda state, token: model.apply(params, token, state, method="step")[::-1]
        _, rest = jax.lax.scan(step, state, jnp.asarray(greedy[:, :-1]).T)
        return jnp.concatenate([logits[:, -1:], rest.swapaxes(0, 1)], axis=1), state

    logits, state = replay(params)
    np.testing.assert_allclose(logits, z["greedy_step_logits"], atol=2e-4)
    (mixer,) = state.layers
    for i in range(2):
        ssm = z[f"prefill_ssm_state_{i}"]
        ssm = ssm.swapaxes(2, 3) if ssm.ndim == 4 else ssm
        assert_near(mixer.ssm[i], ssm, 1e-5)
        assert_near(mixer.conv[i], z[f"prefill_conv_state_{i}"][..., 1:].swapaxes(1, 2), 1e-5)


@recorded
@pytest.mark.parametrize("name", by_default(TINY[:1], TINY))
def test_padding_is_a_segment_of_its_own(name, tiny):
    """Theirs masks what is padded on the left; here it is another segment."""
    model, params, z = tiny(name)
    mask = z["attention_mask_leftpad"]
    logits = jax.jit(model.apply)(params, jnp.asarray(z["input_ids"]), jnp.asarray(mask, jnp.int32))
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(logits)[real], z["logits_leftpad"][real], atol=2e-4)


@recorded
@pytest.mark.parametrize("name", TINY)
def test_written_and_read_again_is_identical(name, tiny, tmp_path):
    model, params, _ = tiny(name)
    save_huggingface(model, params, tmp_path)
    theirs, ours = (safetensors.load_file(f / "model.safetensors") for f in (REFERENCE / name, tmp_path))
    assert set(theirs) == set(ours)
    for key, array in theirs.items():
        np.testing.assert_array_equal(ours[key], array, err_msg=key)
    config, ours = (json.loads((f / "config.json").read_text()) for f in (REFERENCE / name, tmp_path))
    assert {key for key, value in ours.items() if config.get(key) != value} <= {"chunk_size"}
    again, same = load_huggingface(tmp_path)
    assert repr(again) == repr(model)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@recorded
@pytest.mark.parametrize("name", by_default(TINY[1:], TINY))
def test_every_device_reads_its_part(name, tiny):
    model, params, z = tiny(name)
    mesh = device_mesh(MeshConfig(fsdp=4, tensor=2))
    _, split = load_huggingface(REFERENCE / name, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split, params)
    kernel = split["params"]["stack"]["layers"]["block_0"]["mixer"]["in_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    logits = jax.jit(model.apply)(split, jnp.asarray(z["input_ids"]))
    np.testing.assert_allclose(logits, z["logits_fp64"], atol=1e-4)


@recorded
def test_a_model_of_flash_linear_attention(tmp_path):
    """Their GLA under its own names: logits, and a round trip."""
    z = load("fla_model_gla")
    weights = {key.removeprefix("w."): a for key, a in z.items() if key.startswith("w.")}
    config = {
        "model_type": "gla", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2,
        "expand_k": 0.5, "expand_v": 1, "intermediate_size": 64, "norm_eps": 1e-6, "hidden_act": "swish",
        "tie_word_embeddings": False, "use_short_conv": False,
    }  # fmt: skip
    write(tmp_path, config, weights)
    model, params = load_huggingface(tmp_path)
    assert_near(jax.jit(model.apply)(params, jnp.asarray(z["input_ids"])), z["logits"], 1e-5)
    save_huggingface(model, params, tmp_path / "again")
    for key, array in safetensors.load_file(tmp_path / "again" / "model.safetensors").items():
        np.testing.assert_array_equal(array, weights[key])


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file({k: np.ascontiguousarray(a) for k, a in weights.items()}, folder / "model.safetensors")


@recorded
@pytest.mark.parametrize("name", by_default(TINY[1:], TINY))
def test_the_names_of_the_original_release(name, tiny, tmp_path):
    """Another config, another name of the table, a padded vocabulary, and always a head."""
    model, params, _ = tiny(name)
    weights = safetensors.load_file(REFERENCE / name / "model.safetensors")
    pad = lambda a: np.pad(a, ((0, 104 - 97), (0, 0)))
    table = pad(weights.pop("backbone.embeddings.weight"))
    weights |= {"backbone.embedding.weight": table, "lm_head.weight": pad(weights.get("lm_head.weight", table[:97]))}
    tied, mamba2 = model.tied, "mamba2" in name
    ssm = {"layer": "Mamba2", "headdim": 16, "d_state": 16} if mamba2 else {"d_state": 16}
    config = {"d_model": model.d_model, "n_layer": 2, "vocab_size": 97, "ssm_cfg": ssm, "rms_norm": True}
    write(tmp_path, config | {"tie_embeddings": tied}, weights)
    released, theirs = load_huggingface(tmp_path)
    assert released.vocab_size == 104
    tokens = jnp.arange(12).reshape(1, 12) % 97
    same = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(jax.jit(released.apply)(theirs, tokens)[..., :97], same, atol=1e-6)
    if tied:
        weights["lm_head.weight"] = weights["lm_head.weight"] + 1
        write(tmp_path, config | {"pad_vocab_size_multiple": 8, "tie_embeddings": True}, weights)
        with pytest.raises(ValueError, match=r"lm_head\.weight is not backbone"):
            load_huggingface(tmp_path)


MODELS = {
    "mamba": LanguageModel(
        11, 16, (partial(Mamba, state_size=4, dt_rank=3, dt_min=1e-2, dt_max=0.2),) * 2, mlp=None, norm_eps=1e-5
    ),
    "mamba2": LanguageModel(
        11,
        16,
        (partial(Mamba2, state_size=4, num_heads=4, num_groups=2, dt_limit=(0.0, 0.1), use_bias=True),) * 2,
        mlp=None,
        tied=True,
        norm_eps=1e-5,
    ),
    "gla": LanguageModel(11, 16, (partial(GLA, num_heads=2, conv_window=4, norm_eps=1e-6),) * 3),
    "retnet": LanguageModel(11, 16, (partial(RetNet, num_heads=2, conv_window=3, norm_eps=1e-6),) * 2),
    "delta_net": LanguageModel(11, 16, (partial(DeltaNet, num_heads=2, conv_window=None, norm_eps=1e-6),) * 2),
    "gated_deltanet": LanguageModel(
        11,
        12,  # 10/12 and 28/12 are no floats, and widths come back whole
        (partial(GatedDeltaNet, num_heads=2, num_value_heads=4, expand_k=10 / 12, expand_v=28 / 12, norm_eps=1e-6),)
        * 2,
        tied=True,
    ),
    "hgrn2": LanguageModel(11, 16, (partial(HGRN2, num_heads=2, conv_window=4, norm_eps=1e-6),) * 2),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of these models, written once."""
    kept = {}

    def of(name):
        if name not in kept:
            model, folder = MODELS[name], tmp_path_factory.mktemp(name)
            save_huggingface(model, random_params(model, jnp.zeros((1, 1), jnp.int32)), folder)
            kept[name] = folder
        return kept[name], json.loads((kept[name] / "config.json").read_text())

    return of


def edited(folder, source, config):
    """The weights of a folder beside another config."""
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", by_default(["gla"], MODELS))
def test_any_model_comes_back(name, tmp_path):
    """Also in two shards with an index, in bfloat16 on disk, and with other defaults."""
    model = MODELS[name]
    params = random_params(model, jnp.zeros((1, 1), jnp.int32))
    save_huggingface(model, params, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    again, same = load_huggingface(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    tokens = jnp.arange(9)[None]
    np.testing.assert_array_equal(jax.jit(again.apply)(same, tokens), jax.jit(model.apply)(params, tokens))

    weights = safetensors.load_file(tmp_path / "model.safetensors")
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    where = {key: f"model-{i}.safetensors" for i, half in enumerate(halves) for key in half}
    for i, half in enumerate(halves):
        half = {key: array.astype(jnp.bfloat16) for key, array in half.items()} if i else half
        safetensors.save_file(half, tmp_path / f"model-{i}.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    _, mixed = load_huggingface(tmp_path)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(mixed))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-2), mixed, params)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"misses model-1.safetensors: the download is not whole"):
        load_huggingface(tmp_path)


#: Their layers, as recorded, in models of two: the file, the class, the config, our fields.
RECORDED = {
    "retnet": (
        "fla_layer_retnet", "MultiScaleRetention", {"expand_k": 1, "expand_v": 2.0, "num_heads": 2}, dict(num_heads=2),
    ),
    "delta_net": (
        "fla_layer_delta_net",
        "DeltaNet",
        {"expand_k": 1.0, "expand_v": 1, "num_heads": 2, "qk_norm": "l2", "qk_activation": "silu", "use_gate": False},
        dict(num_heads=2),
    ),
    "gated_deltanet": (
        "fla_layer_gated_deltanet",
        "GatedDeltaNet",
        {"head_dim": 16, "expand_v": 2, "num_heads": 2, "num_v_heads": None, "use_gate": True},
        dict(num_heads=2, expand_k=1.0, expand_v=2.0),
    ),
    "hgrn2": ("fla_layer_hgrn2", "HGRN2Attention", {"expand_ratio": 16, "num_heads": 2}, dict(num_heads=2)),
}  # fmt: skip


@recorded
@pytest.mark.parametrize("name", by_default(["gated_deltanet", "hgrn2"], RECORDED))
def test_their_layers_in_a_model_of_theirs(name, tmp_path):
    """Names and config as theirs; the logits of blocks written out, and of layers that agree with the record."""
    file, layer, config, fields = RECORDED[name]
    z, draw = load(file), np.random.default_rng(0)
    attention = {key.removeprefix("w."): a for key, a in z.items() if key.startswith("w.")}
    array = lambda *shape: draw.normal(size=shape).astype(np.float32)
    weights = {"model.embeddings.weight": array(7, 32), "model.norm.weight": array(32), "lm_head.weight": array(7, 32)}
    bounds = [z["lower_bound"] * i for i in range(2)] if name == "hgrn2" else [None] * 2
    if name == "hgrn2":  # Γ, of which they take the softmax over the layers
        weights["model.lower_bounds"] = np.stack([np.zeros(32), np.log(bounds[1] / (1 - bounds[1]))]).astype(np.float32)
    for i in range(2):
        of = {f"attn.{key}": a for key, a in attention.items()}
        of |= {f"mlp.{x}_proj.weight": array(24, 32) / 6 for x in ("gate", "up")}
        of |= {"mlp.down_proj.weight": array(32, 24) / 5, "attn_norm.weight": array(32), "mlp_norm.weight": array(32)}
        weights |= {f"model.layers.{i}.{key}": a for key, a in of.items()}
    config = config | {
        "model_type": name, "vocab_size": 7, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24,
        "norm_eps": 1e-6, "hidden_act": "swish", "attn": None, "tie_word_embeddings": False,
    }  # fmt: skip
    write(tmp_path, config, weights)
    model, params = load_huggingface(tmp_path)

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight[None, None]

    tokens = jnp.arange(10).reshape(2, 5) % 7
    x = jnp.asarray(weights["model.embeddings.weight"])[tokens]
    for i in range(2):
        w = {key.removeprefix(f"model.layers.{i}."): a for key, a in weights.items() if f"layers.{i}." in key}
        bound = {} if bounds[i] is None else {"lower_bound": tuple(bounds[i].tolist())}
        mixer, its = fla_layer(layer, attention, norm_eps=1e-6, **fields, **bound)
        x += jax.jit(mixer.apply)(its, norm(x, w["attn_norm.weight"]))
        y = norm(x, w["mlp_norm.weight"])
        x += (jax.nn.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)) @ w[
            "mlp.down_proj.weight"
        ].T
    logits = norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    assert_near(jax.jit(model.apply)(params, tokens), logits, 1e-5)
    if name == "hgrn2":
        with pytest.raises(ValueError, match="mixers differ in lower_bound"):
            save_huggingface(model, params, tmp_path / "again")
        del weights["model.lower_bounds"]
        write(tmp_path, config, weights)
        with pytest.raises(ValueError, match=r"model\.lower_bounds is missing"):
            load_huggingface(tmp_path)
    else:
        save_huggingface(model, params, tmp_path / "again")
        again = safetensors.load_file(tmp_path / "again" / "model.safetensors")
        assert set(again) == set(weights)
        for key, a in weights.items():
            np.testing.assert_array_equal(again[key], a, err_msg=key)


@pytest.mark.parametrize(
    "name, words",
    [
        ("gla", {"use_gv": True}),
        ("gla", {"fuse_norm": False}),
        ("retnet", {"use_output_gate": False}),
        ("retnet", {"num_kv_heads": 1}),
        ("retnet", {"feature_map": "relu"}),
        ("retnet", {"conv_bias": True}),
        ("delta_net", {"use_gate": True}),
        ("delta_net", {"use_beta": False}),
        ("delta_net", {"qk_norm": "sum"}),
        ("delta_net", {"qk_activation": "elu"}),
        ("delta_net", {"allow_neg_eigval": True}),
        ("gated_deltanet", {"use_gate": False}),
        ("gated_deltanet", {"conv_bias": True}),
        ("gated_deltanet", {"expand_v": 0.3}),
        ("gated_deltanet", {"attn": {"layers": [0], "num_heads": 2}}),
        ("hgrn2", {"conv_bias": True}),
        ("hgrn2", {"num_heads": 3}),
        ("hgrn2", {"hidden_act": "gelu"}),
    ],
)
def test_what_our_mixers_do_not_do(name, words, saved, tmp_path):
    source, config = saved(name)
    edited(tmp_path, source, config | words)
    ((key, value),) = words.items()
    with pytest.raises(ValueError) as caught:
        load_huggingface(tmp_path)
    assert f"has {key}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("mamba", "hidden_size", None),
        ("mamba", "hidden_size", True),
        ("mamba", "vocab_size", 11.0),
        ("mamba", "num_hidden_layers", -1),
        ("mamba", "model_type", ["mamba"]),
        ("mamba", "time_step_rank", "automatic"),
        ("mamba", "time_step_min", "0.001"),
        ("mamba", "layer_norm_epsilon", None),
        ("mamba", "tie_word_embeddings", "yes"),
        ("mamba2", "num_heads", "4"),
        ("mamba2", "time_step_limit", None),
        ("mamba2", "time_step_limit", [0.0]),
        ("mamba2", "time_step_limit", [0.0, "Infinity"]),
        ("mamba2", "time_step_limit", [0.0, {"__float__": "NaN"}]),
        ("gla", "expand_k", "half"),
        ("gla", "clamp_min", []),
        ("gated_deltanet", "head_dim", 0),
        ("gated_deltanet", "allow_neg_eigval", 1),
        ("release", "d_model", None),
        ("release", "ssm_cfg", []),
        ("release", "pad_vocab_size_multiple", "8"),
        ("release, ssm_cfg", "layer", ["Mamba2"]),
        ("release, ssm_cfg", "dt_limit", [0.0, None]),
    ],
)
def test_a_config_value_of_the_wrong_kind(name, key, value, saved, tmp_path):
    """One error with the name, the value and what is allowed."""
    source, config = saved("mamba" if "release" in name else name)
    if "release" in name:
        config = {"d_model": 16, "n_layer": 2, "vocab_size": 11, "rms_norm": True, "ssm_cfg": {"layer": "Mamba2"}}
    inner = config["ssm_cfg"] if "ssm_cfg" in name else config
    inner[key] = value
    edited(tmp_path, source, config)
    with pytest.raises(ValueError, match="; (give|it is read with|choose) ") as caught:
        load_huggingface(tmp_path)
    assert f"has {key}={value!r}" in str(caught.value)


def test_infinity_in_both_spellings(saved, tmp_path):
    source, config = saved("mamba2")
    for infinity in (float("inf"), {"__float__": "Infinity"}):
        edited(tmp_path, source, config | {"time_step_limit": [0, infinity]})
        (mixer, *_) = load_huggingface(tmp_path)[0].mixers
        assert mixer.keywords["dt_limit"] == (0.0, float("inf"))


def test_a_release_says_how_its_layers_started(saved, tmp_path):
    source, _ = saved("mamba")
    ssm = {"d_state": 4, "dt_rank": 3, "dt_min": 0.01, "dt_max": 0.2, "dt_init": "random", "dt_init_floor": 1e-4}
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 11, "rms_norm": True, "tie_embeddings": False}
    config |= {"pad_vocab_size_multiple": 1, "ssm_cfg": ssm | {"conv_init": None, "A_init_range": [1, 16]}}
    edited(tmp_path, source, config)
    assert repr(load_huggingface(tmp_path)[0]) == repr(load_huggingface(source)[0])


# ---- what goes along with a model ------------------------------------------------------------------------------------

ALONG = {
    "tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "merges.txt": "a b", "generation_config.json": "{} ",
}  # fmt: skip


def everything(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_the_model_does_not_hold_goes_along(saved, tmp_path):
    """Special tokens, the tokenizer, generation_config.json; no word of the architecture or of other weights."""
    source, config = saved("mamba")
    tokens = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": None}
    words = {"transformers_version": "5", "time_step_floor": 1e-3, "initializer_range": 0.5, "use_cache": True}
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    edited(theirs, source, config | tokens | words | {"torch_dtype": "bfloat16", "state_size": 4})
    for name, text in (ALONG | {"notes.md": "x", "optimizer.bin": "x"}).items():
        (theirs / name).write_text(text)

    other = MODELS["mamba"].clone(mixers=(partial(Mamba, state_size=2),) * 2)
    params = random_params(other, jnp.zeros((1, 1), jnp.int32))
    ours = tmp_path / "ours"
    save_huggingface(other, params, ours, like=theirs)
    written = everything(ours)
    assert set(written) == {"config.json", "model.safetensors", *ALONG}
    assert all(written[name].decode() == text for name, text in ALONG.items())
    said = json.loads(written["config.json"])
    assert said | tokens | words == said and said["state_size"] == 2 and "torch_dtype" not in said
    again = tmp_path / "again"
    save_huggingface(*load_huggingface(ours), again, like=ours)
    assert everything(again) == written
    save_huggingface(*load_huggingface(ours), ours, like=ours)
    assert everything(ours) == written

    save_huggingface(*load_huggingface(saved("gla")[0]), tmp_path / "gla", like=theirs)
    said = json.loads((tmp_path / "gla" / "config.json").read_text())
    assert said == saved("gla")[1] | tokens
    with pytest.raises(FileNotFoundError, match="is no folder"):
        save_huggingface(other, params, ours, like=tmp_path / "none")
    assert everything(ours) == written


def test_what_the_format_has_no_word_for(tmp_path):
    mamba = partial(Mamba, state_size=4)
    for model, error, match in (
        (LanguageModel(11, 16, (mamba,), norm_eps=1e-5), ValueError, "no word for mlp=.*give mlp=None"),
        (LanguageModel(11, 16, (mamba,), mlp=None, ngrams=(2,)), ValueError, r"ngrams=\(2,\)"),
        (LanguageModel(11, 16, (mamba, GLA), mlp=None), NotImplementedError, "layers of one of Mamba"),
        (LanguageModel(11, 16, (mamba, partial(Mamba, expand=3)), mlp=None), ValueError, "expand, state_size; this"),
        (LanguageModel(11, 16, (partial(GLA, num_heads=2, norm_eps=1e-6),), mlp=None), ValueError, "mlp=None"),
        (LanguageModel(11, 16, (partial(RetNet, norm_eps=1e-6, rotary_base=9.0),)), ValueError, "rotary_base=9.0"),
        (LanguageModel(11, 16, (partial(GLA, num_heads=2, gate="scalar"),)), ValueError, "gate='scalar'"),
        (LanguageModel(11, 16, (partial(GLA, num_heads=2, norm_eps=1e-6),), mlp=partial(GatedMLP)), None, ""),
    ):
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        if error is None:
            save_huggingface(model, jax.tree.map(lambda x: jnp.zeros(x.shape), params), tmp_path)
            continue
        with pytest.raises(error, match=match):
            save_huggingface(model, params, tmp_path)
    assert (tmp_path / "config.json").exists()


@recorded
@pytest.mark.parametrize(
    "fault, error, match",
    [
        ("truncated", ValueError, "model.safetensors is damaged, or its download is not whole"),
        ("no weights", FileNotFoundError, "holds neither model.safetensors nor"),
        ("pickled", FileNotFoundError, "but pytorch_model.bin; weights that are pickled are not read"),
        ("no config", FileNotFoundError, "config.json is missing"),
        ("half a config", ValueError, "config.json is not valid JSON"),
        ("architecture", NotImplementedError, "model_type='llama' has no model here; choose one of mamba, mamba2"),
        ("activation", ValueError, "hidden_act='relu'"),
        ("no word", ValueError, "misses 'state_size'"),
        ("nothing", FileNotFoundError, "is no folder"),
    ],
)
def test_a_bad_folder_is_one_line(fault, error, match, tmp_path):
    source = REFERENCE / "hf_mamba_tiny"
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(source / file, tmp_path / file)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    words = json.loads(config.read_text())
    {
        "truncated": lambda: weights.write_bytes(weights.read_bytes()[:-1000]),
        "no weights": lambda: weights.unlink(),
        "pickled": lambda: weights.rename(tmp_path / "pytorch_model.bin"),
        "no config": lambda: config.unlink(),
        "half a config": lambda: config.write_text(config.read_text()[:100]),
        "architecture": lambda: config.write_text(json.dumps(words | {"model_type": "llama"})),
        "activation": lambda: config.write_text(json.dumps(words | {"hidden_act": "relu"})),
        "no word": lambda: config.write_text(json.dumps({k: v for k, v in words.items() if k != "state_size"})),
        "nothing": lambda: shutil.rmtree(tmp_path),
    }[fault]()
    with pytest.raises(error, match=match) as caught:
        load_huggingface(tmp_path)
    assert "\n" not in str(caught.value)


@recorded
def test_all_wrong_weights_are_in_one_error(tmp_path):
    source = REFERENCE / "hf_mamba_tiny"
    weights = safetensors.load_file(source / "model.safetensors")
    shape = "backbone.layers.1.mixer.A_log"
    weights[shape] = weights[shape][:, :8]
    del weights["backbone.layers.0.mixer.D"]
    weights["backbone.layers.2.norm.weight"] = np.zeros(32, np.float32)
    write(tmp_path, json.loads((source / "config.json").read_text()), weights)
    with pytest.raises(ValueError) as caught:
        load_huggingface(tmp_path)
    for part in (
        "backbone.layers.0.mixer.D is missing",
        "backbone.layers.2.norm.weight is unknown",
        "backbone.layers.1.mixer.A_log is (64, 8) and should be (64, 16)",
    ):
        assert part in str(caught.value)


def test_other_names_kinds_and_values_of_weights(saved, tmp_path):
    """The same weight twice and integers are in one error; what is not finite shows as it is read."""
    source, config = saved("mamba")
    weights = safetensors.load_file(source / "model.safetensors")
    twice = weights | {"backbone.embedding.weight": weights["backbone.embeddings.weight"]}
    twice["backbone.layers.0.mixer.D"] = twice["backbone.layers.0.mixer.D"].astype(np.int8)
    del twice["backbone.norm_f.weight"]
    write(tmp_path, config, twice)
    with pytest.raises(ValueError) as caught:
        load_huggingface(tmp_path)
    for part in (
        "backbone.norm_f.weight is missing",
        "backbone.embeddings.weight is backbone.embedding.weight by another name",
        "backbone.layers.0.mixer.D is I8 and should be one of F64, F32, F16, BF16",
    ):
        assert part in str(caught.value)

    broken = {
        "backbone.layers.1.mixer.conv1d.weight": np.nan,
        "backbone.norm_f.weight": np.inf,
        "lm_head.weight": -np.inf,
    }
    write(tmp_path, config, weights | {name: np.full_like(weights[name], value) for name, value in broken.items()})
    with pytest.raises(ValueError, match=f"not finite: {', '.join(sorted(broken))}[.]$"):
        load_huggingface(tmp_path)

    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    shutil.copyfile(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(ValueError, match=r"lm_head\.weight is there twice"):
        load_huggingface(tmp_path)
    for words in ({}, {"weight_map": ["a.safetensors"]}, {"weight_map": {"x": "../a.safetensors"}}):
        index.write_text(json.dumps(words))
        with pytest.raises(ValueError, match="give an object of names of files beside it"):
            load_huggingface(tmp_path)


@recorded
def test_generation_with_the_folder_s_own_tokenizer(tmp_path, monkeypatch, capsys):
    """The script prints the prompt and the greedy continuation; a character of several tokens comes out whole."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    for file in ("config.json", "model.safetensors"):
        shutil.copyfile(REFERENCE / "hf_mamba_tiny" / file, tmp_path / file)
    arguments = ["generate", "--hf", str(tmp_path), "--prompt", "ab é c", "--max-tokens", "20", "--temperature", "0"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit):
        generation.main()
    assert "tokenizer.json is missing" in capsys.readouterr().err

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:97]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    generation.main()
    printed = capsys.readouterr().out
    model, params = load_huggingface(tmp_path)
    text = tokenizer_text(tmp_path)
    prompt = text.encode("ab é c")[None]
    drawn = generate(model, params, prompt, max_tokens=20, key=jax.random.key(0), temperature=0.0, stop=text.stop)
    tokens = [token for token in drawn[0].tolist() if token != text.stop]
    assert printed == "ab é c" + text.decode(tokens) + "\n"

    says = tmp_path / "generation_config.json"
    unseen = next(token for token in range(97) if token not in tokens)
    for stops in ([unseen, tokens[7]], tokens[3]):
        says.write_text(json.dumps({"eos_token_id": stops}))
        end = tokens.index(stops if isinstance(stops, int) else stops[1])
        generation.main()
        assert capsys.readouterr().out == "ab é c" + text.decode(tokens[:end]) + "\n"
    for stops, used in (([], (2,)), (None, (2,)), ([4, 5], (4, 5))):
        says.write_text(json.dumps({"eos_token_id": stops}))
        assert tokenizer_text(tmp_path).stops == used
    says.write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match="eos_token_id='</s>'; give a token's number"):
        tokenizer_text(tmp_path)


def test_a_prompt_is_read_whole_and_spaced(tmp_path):
    """By a tokenizer whose words begin with their space, and whose file asks for truncation and padding."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = ["▁once", "▁upon", "▁a", "▁time", "▁there", "▁was"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=1, pad_token="<pad>", length=32)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    text = tokenizer_text(tmp_path)
    prompt = text.encode("once upon a time there")
    assert prompt.tolist() == [2, 3, 4, 5, 6]
    blocks = [np.asarray([6], np.int32), np.asarray([7], np.int32)]
    assert "".join(text.pieces(blocks, prompt[:4].tolist())) == " there was"
    assert "".join(text.pieces(blocks)) == "there was"


def test_pieces_are_whole_characters():
    text = byte_text()
    drawn = np.frombuffer("naïve €".encode(), np.uint8).astype(np.int32)
    pieces = list(text.pieces(np.append(drawn, [text.stop, 65])[i : i + 1] for i in range(len(drawn) + 2)))
    assert "".join(pieces) == "naïve €" and "ï" in pieces and "€" in pieces
    assert "".join(text.pieces([drawn[1:]], text.encode("n").tolist())) == "aïve €"  # after the sign of a beginning
    assert "".join(text._replace(stops=(text.stop, ord("v"))).pieces([drawn])) == "naï"
