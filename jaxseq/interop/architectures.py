"""Language models that other libraries write: their configs as ours, and the names of their weights."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn

from .. import mixers
from ..layers import GatedMLP
from ..models import LanguageModel
from .fla import LAYERS

Config = dict[str, Any]


class Architecture(NamedTuple):
    """One `model_type`. Names are theirs, paths ours; those of layers are within a layer and within a block."""

    read: Callable[[Config], LanguageModel]
    write: Callable[[LanguageModel, Any], Config]  # of a model and the mixer in its slots
    mixer: type
    layer: str  # what the names of layer i begin with
    names: dict[str, str]
    outer: dict[str, str]
    aliases: dict[str, str] = {}  # other names in use


def number(value: Any) -> float:
    """A float, also one that JSON has no word for."""
    return float(value["__float__"]) if isinstance(value, dict) else float(value)


def need(config: Config, **wanted: Any) -> None:
    """Raise where a config asks for what our mixers do not do."""
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json has {name}={config[name]!r}; {config['model_type']} is read with {value!r}.")


def _language_model(config: Config, mixer: Callable[..., nn.Module], norm: str, mlp: Any, **defaults: Any):
    config = defaults | config
    return LanguageModel(
        config["vocab_size"],
        config["hidden_size"],
        (mixer,) * config["num_hidden_layers"],
        mlp=mlp,
        tied=config["tie_word_embeddings"],
        norm_eps=config[norm],
    )


# ---- Mamba and Mamba-2, of transformers and of the original releases ------------------------------------------------


def _released(config: Config) -> Config:
    """A config of the original releases in transformers' words; theirs as it is."""
    if "model_type" in config:
        return config
    ssm = dict(config.get("ssm_cfg") or {})
    kind = {"Mamba1": "mamba", "Mamba2": "mamba2"}.get(layer := ssm.pop("layer", "Mamba1"))
    if kind is None:
        raise NotImplementedError(f"ssm_cfg.layer={layer!r} has no model here; choose Mamba1 or Mamba2.")
    need(config | {"model_type": kind}, rms_norm=True, attn_layer_idx=[], d_intermediate=0)
    multiple = config.get("pad_vocab_size_multiple", 1)
    words = {
        "model_type": kind,
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "hidden_size": config["d_model"],
        "num_hidden_layers": config["n_layer"],
        "state_size": ssm.pop("d_state", 16 if kind == "mamba" else 128),
        "conv_kernel": ssm.pop("d_conv", 4),
        "expand": ssm.pop("expand", 2),
        "use_bias": ssm.pop("bias", False),
        "use_conv_bias": ssm.pop("conv_bias", True),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": config.get("tie_embeddings", True),
    }
    if kind == "mamba":
        words["time_step_rank"] = ssm.pop("dt_rank", "auto")
    else:
        width, head = words["expand"] * words["hidden_size"], ssm.pop("headdim", 64)
        words |= {"num_heads": width // head, "head_dim": head, "n_groups": ssm.pop("ngroups", 1)}
        words["time_step_limit"] = ssm.pop("dt_limit", (0.0, math.inf))
        ssm.pop("chunk_size", None)
    if ssm:
        raise ValueError(f"config.json has ssm_cfg entries that are unknown: {', '.join(ssm)}.")
    return words


def _read_mamba(config: Config) -> LanguageModel:
    need(config, hidden_act="silu", intermediate_size=config["expand"] * config["hidden_size"])
    rank = config["time_step_rank"]
    mixer = partial(
        mixers.Mamba,
        state_size=config["state_size"],
        expand=config["expand"],
        conv_window=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        dt_rank=math.ceil(config["hidden_size"] / 16) if rank == "auto" else rank,
        use_bias=config["use_bias"],
    )
    return _language_model(config, mixer, "layer_norm_epsilon", None, tie_word_embeddings=True)


def _read_mamba2(config: Config) -> LanguageModel:
    width = config["expand"] * config["hidden_size"]
    if config["num_heads"] * config["head_dim"] != width:
        raise ValueError(
            f"config.json has num_heads={config['num_heads']} of head_dim={config['head_dim']}, and expand · "
            f"hidden_size = {width}."
        )
    need(config, hidden_act="silu")
    low, high = map(number, config.get("time_step_limit", (0.0, math.inf)))
    mixer = partial(
        mixers.Mamba2,
        state_size=config["state_size"],
        num_heads=config["num_heads"],
        num_groups=config["n_groups"],
        expand=config["expand"],
        conv_window=config["conv_kernel"],
        conv_bias=config["use_conv_bias"],
        dt_limit=(low, high),
        use_bias=config["use_bias"],
        norm_eps=config["layer_norm_epsilon"],
    )
    return _language_model(config, mixer, "layer_norm_epsilon", None, tie_word_embeddings=False)


def _mamba_config(model: LanguageModel, mixer: Any) -> Config:
    return {
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "layer_norm_epsilon": model.norm_eps,
        "state_size": mixer.state_size,
        "expand": mixer.expand,
        "conv_kernel": mixer.conv_window,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.conv_bias,
    }


def _write_mamba(model: LanguageModel, mixer: Any) -> Config:
    rank = mixer.dt_rank or math.ceil(model.d_model / 16)
    return _mamba_config(model, mixer) | {
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": mixer.expand * model.d_model,
        "time_step_rank": rank,
    }


def _write_mamba2(model: LanguageModel, mixer: Any) -> Config:
    width = mixer.expand * model.d_model
    heads = mixer.num_heads or width // 64
    limit = [{"__float__": "Infinity"} if math.isinf(x) else x for x in mixer.dt_limit]
    return _mamba_config(model, mixer) | {
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": heads,
        "head_dim": width // heads,
        "n_groups": mixer.num_groups,
        "chunk_size": mixer.chunk_size or 256,
        "time_step_limit": limit,
    }


def _mamba(read, write, mixer: type, names: dict[str, str]) -> Architecture:
    biases = {f"{name}.bias": f"{name}/bias" for name in ("in_proj", "out_proj")}
    layer = {"norm.weight": "mixer_norm/scale"}
    return Architecture(
        read,
        write,
        mixer,
        "backbone.layers.{}.",
        layer | {f"mixer.{theirs}": f"mixer/{ours}" for theirs, ours in (names | biases).items()},
        {
            "backbone.embeddings.weight": "Embed_0/embedding",
            "backbone.norm_f.weight": "stack/norm/scale",
            "lm_head.weight": "head/kernel",
        },
        {"backbone.embedding.weight": "backbone.embeddings.weight"},
    )


# ---- flash-linear-attention -----------------------------------------------------------------------------------------


def _read_fla(fields: Callable[[Config], dict[str, Any]], mixer: type, config: Config) -> LanguageModel:
    need(config, attn=None, hidden_act="swish", use_output_gate=True, elementwise_affine=True)
    hidden = config.get("intermediate_size")
    if hidden is None:
        hidden = 256 * -(-int(config["hidden_size"] * config.get("hidden_ratio", 4) * 2 / 3) // 256)
    slot = partial(mixer, norm_eps=config["norm_eps"], **fields(config))
    mlp = partial(GatedMLP, hidden=hidden)
    return _language_model(config, slot, "norm_eps", mlp, tie_word_embeddings=False)


def _convolution(config: Config) -> int | None:
    need(config, conv_bias=False)
    return config.get("conv_size", 4) if config.get("use_short_conv", True) else None


def _gla(config: Config) -> dict[str, Any]:
    need(config, feature_map=None, use_gk=True, use_gv=False)
    return {
        "num_heads": config["num_heads"],
        "num_kv_heads": config.get("num_kv_heads"),
        "expand_k": config["expand_k"],
        "expand_v": config["expand_v"],
        "min_log_decay": config.get("clamp_min"),
        "conv_window": _convolution({"use_short_conv": False} | config),
    }


def _gla_config(model: LanguageModel, mixer: Any) -> Config:
    mlp = GatedMLP(model.d_model) if model.mlp is None else model.mlp(d_model=model.d_model, parent=None)
    return {
        "architectures": ["GLAForCausalLM"],
        "hidden_act": "swish",
        "norm_eps": model.norm_eps,
        "num_heads": mixer.num_heads,
        "num_kv_heads": mixer.num_kv_heads,
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
        "clamp_min": mixer.min_log_decay,
        "use_short_conv": mixer.conv_window is not None,
        "conv_size": mixer.conv_window or 4,
        "intermediate_size": mlp.width(),
    }


def _fla(layer: str, fields, write, mixer: type) -> Architecture:
    mlp = {f"mlp.{name}_proj.weight": f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    norms = {"attn_norm.weight": "mixer_norm/scale", "mlp_norm.weight": "mlp_norm/scale"}
    names = {f"attn.{theirs}": f"mixer/{ours}" for theirs, ours in LAYERS[layer].names.items()}
    outer = {
        "model.embeddings.weight": "Embed_0/embedding",
        "model.norm.weight": "stack/norm/scale",
        "lm_head.weight": "head/kernel",
    }
    return Architecture(partial(_read_fla, fields, mixer), write, mixer, "model.layers.{}.", norms | mlp | names, outer)


ARCHITECTURES = {
    "mamba": _mamba(_read_mamba, _write_mamba, mixers.Mamba, LAYERS["Mamba"].names),
    "mamba2": _mamba(_read_mamba2, _write_mamba2, mixers.Mamba2, LAYERS["Mamba2"].names),
    "gla": _fla("GatedLinearAttention", _gla, _gla_config, mixers.GLA),
}


def architecture(config: Config) -> tuple[Architecture, Config]:
    """The architecture of a config, and the config in the words of its family.

    Raises:
      NotImplementedError: the model type is unknown here; the message lists those that are known.
    """
    config = _released(config)
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise NotImplementedError(f"model_type={kind!r} has no model here; choose one of {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind], config


def of_model(model: LanguageModel) -> tuple[Architecture, Config]:
    """The architecture of a model, and its config.

    Raises:
      NotImplementedError: no architecture has these mixers.
    """
    modules = [slot and slot(d_model=model.d_model, parent=None) for slot in model.mixers]
    kinds = {type(module) for module in modules}
    for name, kind in ARCHITECTURES.items():
        if kinds == {kind.mixer} and all(module == modules[0] for module in modules):
            config = {
                "model_type": name,
                "vocab_size": model.vocab_size,
                "hidden_size": model.d_model,
                "num_hidden_layers": len(modules),
                "tie_word_embeddings": model.tied,
                "dtype": "float32",
            }
            return kind, config | kind.write(model, modules[0])
    known = ", ".join(kind.mixer.__name__ for kind in ARCHITECTURES.values())
    raise NotImplementedError(f"mixers={model.mixers} have no format here; give layers of one of {known}.")
