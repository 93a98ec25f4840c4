"""Language models of flash-linear-attention: blocks of a mixer and a SwiGLU, each after a norm."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .. import mixers
from ..layers import GatedMLP
from ..models import LanguageModel
from .architecture import Architecture, Config, Take, language_model
from .fla import LAYERS
from .words import COUNT, FLAG, NUMBER, POSITIVE, Words, optional

Fields = Callable[[Words], dict[str, Any]]  # those of the mixer, beside the ε of its norm


def _read(fields: Fields, mixer: type, words: Words, take: Take, ratio: float = 4) -> LanguageModel:
    words.need(attn=None, hidden_act="swish", elementwise_affine=True)
    hidden = words("intermediate_size", optional(COUNT), None)
    ratio = words("hidden_ratio", optional(POSITIVE), None) or ratio
    if hidden is None:
        hidden = 256 * -(-int(words("hidden_size", COUNT) * ratio * 2 / 3) // 256)
    slot = partial(mixer, norm_eps=words("norm_eps", POSITIVE), **fields(words))
    return language_model(words, slot, "norm_eps", partial(GatedMLP, hidden=hidden), tied=False)


def _config(model: LanguageModel, mixer: Any) -> Config:
    mlp = None if model.mlp is None else model.mlp(d_model=model.d_model, parent=None)
    if not isinstance(mlp, GatedMLP):
        raise ValueError(f"mlp={model.mlp} has no word in this format; give a GatedMLP.")
    return {
        "hidden_act": "swish",
        "norm_eps": model.norm_eps,
        "num_heads": mixer.num_heads,
        "intermediate_size": mlp.width(),
    }


def _convolution(words: Words, default: bool) -> int | None:
    words.need(conv_bias=False)
    window = words("conv_size", COUNT, 4)
    return window if words("use_short_conv", FLAG, default) else None


def _convolution_config(mixer: Any) -> Config:
    return {"use_short_conv": mixer.conv_window is not None, "conv_size": mixer.conv_window or 4}


def _expansions(words: Words) -> dict[str, Any]:
    heads = {"num_heads": words("num_heads", COUNT)}
    return heads | {name: words(name, POSITIVE) for name in ("expand_k", "expand_v")}


# ---- one mixer after the other: its fields from a config, and the config of its fields -------------------------------


def _gla(words: Words) -> dict[str, Any]:
    words.need(feature_map=None, use_gk=True, use_gv=False, use_output_gate=True, fuse_norm=True)
    return _expansions(words) | {
        "num_kv_heads": words("num_kv_heads", optional(COUNT), None),
        "min_log_decay": words("clamp_min", optional(NUMBER), None),
        "conv_window": _convolution(words, False),
    }


def _gla_config(model: LanguageModel, mixer: Any) -> Config:
    return _config(model, mixer) | _convolution_config(mixer) | {
        "architectures": ["GLAForCausalLM"],
        "num_kv_heads": mixer.num_kv_heads,
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
        "clamp_min": mixer.min_log_decay,
    }  # fmt: skip


def _retnet(words: Words) -> dict[str, Any]:
    fields = _expansions(words)
    words.need(feature_map=None, use_output_gate=True, fuse_norm=True)
    if words("num_kv_heads", optional(COUNT), None) is not None:
        words.need(num_kv_heads=fields["num_heads"])
    return fields | {"conv_window": _convolution(words, False)}


def _retnet_config(model: LanguageModel, mixer: Any) -> Config:
    return _config(model, mixer) | _convolution_config(mixer) | {
        "architectures": ["RetNetForCausalLM"],
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
    }  # fmt: skip


def _delta_net(words: Words) -> dict[str, Any]:
    words.need(
        use_gate=False, use_beta=True, use_output_norm=True, qk_norm="l2", qk_activation="silu", allow_neg_eigval=False
    )
    return _expansions(words) | {"conv_window": _convolution(words, True)}


def _delta_net_config(model: LanguageModel, mixer: Any) -> Config:
    return _config(model, mixer) | _convolution_config(mixer) | {
        "architectures": ["DeltaNetForCausalLM"],
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
        "use_gate": False,
        "use_beta": True,
        "use_output_norm": True,
        "qk_norm": "l2",
        "qk_activation": "silu",
    }  # fmt: skip


def _gated_delta_net(words: Words) -> dict[str, Any]:
    words.need(use_gate=True)
    heads, value_heads = words("num_heads", COUNT), words("num_v_heads", optional(COUNT), None)
    width, key = words("hidden_size", COUNT), words("head_dim", COUNT)
    value = round(exact := words("expand_v", POSITIVE) * key)
    if value < 1 or not math.isclose(value, exact):
        raise ValueError(f"{words.where} has expand_v={exact / key:g} of head_dim={key}; give a whole number of both.")
    return {
        "num_heads": heads,
        "num_value_heads": value_heads,
        "expand_k": _ratio(heads * key, width),
        "expand_v": _ratio((value_heads or heads) * value, width),
        "negative_eigenvalues": words("allow_neg_eigval", FLAG, False),
        "conv_window": _convolution(words, True),
    }


def _ratio(a: int, b: int) -> float:
    """a / b, rounded so that b of it are a."""
    ratio = a / b
    return next((x for x in (ratio, math.nextafter(ratio, 0), math.nextafter(ratio, math.inf)) if x * b == a), ratio)


def _gated_delta_net_config(model: LanguageModel, mixer: Any) -> Config:
    value_heads = mixer.num_value_heads or mixer.num_heads
    key, value = (
        round(expansion * model.d_model / heads)
        for expansion, heads in ((mixer.expand_k, mixer.num_heads), (mixer.expand_v, value_heads))
    )
    return _config(model, mixer) | _convolution_config(mixer) | {
        "architectures": ["GatedDeltaNetForCausalLM"],
        "num_v_heads": mixer.num_value_heads,
        "head_dim": key,
        "expand_v": value / key,
        "allow_neg_eigval": mixer.negative_eigenvalues,
        "use_gate": True,
    }  # fmt: skip


def _hgrn2(words: Words) -> dict[str, Any]:
    width, heads = words("hidden_size", COUNT), words("num_heads", optional(COUNT), None)
    key = words("expand_ratio", optional(COUNT), None) if heads else words("expand_ratio", COUNT)
    heads, key = heads or width // key, key or width // heads
    if heads * key != width:
        given = " of ".join(f"{name}={words.values.get(name)}" for name in ("num_heads", "expand_ratio"))
        raise ValueError(f"{words.where} has {given}, and hidden_size={width}; give heads that fill it.")
    return {"num_heads": heads, "conv_window": _convolution(words, False)}


def _hgrn2_config(model: LanguageModel, mixer: Any) -> Config:
    return _config(model, mixer) | _convolution_config(mixer) | {
        "architectures": ["HGRN2ForCausalLM"],
        "expand_ratio": model.d_model // mixer.num_heads,
        "use_lower_bound": False,
    }  # fmt: skip


def _read_hgrn2(words: Words, take: Take) -> LanguageModel:
    """Their bounds of the decays are learned: of layer i, the sum of softmax(Γ) over the layers 1 … i. Here they are
    numbers of the model, which `write` has no word for."""
    model = _read(_hgrn2, mixers.HGRN2, words, take)
    if not words("use_lower_bound", FLAG, True):
        return model
    weights = take("model.lower_bounds", (len(model.mixers), model.d_model)).astype(np.float64)
    shares = np.exp(weights - weights.max(axis=0, keepdims=True))
    shares /= shares.sum(axis=0, keepdims=True)
    bounds = (np.cumsum(shares, axis=0) - shares[:1]).tolist()
    slots: Any = model.mixers
    return model.clone(mixers=tuple(partial(m, lower_bound=tuple(b)) for m, b in zip(slots, bounds, strict=True)))


def _fla(layer: str, read, write, mixer: type) -> Architecture:
    mlp = {f"mlp.{name}_proj.weight": f"mlp/{name}_proj/kernel" for name in ("gate", "up", "down")}
    norms = {"attn_norm.weight": "mixer_norm/scale", "mlp_norm.weight": "mlp_norm/scale"}
    names = {f"attn.{theirs}": f"mixer/{ours}" for theirs, ours in LAYERS[layer].names.items()}
    outer = {
        "model.embeddings.weight": "Embed_0/embedding",
        "model.norm.weight": "stack/norm/scale",
        "lm_head.weight": "head/kernel",
    }
    return Architecture(read, write, mixer, "model.layers.{}.", norms | mlp | names, outer)


FLA = {
    "gla": _fla("GatedLinearAttention", partial(_read, _gla, mixers.GLA), _gla_config, mixers.GLA),
    "retnet": _fla(
        "MultiScaleRetention", partial(_read, _retnet, mixers.RetNet, ratio=2), _retnet_config, mixers.RetNet
    ),
    "delta_net": _fla("DeltaNet", partial(_read, _delta_net, mixers.DeltaNet), _delta_net_config, mixers.DeltaNet),
    "gated_deltanet": _fla(
        "GatedDeltaNet",
        partial(_read, _gated_delta_net, mixers.GatedDeltaNet),
        _gated_delta_net_config,
        mixers.GatedDeltaNet,
    ),
    "hgrn2": _fla("HGRN2Attention", _read_hgrn2, _hgrn2_config, mixers.HGRN2),
}
