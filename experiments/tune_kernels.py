"""Tile sizes of the kernels: which are fastest on the device there is, and the table that the kernels read.

Claim   Tiles found by measuring on a device run its kernels, forward and backward, 1.05 times as fast as the table that
        was there before: the geometric mean over the ops of a kernel, of every kernel at every width.
Source  The programs of `bench_kernels`; the tables are `pallas_kernels/tiles.json`.
Expect  Not measured on an accelerator yet. On a CPU the kernels of a TPU are interpreted: the search runs, to no end.
Run     python -m experiments.tune_kernels [--preset cpu|gpu] [--kernels delta_rule,one_token] [--widths 64 128]
        With `--rewrite`, as in the gpu preset, the kernels read what was found from then on; else it lies in the run's
        folder.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import exp, fsum, log

import jax

from jaxseq.analysis import in_turns
from jaxseq.analysis.kernel_programs import Kernel, Sizes, compiled, drawn, kernels, reference, relative_error, trained
from jaxseq.fields import check_counts, chosen
from jaxseq.train import Run, main
from jaxseq.train.files import write_text
from pallas_kernels import tiles


@dataclass(frozen=True)
class Config(Sizes):
    """Which kernels, and at which sizes."""

    kernels: str = ""
    """Kernels by name, with commas between them; all where none is given."""
    rewrite: bool = False
    """Whether the table beside the kernels is rewritten; else the new one lies in the run's folder alone."""
    most: int = 2
    """Candidates of a kernel at a width, the table's own among them; others are drawn from all there are."""
    error: float = 2e-2
    """The largest relative error, against the definition in float64, of a candidate that is kept."""

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, "most")
        self.names()

    def names(self) -> list[str]:
        return chosen("kernels", self.kernels, SEARCHED)


IN_TIME: dict[str, tuple[int, ...]] = {
    "block": (32, 64), "columns": (32, 64, 128), "warps": (4, 8), "stages": (1, 2), "programs": (128, 256),
}  # fmt: skip
BEFORE: dict[str, tuple[int, ...]] = {"warps_before": (4, 8), "channels": (32, 64, 128)}
BLOCKS: dict[str, tuple[int, ...]] = {"block": (64, 128, 256)}

#: What is tried, beside what the table says. Mosaic wants whole tiles; more than these never fit on a chip.
SEARCHED: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "gated_linear_attention_by_key": {"tpu": BLOCKS, "gpu": IN_TIME | BEFORE},
    "gated_linear_attention_by_value": {"tpu": BLOCKS, "gpu": IN_TIME},
    "gated_linear_attention_by_head": {"tpu": BLOCKS, "gpu": IN_TIME | {"sums": (1, 2)}},
    "delta_rule": {"tpu": BLOCKS, "gpu": IN_TIME | BEFORE},
    "dplr_recurrence": {"tpu": BLOCKS, "gpu": IN_TIME | BEFORE | {"sums": (3, 5)}},
    "over_pairs": {
        "tpu": {"block": (128, 256, 512)},
        "gpu": {"block": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)},
    },
    "by_token": {
        "tpu": {"width": (128, 256, 512), "strides": (4, 8, 16)},
        "gpu": {"width": (16, 32, 64, 128), "warps": (1, 2, 4), "ahead": (0, 1), "programs": (512, 1024)},
    },
    "by_token_backward": {
        "tpu": {"width": (128, 256, 512), "strides": (4, 8, 16)},
        "gpu": {"width": (8, 16, 32, 64, 128), "warps": (1, 2, 4), "ahead": (0, 1), "programs": (512, 1024)},
    },
    "in_pipeline": {"gpu": {"steps": (0, 2, 4, 6), "programs": (64, 128, 256)}},
    "one_token": {
        "tpu": {"heads": (1, 2, 4, 8, 16)},
        "gpu": {"columns": (16, 32, 64, 128), "warps": (1, 2, 4, 8)},
    },
}

PRESETS = {
    "cpu": Config(
        tokens=64, lengths=(64,), most_attended=64, channels=16, states=2, steps=2, error_length=33, repeats=1,
        seconds=0.0,
    ),
    "gpu": Config(
        rewrite=True, most=1000, tokens=32_768, lengths=(8192,), most_attended=8192, channels=2048, widths=(64, 128),
        states=16, decoded=256, steps=16, error_length=512, repeats=5, seconds=0.05,
    ),
}  # fmt: skip


def candidates(config: Config, name: str, platform: str, width: int, own: dict[str, int]) -> Iterator[dict[str, int]]:
    """The table's own choice first; among the others none of more channels than a head has, but for the least."""
    searched = SEARCHED[name][platform]
    others = [dict(zip(searched, sizes, strict=True)) for sizes in product(*searched.values())]
    most = max(width, *searched.get("channels", (0,))[:1])
    others = [choice for choice in others if choice != own and choice.get("channels", 0) <= most]
    yield own
    yield from random.Random(config.seed).sample(others, min(config.most - 1, len(others)))


def measured(config: Config, name: str, platform: str, width: int, ops: list[Kernel]) -> dict:
    """The row of the fastest candidate that runs every op, and how much faster than the table's own it is."""
    own = tiles.tile(name, platform, width)
    choices = dict(enumerate(candidates(config, name, platform, width, own)))
    speeds: dict[int, list[float]] = {i: [] for i in choices}
    for kernel in ops:
        draw, programs = drawn(config.seed, kernel), {}
        arguments, exact = reference(config, kernel)
        for i in list(speeds):
            try:
                with tiles.tried(name, platform, **choices[i]):
                    apart = relative_error(jax.jit(trained(kernel, "pallas"))(*arguments), exact)
                    program = compiled(kernel, "pallas", kernel.stages[-1], draw(0))
                if not apart <= config.error:
                    raise ArithmeticError(f"error {apart:.1e}")
                programs[i] = program
            except Exception as refused:  # a compiler's, which has its own words for what does not fit
                if i == 0:
                    raise
                why = f"{type(refused).__name__}: {refused}".splitlines()[0][:120]
                print(f"  {kernel.name}: {choices[i]} does not run: {why}", flush=True)
                del speeds[i]
        ms = in_turns(programs, draw, seed=config.seed, repeats=config.repeats, seconds=config.seconds)
        for i in speeds:
            speeds[i].append(ms[0] / ms[i])
    means = {i: exp(fsum(map(log, of)) / len(of)) for i, of in speeds.items()}
    best = max(means, key=lambda i: means[i])
    when, shown = time.strftime("%Y-%m-%d"), ", ".join(kernel.name for kernel in ops)
    reason = (
        f"{means[best]:.2f} times as fast as {own}, of {len(means)} that run {shown}; {when}, jax {jax.__version__}"
    )
    row = {"on": jax.devices()[0].device_kind, "up_to": width} | choices[best] | {"reason": reason}
    return {"row": row, "faster": means[best], "tried": len(choices)}


def search(run: Run[Config]) -> None:
    config, judged = run.config, jax.default_backend() != "cpu"
    if config.rewrite and not judged:
        raise ValueError("rewrite=True takes an accelerator; a CPU's times say nothing of its kernels.")
    platform = "gpu" if jax.default_backend() == "gpu" else "tpu"  # whose kernel a CPU interprets
    if absent := [name for name in config.names() if config.kernels and platform not in SEARCHED[name]]:
        raise ValueError(f"kernels={config.kernels!r}: {absent[0]} is no kernel of a {platform}.")
    tables = tiles.parsed(tiles.PATH.read_text(encoding="utf-8"), str(tiles.PATH))
    found: dict[str, float] = {}
    ops = list(kernels(config))
    for name, width in dict.fromkeys((name, op.width) for op in ops for name in op.runs_in):
        if name not in config.names():
            continue
        some = [op for op in ops if name in op.runs_in and op.width == width]
        made = run.kept(f"{name}/{width}", partial(measured, config, name, platform, width, some))
        print(f"{name}, up to {width}: {made['row']}", flush=True)
        tables = tiles.rewritten(tables, name, made["row"])
        found[f"{name}/{width}"] = made["faster"]
    new = tiles.text_of(tables)
    tiles.parsed(new, "what was found")
    for path in [run.folder / "tiles.json"] + [tiles.PATH] * config.rewrite:
        write_text(path, new)
    run.finish(
        claim="tiles found by measuring run kernels 1.05 times as fast as the table before"
        + ("" if judged else "; interpreted on a CPU, nothing is judged"),
        measured=found,
        baseline=1,
        threshold=1.05,
        holds=judged and min(found.values()) >= 1.05,
    )


if __name__ == "__main__":
    main("tune_kernels", PRESETS, search)
