"""The tables of tile sizes: what is read from them, and what is refused."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels.one_token as one_token
import pallas_kernels.tiles as tiles
from experiments import tune_kernels
from jaxseq import ops
from jaxseq.analysis.kernel_programs import kernels
from jaxseq.train import Run, open_run

TEXT = tiles.PATH.read_text()


def tables():
    return json.loads(TEXT)


def test_a_table_is_what_it_is_written_as():
    assert tiles.text_of(tiles.parsed(TEXT, "tiles")) == TEXT


@pytest.mark.parametrize("kernel", tiles.CHOICES)
def test_every_kernel_has_tiles_for_every_platform_and_width(kernel):
    for platform, choices in tiles.CHOICES[kernel].items():
        for width in (1, 16, 17, 256, 1000):
            assert tiles.tile(kernel, platform, width).keys() == choices.keys()


def test_the_row_of_the_device_and_the_width_is_taken(monkeypatch):
    """The narrowest row that serves the width: of the device where there is one, else of its platform."""
    row = lambda block, **of: {"on": "tpu", "block": block, "reason": "-"} | of
    rows = [row(32), row(16, up_to=64), row(64, on="TPU v9", up_to=128), row(128, on="TPU v9", up_to=32)]
    monkeypatch.setattr(tiles, "_read", lambda: tables() | {"delta_rule": rows})
    block = lambda width: tiles.tile("delta_rule", "tpu", width)["block"]
    assert [block(width) for width in (64, 65, 200)] == [16, 32, 32]
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu", device_kind="TPU v9")])
    assert [block(width) for width in (8, 64, 128, 200)] == [128, 64, 64, 32]
    with tiles.tried("delta_rule", "tpu", block=256), tiles.tried("by_token", "gpu", width=32):
        assert block(8) == 256 and tiles.tile("by_token", "gpu", 8)["width"] == 32
    assert block(8) == 128


def test_a_rewritten_row_takes_the_place_of_its_like():
    row = {"on": "TPU v9", "up_to": 64, "block": 64, "reason": "measured"}
    once = tiles.rewritten(tables(), "delta_rule", row)
    again = tiles.rewritten(once, "delta_rule", row | {"block": 128})
    assert len(once["delta_rule"]) == len(again["delta_rule"]) == len(tables()["delta_rule"]) + 1
    assert tiles.parsed(tiles.text_of(again), "new")["delta_rule"][-1]["block"] == 128


def test_a_kernel_runs_with_the_tiles_it_is_told():
    """Forty tokens in one block, or in three."""
    x = jnp.ones((1, 40, 1, 8))
    run = lambda x: ops.gated_linear_attention(x, x, x, impl="pallas")
    assert "grid=(1, 1, 1)" in str(jax.make_jaxpr(run)(x))
    with tiles.tried("gated_linear_attention_by_head", "tpu", block=16):
        assert "grid=(1, 1, 3)" in str(jax.make_jaxpr(lambda x: run(x))(x))


def test_the_search_keeps_what_runs_and_is_right(tmp_path, monkeypatch, capsys):
    """One candidate is wrong and one does not compile: the table's own is left, and written where it is read from."""
    path = tmp_path / "tiles.json"
    path.write_text(TEXT)
    monkeypatch.setattr(tiles, "PATH", path)
    monkeypatch.setattr(tune_kernels, "SEARCHED", {"one_token": {"tpu": {"heads": (3, 7)}}})
    honest = one_token._call

    def call(token, platform, *arrays):
        heads = tiles.tile("one_token", platform, 16).get("heads")
        if heads == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED: no room for three\nand more")
        after, out = honest(token, platform, *arrays)
        return after, 2 * out if heads == 7 else out

    monkeypatch.setattr(one_token, "_call", call)
    config = tune_kernels.Config(kernels="one_token", most=3, steps=1, error_length=1)
    kernel = next(kernel for kernel in kernels(config) if kernel.name == "gla_step/16")
    kernel = kernel._replace(op=ops.gated_linear_attention)  # of one token, without a loop
    monkeypatch.setattr(tune_kernels, "kernels", lambda config: [kernel])
    run = open_run(config, "tune_kernels", tmp_path / "run")
    tune_kernels.search(run)
    new = tiles.parsed((run.folder / "tiles.json").read_text(), "new")
    (row,) = [row for row in new["one_token"] if row["on"] == jax.devices()[0].device_kind]
    said = capsys.readouterr().out
    assert "{'heads': 3} does not run: RuntimeError: RESOURCE_EXHAUSTED: no room for three\n" in said
    assert "{'heads': 7} does not run: ArithmeticError: error 1.0e+00" in said
    assert row["heads"] == 8 and "of 1 that run gla_step/16" in row["reason"]
    assert path.read_text() == TEXT and not run.result["holds"]  # nothing is claimed of a CPU
    with pytest.raises(ValueError, match="rewrite=True takes an accelerator"):
        tune_kernels.search(Run(tune_kernels.Config(rewrite=True), "tune_kernels", tmp_path / "again"))


BAD = {
    "no JSON": ("{", "tiles is not valid JSON"),
    "a kernel too few": (
        json.dumps({"delta_rule": []}),
        "must hold a table for each of gated_linear_attention_by_key, ",
    ),
    "no default": (tables() | {"delta_rule": []}, "delta_rule has no row on 'tpu' that serves every width"),
    "a default of some widths": ({"up_to": 64}, "delta_rule has no row on 'tpu' that serves every width"),
    "no reason": ({"reason": None}, "must say what it is `on` and its `reason`"),
    "another platform's": ({"columns": 64}, "what it chooses must be block"),
    "another device's": (
        {"on": "H200", "width": 3},
        "what it chooses must be block or block, columns, warps, stages, programs, warps_before",
    ),
    "no power of two": ({"block": 48}, "block must be a power of two, 16 at least"),
    "too few": ({"block": 8}, "block must be a power of two, 16 at least"),
    "no number": ({"block": "64"}, "block must be a power of two, 16 at least"),
    "no width": ({"up_to": 0}, "up_to must be a whole number, 1 at least"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused(name):
    change, words = BAD[name]
    if isinstance(change, dict) and "delta_rule" not in change:
        first, *others = tables()["delta_rule"]
        change = tables() | {"delta_rule": [first | change, *others]}
    text = change if isinstance(change, str) else json.dumps(change)
    with pytest.raises(ValueError, match=words):
        tiles.parsed(text, "tiles")
