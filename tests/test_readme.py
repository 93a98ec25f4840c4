"""The README's snippets run."""

import re
from pathlib import Path

import jax
from families import assert_close


def test_the_snippets_run(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 4
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with jax.numpy_rank_promotion("allow"):  # a user's own settings
        for snippet in snippets:
            exec(snippet, names)
    assert names["logits"].shape == (1, 16, 256)
    assert names["logits_t"].shape == (1, 256)
    assert names["y"].shape == (2, 10, 64)
    whole = names["layer"].apply(names["params"], names["x"])
    assert_close(names["in_parts"], whole, "mixer")
