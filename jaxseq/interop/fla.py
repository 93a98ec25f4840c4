"""Layers of flash-linear-attention: their state dicts as parameters of our mixers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from .. import mixers
from ..layers import Mixer


class Layer(NamedTuple):
    """Our mixer for one of their classes, our path of each of their names, and the input that a weight calls for."""

    mixer: Callable[..., Mixer]
    names: dict[str, str]
    inputs: dict[str, str] = {}


def convolved(**names: str) -> dict[str, str]:
    """`letter=name`: the projection of each letter of theirs, and the convolution behind it, by our name."""
    kernels = {f"{x}_proj.weight": f"{ours}_proj/kernel" for x, ours in names.items()}
    return kernels | {f"{x}_conv1d.weight": f"{ours}_conv/kernel" for x, ours in names.items()}


QKV = {f"{x}_proj.weight": f"{x}_proj/kernel" for x in "qkv"}
CONVOLVED = convolved(q="q", k="k", v="v")
OUT = {"o_proj.weight": "out_proj/kernel"}
GATE = {"g_proj.weight": "gate_proj/kernel"}
NORM = {"o_norm.weight": "norm/scale"}
GROUP_NORM = {"g_norm.weight": "norm/scale", "g_norm.bias": "norm/bias"}
LORA = {"w": "decay", "v": "value", "a": "a", "g": "gate"}
DT = {"A_log": "A_log", "dt_bias": "dt_bias"}
MAMBA = {"A_log": "A_log", "D": "D"} | {
    f"{theirs}.{kind}": f"{ours}/{leaf}"
    for theirs, ours in (("in_proj", "in_proj"), ("conv1d", "conv"), ("out_proj", "out_proj"))
    for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
}
GATED_DELTA = CONVOLVED | GATE | NORM | OUT | DT | {
    "b_proj.weight": "beta_proj/kernel",
    "a_proj.weight": "dt_proj/kernel",
}  # fmt: skip
KIMI = CONVOLVED | NORM | OUT | DT | {
    "b_proj.weight": "beta_proj/kernel",
    "f_proj.0.weight": "decay_down/kernel",
    "f_proj.1.weight": "decay_up/kernel",
    "g_proj.0.weight": "gate_down/kernel",
    "g_proj.1.weight": "gate_up/kernel",
    "g_proj.1.bias": "gate_up/bias",
}  # fmt: skip

LAYERS = {
    "GatedLinearAttention": Layer(
        mixers.GLA,
        CONVOLVED | GATE | OUT
        | {
            "gk_proj.0.weight": "decay_down/kernel",
            "gk_proj.1.weight": "decay_up/kernel",
            "gk_proj.1.bias": "decay_up/bias",
            "g_norm_swish_gate.weight": "norm/scale",
        },
    ),
    "SimpleGatedLinearAttention": Layer(
        partial(mixers.GLA, gate="scalar"),
        CONVOLVED | GATE | OUT
        | {
            "gk_proj.weight": "decay_proj/kernel",
            "gk_proj.bias": "decay_proj/bias",
            "g_norm_swish_gate.weight": "norm/scale",
        },
    ),
    "Mamba": Layer(
        mixers.Mamba,
        MAMBA | {"x_proj.weight": "x_proj/kernel", "dt_proj.weight": "dt_kernel", "dt_proj.bias": "dt_bias"},
    ),
    "Mamba2": Layer(mixers.Mamba2, MAMBA | {"dt_bias": "dt_bias", "norm.weight": "norm/scale"}),
    "DeltaNet": Layer(mixers.DeltaNet, CONVOLVED | NORM | OUT | {"b_proj.weight": "beta_proj/kernel"}),
    "GatedDeltaNet": Layer(mixers.GatedDeltaNet, GATED_DELTA),
    "GatedDeltaProduct": Layer(
        partial(mixers.GatedDeltaNet, num_householders=2, negative_eigenvalues=True), GATED_DELTA
    ),
    "Comba": Layer(mixers.Comba, GATED_DELTA | {"decay": "c", "D": "D"}),
    "LightNetAttention": Layer(
        mixers.LightNet,
        QKV | OUT
        | {
            "g_proj.0.weight": "gate_down/kernel",
            "g_proj.1.weight": "gate_up/kernel",
            "g_norm.weight": "norm/scale",
        },
    ),
    "KimiDeltaAttention": Layer(mixers.KDA, KIMI),
    "GatedDeltaNet2": Layer(partial(mixers.KDA, channel_gates=True), KIMI | {"w_proj.weight": "write_proj/kernel"}),
    "RodimusAttention": Layer(
        mixers.Rodimus,
        {
            "up_proj.weight": "up_proj/kernel",
            "gate_proj.weight": "gate_proj/kernel",
            "short_conv.weight": "conv/kernel",
            "short_conv.bias": "conv/bias",
            "q_proj.weight": "q_proj/kernel",
            "k_proj.weight": "k_proj/kernel",
            "g_gate_proj.weight": "decay_proj/kernel",
            "g_gate_proj.bias": "decay_proj/bias",
            "tau_gate_proj.weight": "temperature_proj/kernel",
            "tau_gate_proj.bias": "temperature_proj/bias",
            "i_gate_proj.0.weight": "value_down/kernel",
            "i_gate_proj.1.weight": "value_up/kernel",
            "i_gate_proj.1.bias": "value_up/bias",
            "residual_weight": "skip",
            "activation_norm.weight": "norm/scale",
            "down_proj.weight": "out_proj/kernel",
        },
    ),
    "MultiScaleRetention": Layer(mixers.RetNet, CONVOLVED | GATE | OUT | {"g_norm_swish_gate.weight": "norm/scale"}),
    "LinearAttention": Layer(mixers.LinearAttention, QKV | OUT | {"norm.weight": "norm/scale"}),
    "ReBasedLinearAttention": Layer(
        mixers.ReBased, QKV | OUT | {"feature_map.gamma": "norm/scale", "feature_map.beta": "norm/bias"}
    ),
    "HGRNAttention": Layer(
        mixers.HGRN,
        GATE | OUT | convolved(f="decay", i="input") | {"g_norm.weight": "norm/scale"},
    ),
    "HGRN2Attention": Layer(
        mixers.HGRN2,
        OUT | convolved(q="q", f="decay", i="v") | {"g_norm.weight": "norm/scale"},
    ),
    "GatedSlotAttention": Layer(
        mixers.GSA, CONVOLVED | OUT | {"f_proj.weight": "decay_proj/kernel", "g_norm.weight": "norm/scale"}
    ),
    "RWKV6Attention": Layer(
        mixers.RWKV6,
        OUT | GROUP_NORM
        | {
            "x_bias": "mix_bias",
            "bonus": "bonus",
            "x_proj.0.mu": "mix",
            "x_proj.0.linear.weight": "mix_down/kernel",
            "x_proj.2.weight": "mix_up",
            "w_proj.linear.lora.0.weight": "decay_down/kernel",
            "w_proj.linear.lora.2.weight": "decay_up/kernel",
            "w_proj.linear.lora.2.bias": "decay_up/bias",
            "g_proj.linear.weight": "gate_proj/kernel",
        }
        | {f"{x}_proj.linear.weight": f"{x}_proj/kernel" for x in "rkv"},
    ),
    "RWKV7Attention": Layer(
        mixers.RWKV7,
        OUT | GROUP_NORM
        | {name: name for name in ("k_k", "k_a", "r_k")}
        | {f"x_{x}": f"mix_{x}" for x in "rwkvag"}
        | {f"{x}_proj.weight": f"{x}_proj/kernel" for x in "rkv"}
        | {f"{x}_lora.lora.0.weight": f"{ours}_down/kernel" for x, ours in LORA.items()}
        | {f"{x}_lora.lora.2.weight": f"{ours}_up/kernel" for x, ours in LORA.items()}
        | {f"{x}_lora.lora.2.bias": f"{ours}_up/bias" for x, ours in LORA.items()},
        {"v_lora.lora.0.weight": "first_value"},
    ),
}  # fmt: skip


def fla_layer(layer: str, weights: Mapping[str, Any], **fields) -> tuple[Mixer, dict]:
    """A layer's state dict, linear weights as [out, in], as one of our mixers and its parameters.

    `layer` is their class name. `fields` are the mixer's: the sizes that weights do not tell; `d_model` is the width
    of the output projection.

    Raises:
      NotImplementedError: there is no mixer for this class; the message lists those there are.
      ValueError: names are missing, unknown or of another shape; all of them in one message.
    """
    if layer not in LAYERS:
        raise NotImplementedError(f"layer={layer!r} has no mixer here; choose one of {', '.join(LAYERS)}.")
    kind, names, wanted_inputs = LAYERS[layer]
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    for name, array in arrays.items():
        if not (jnp.issubdtype(array.dtype, jnp.floating) and np.isfinite(array.astype(np.float32)).all()):
            raise ValueError(f"{name} is of {array.dtype}, or not finite; weights are finite numbers with a point.")
    out = next((name for name, ours in names.items() if ours == "out_proj/kernel"), "")
    if out not in arrays:
        raise ValueError(f"{layer} misses {out}.")
    mixer = kind(d_model=arrays[out].shape[0], **fields)
    x = jnp.zeros((1, 1, mixer.d_model))
    inputs: dict[str, Any] = {name: x for weight, name in wanted_inputs.items() if weight in arrays}
    shapes = jax.eval_shape(lambda key: mixer.init(key, x, **inputs), jax.random.key(0))
    wanted = {path: x.shape for path, x in traverse_util.flatten_dict(shapes["params"], sep="/").items()}
    given = {names[name]: _as_ours(name, array) for name, array in arrays.items() if name in names}
    theirs = {ours: name for name, ours in names.items()}
    faults = [f"{name} is unknown" for name in arrays if names.get(name) not in wanted]
    faults += [f"{theirs.get(path, path)} is missing" for path in wanted if path not in given]
    faults += [
        f"{theirs[path]} is {given[path].shape} and should be {shape}"
        for path, shape in wanted.items()
        if path in given and given[path].shape != shape
    ]
    if faults:
        raise ValueError(f"These are no weights of {mixer.__class__.__name__}: {'; '.join(faults)}.")
    return mixer, {"params": traverse_util.unflatten_dict(given, sep="/")}


def _as_ours(name: str, array: np.ndarray) -> jax.Array:
    """[out, in] → [in, out]; a depthwise filter [D, 1, W] → [W, D], a vector [1, 1, D] → [D]."""
    if array.ndim == 3:
        array = array.reshape(-1) if array.shape[:2] == (1, 1) else array[:, 0]
    return jnp.asarray(array.T if name.endswith("weight") else array)
