"""Mamba and Mamba-2, of transformers and of the original releases."""

import math
from functools import partial
from typing import Any

from .. import mixers
from ..models import LanguageModel
from .architecture import Architecture, Config, Take, language_model
from .fla import LAYERS
from .words import COUNT, FLAG, LIMITS, OBJECT, POSITIVE, RANK, TEXT, Words, optional

KINDS = {"Mamba1": "mamba", "Mamba2": "mamba2"}
#: How layers start, in the words of the releases and of transformers; what no field here says is as it is here.
START = {
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "dt_init": "time_step_init_scheme",
    "dt_scale": "time_step_scale",
}
#: How layers start or compute, which parameters that are read do not need.
NOT_READ = {"A_init_range", "conv_init", "chunk_size"}


def of_release(words: Words) -> Words:
    """A config of the original releases in transformers' words.

    Raises:
      NotImplementedError: its layers are of another kind.
      ValueError: a value is of the wrong kind, or asks for what our mixers do not do.
    """
    ssm = Words(words("ssm_cfg", optional(OBJECT), None) or {}, f"{words.where}, ssm_cfg,")
    layer = ssm("layer", TEXT, "Mamba1")
    if layer not in KINDS:
        raise NotImplementedError(f"{ssm.where} has layer={layer!r}, which has no model here; choose Mamba1 or Mamba2.")
    words.need(rms_norm=True, attn_layer_idx=[], d_intermediate=0)
    multiple = words("pad_vocab_size_multiple", COUNT, 8)
    config: Config = {
        "model_type": KINDS[layer],
        "vocab_size": -(-words("vocab_size", COUNT) // multiple) * multiple,
        "hidden_size": words("d_model", COUNT),
        "num_hidden_layers": words("n_layer", COUNT),
        "state_size": ssm("d_state", COUNT, 16 if layer == "Mamba1" else 128),
        "conv_kernel": ssm("d_conv", COUNT, 4),
        "expand": ssm("expand", COUNT, 2),
        "use_bias": ssm("bias", FLAG, False),
        "use_conv_bias": ssm("conv_bias", FLAG, True),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": words("tie_embeddings", FLAG, True),
    }
    config |= {theirs: ssm.values[name] for name, theirs in START.items() if name in ssm.values}
    if layer == "Mamba1":
        config["time_step_rank"] = ssm("dt_rank", RANK, "auto")
    else:
        ssm.need(rmsnorm=True, norm_before_gate=False, D_has_hdim=False)
        head = ssm("headdim", COUNT, 64)
        heads = config["expand"] * config["hidden_size"] // head
        config |= {"num_heads": heads, "head_dim": head, "n_groups": ssm("ngroups", COUNT, 1)}
        config["time_step_limit"] = ssm("dt_limit", LIMITS, (0.0, math.inf))
    if unknown := set(ssm.values) - ssm.asked - set(START) - NOT_READ:
        raise ValueError(f"{ssm.where} has entries that are unknown: {', '.join(sorted(unknown))}.")
    return Words(config, words.where)


def _fields(words: Words) -> dict[str, Any]:
    words.need(hidden_act="silu")
    return {
        "state_size": words("state_size", COUNT),
        "expand": words("expand", COUNT),
        "conv_window": words("conv_kernel", COUNT),
        "conv_bias": words("use_conv_bias", FLAG),
        "use_bias": words("use_bias", FLAG),
    }


def _read_mamba(words: Words, take: Take) -> LanguageModel:
    fields = _fields(words)
    words.need(intermediate_size=fields["expand"] * words("hidden_size", COUNT))
    rank = words("time_step_rank", RANK)
    mixer = partial(
        mixers.Mamba,
        dt_rank=math.ceil(words("hidden_size", COUNT) / 16) if rank == "auto" else rank,
        dt_min=words("time_step_min", POSITIVE, mixers.Mamba.dt_min),
        dt_max=words("time_step_max", POSITIVE, mixers.Mamba.dt_max),
        **fields,
    )
    return language_model(words, mixer, "layer_norm_epsilon", None, tied=True)


def _read_mamba2(words: Words, take: Take) -> LanguageModel:
    fields = _fields(words)
    heads, head = words("num_heads", COUNT), words("head_dim", COUNT)
    if heads * head != (width := fields["expand"] * words("hidden_size", COUNT)):
        raise ValueError(
            f"{words.where} has num_heads={heads} of head_dim={head}, and expand · hidden_size = {width}; "
            "give heads that fill it."
        )
    mixer = partial(
        mixers.Mamba2,
        num_heads=heads,
        num_groups=words("n_groups", COUNT),
        dt_limit=words("time_step_limit", LIMITS, (0.0, math.inf)),
        norm_eps=words("layer_norm_epsilon", POSITIVE),
        **fields,
    )
    return language_model(words, mixer, "layer_norm_epsilon", None, tied=False)


def _config(model: LanguageModel, mixer: Any) -> Config:
    return {
        "hidden_act": "silu",
        "residual_in_fp32": True,
        "layer_norm_epsilon": model.norm_eps,
        "state_size": mixer.state_size,
        "expand": mixer.expand,
        "conv_kernel": mixer.conv_window,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.conv_bias,
        "time_step_floor": 1e-4,
    }


def _write_mamba(model: LanguageModel, mixer: Any) -> Config:
    return _config(model, mixer) | {
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": mixer.expand * model.d_model,
        "time_step_rank": mixer.dt_rank or math.ceil(model.d_model / 16),
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_scale": 1.0,
        "time_step_init_scheme": "random",
    }


def _write_mamba2(model: LanguageModel, mixer: Any) -> Config:
    width = mixer.expand * model.d_model
    heads = mixer.num_heads or width // 64
    return _config(model, mixer) | {
        "architectures": ["Mamba2ForCausalLM"],
        "num_heads": heads,
        "head_dim": width // heads,
        "n_groups": mixer.num_groups,
        "chunk_size": mixer.chunk_size or 256,
        "time_step_limit": [{"__float__": "Infinity"} if math.isinf(x) else x for x in mixer.dt_limit],
        "time_step_min": 0.001,
        "time_step_max": 0.1,
    }


def _mamba(read, write, mixer: type, names: dict[str, str]) -> Architecture:
    layer = {"norm.weight": "mixer_norm/scale"}
    return Architecture(
        read,
        write,
        mixer,
        "backbone.layers.{}.",
        layer | {f"mixer.{theirs}": f"mixer/{ours}" for theirs, ours in names.items()},
        {
            "backbone.embeddings.weight": "Embed_0/embedding",
            "backbone.norm_f.weight": "stack/norm/scale",
            "lm_head.weight": "head/kernel",
        },
        {"backbone.embedding.weight": "backbone.embeddings.weight"},
    )


MAMBA = {
    "mamba": _mamba(_read_mamba, _write_mamba, mixers.Mamba, LAYERS["Mamba"].names),
    "mamba2": _mamba(_read_mamba2, _write_mamba2, mixers.Mamba2, LAYERS["Mamba2"].names),
}
