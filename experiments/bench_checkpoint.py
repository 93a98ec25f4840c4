"""A Mamba language model read from a checkpoint: tokens a second, beside the library whose format it is.

Claim   Forward and in decoding jaxseq is at least 5 times as fast as the plain implementation of Hugging Face
        transformers, on the same weights and the same machine.
Source  Mamba (arXiv 2312.00752), sections 4.5 and 3.3; the checkpoint is written by `jaxseq.interop`.
Expect  On 2 CPU cores some thousand tokens a second forward and some hundred in decoding, for width 256 and 4 layers.
        Where torch and transformers are not installed, our own figures alone.
Run     python -m experiments.bench_checkpoint [--kind mamba|mamba2] [--length 2048] [--repeats 5]
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxseq import LanguageModel, Mamba
from jaxseq.decode import generate
from jaxseq.fields import check_counts
from jaxseq.interop import load_huggingface, save_huggingface
from jaxseq.mixers import Mamba2
from jaxseq.train import Run, main


@dataclass(frozen=True)
class Config:
    """The model, and how long to measure."""

    seed: int = 0
    """Seed of weights and tokens."""
    kind: Literal["mamba", "mamba2"] = "mamba"
    """Which mixer."""
    width: int = 256
    """Width of the model."""
    depth: int = 4
    """Layers."""
    vocabulary: int = 1024
    """Tokens of the vocabulary."""
    length: int = 2048
    """Tokens of the forward pass, and of the prompt."""
    new_tokens: int = 64
    """Tokens to decode after a prompt of 16."""
    repeats: int = 5
    """Rounds over both libraries, after one to warm up; speeds are of the median."""

    def __post_init__(self):
        check_counts(self, "width", "depth", "vocabulary", "length", "new_tokens", "repeats")


PRESETS = {
    "cpu": Config(),
    "gpu": Config(width=1024, depth=24, vocabulary=50280, new_tokens=256),
    "debug": Config(width=32, depth=1, vocabulary=64, length=32, new_tokens=4, repeats=1),
}
SLOTS: dict[str, Any] = {"mamba": Mamba, "mamba2": partial(Mamba2, num_heads=8)}


def ours(folder: Path, config: Config, tokens: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    model, params = load_huggingface(folder)
    forward = jax.jit(model.apply)
    decode = partial(generate, model, params, max_tokens=config.new_tokens, key=jax.random.key(0), temperature=0.0)
    return {
        "forward": lambda: np.asarray(forward(params, jnp.asarray(tokens))),
        "decoding": lambda: decode(tokens[:, :16]),
    }


def transformers(folder: Path, config: Config, tokens: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = torch.from_numpy(tokens.astype(np.int64))
    exactly = dict(max_new_tokens=config.new_tokens, min_new_tokens=config.new_tokens, do_sample=False, pad_token_id=0)
    with_grad_off = torch.inference_mode()
    return {
        "forward": with_grad_off(lambda: model(asked).logits.numpy()),
        "decoding": with_grad_off(lambda: model.generate(asked[:, :16], **exactly).numpy()[:, 16:]),
    }


def measure(run: Run[Config]) -> None:
    config, folder = run.config, run.folder / "model"
    slot = SLOTS[config.kind]
    model = LanguageModel(config.vocabulary, config.width, (slot,) * config.depth, mlp=None, tied=True, norm_eps=1e-5)
    params = jax.jit(model.init)(jax.random.key(config.seed), jnp.zeros((1, 1), jnp.int32))
    save_huggingface(model, params, folder)
    tokens = np.random.default_rng(config.seed).integers(0, config.vocabulary, (1, config.length)).astype(np.int32)
    libraries = {"jaxseq": ours(folder, config, tokens)}
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        libraries["transformers"] = transformers(folder, config, tokens)
    counts = {"forward": config.length, "decoding": config.new_tokens}
    seconds: dict[tuple[str, str], list[float]] = {}
    outputs: dict[tuple[str, str], np.ndarray] = {}
    for turn in range(1 + config.repeats):
        for name, calls in libraries.items():
            for what, call in calls.items():
                started = time.perf_counter()
                outputs[name, what] = call()
                seconds.setdefault((name, what), []).extend([time.perf_counter() - started] * bool(turn))
    speeds = {name: {what: counts[what] / median(seconds[name, what]) for what in counts} for name in libraries}
    for name, found in speeds.items():
        print(f"{name:<14}" + "".join(f"{what} {speed:>10,.0f} tokens/s  " for what, speed in found.items()))
    theirs = speeds.get("transformers")
    ratios = {what: speeds["jaxseq"][what] / theirs[what] for what in counts} if theirs else {}
    apart = float(np.abs(outputs["jaxseq", "forward"] - outputs["transformers", "forward"]).max()) if theirs else None
    run.finish(
        claim="forward and in decoding at least 5 times as fast as transformers, on the same weights",
        measured=speeds["jaxseq"] | {f"{what} / transformers": ratio for what, ratio in ratios.items()},
        baseline=theirs,
        threshold=5.0,
        holds=min(ratios.values()) >= 5 if ratios else None,
        largest_difference_of_logits=apart,
    )


if __name__ == "__main__":
    main("bench_checkpoint", PRESETS, measure)
