"""Checkpoints of other libraries, read and written: the same logits, the same tokens, and one clear error."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import REFERENCE, assert_near, load, recorded

from experiments import generate as generation
from jaxseq import GLA, LanguageModel, Mamba
from jaxseq.decode import byte_text, generate
from jaxseq.interop import load_huggingface, save_huggingface, tokenizer_text
from jaxseq.layers import GatedMLP
from jaxseq.mixers import Mamba2
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
@pytest.mark.parametrize("name", TINY)
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
@pytest.mark.parametrize("name", TINY)
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
@pytest.mark.parametrize("name", TINY)
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
@pytest.mark.parametrize("name", TINY)
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
    write(tmp_path, config | {"pad_vocab_size_multiple": 8, "tie_embeddings": tied}, weights)
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
    "mamba": LanguageModel(11, 16, (partial(Mamba, state_size=4),) * 2, mlp=None, norm_eps=1e-5),
    "mamba2": LanguageModel(
        11,
        16,
        (partial(Mamba2, state_size=4, num_heads=4, num_groups=2, dt_limit=(0.0, 0.1), use_bias=True),) * 2,
        mlp=None,
        tied=True,
        norm_eps=1e-5,
    ),
    "gla": LanguageModel(11, 16, (partial(GLA, num_heads=2, conv_window=4, norm_eps=1e-6),) * 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_comes_back(name, tmp_path):
    """Also in two shards with an index, in bfloat16 on disk, and with other defaults."""
    model = MODELS[name]
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    save_huggingface(model, params, tmp_path)
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


def test_what_the_format_has_no_word_for(tmp_path):
    mamba = partial(Mamba, state_size=4)
    for model, error, match in (
        (LanguageModel(11, 16, (mamba,), norm_eps=1e-5), ValueError, "d_model=16"),
        (LanguageModel(11, 16, (mamba,), mlp=None, ngrams=(2,)), ValueError, r"ngrams=\(2,\)"),
        (LanguageModel(11, 16, (mamba, GLA), mlp=None), NotImplementedError, "layers of one of Mamba"),
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
        ("pickled", FileNotFoundError, "pytorch_model.bin is pickled"),
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


def test_pieces_are_whole_characters():
    text = byte_text()
    drawn = np.frombuffer("naïve €".encode(), np.uint8).astype(np.int32)
    pieces = list(text.pieces(np.append(drawn, [text.stop, 65])[i : i + 1] for i in range(len(drawn) + 2)))
    assert "".join(pieces) == "naïve €" and "ï" in pieces and "€" in pieces
