"""A file imports only from lower floors, so that each could be read, or deleted, without what stands on it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"jaxseq.shapes", "pallas_kernels"},
    {"jaxseq.monoid", "jaxseq.scan", "jaxseq.sharded", "jaxseq.segments"},
    {"jaxseq.ops"},
    {"jaxseq.layers"},
    {"jaxseq.mixers"},
    {"jaxseq.models", "jaxseq.tasks", "jaxseq.data", "jaxseq.train"},
    {"jaxseq.decode", "jaxseq.compress", "jaxseq.interpret", "jaxseq.learn", "jaxseq.analysis", "jaxseq.interop"},
    {"experiments"},
]
FLOOR = {package: height for height, packages in enumerate(FLOORS) for package in packages}
FILES = sorted(path for top in ("jaxseq", "pallas_kernels", "experiments") for path in (ROOT / top).rglob("*.py"))
OURS = ("jaxseq", "pallas_kernels", "experiments")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def package_of(name: str) -> str:
    parts = name.split(".")
    return parts[0] if parts[0] != "jaxseq" else ".".join(parts[:2])


def imports_of(name: str, source: str) -> set[str]:
    """The modules of ours that a file imports, by full name."""
    found, here = set(), name.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(here[: -node.level] * bool(node.level) + [node.module] * bool(node.module))
            packages = not node.module or module in ("jaxseq", "experiments")  # from .. import ops
            found |= {f"{module}.{alias.name}" for alias in node.names} if packages else {module}
    return {name for name in found if name.split(".")[0] in OURS}


def complaints(name: str, source: str) -> list[str]:
    package, found = package_of(name), []
    for imported in imports_of(name, source):
        other = package_of(imported)
        height = FLOOR.get(other, FLOOR["jaxseq.models"])  # `from jaxseq import GLA`: the names everybody uses
        if other == package:
            if package in ("jaxseq.mixers", "experiments") and not name.endswith("__init__") and other != imported:
                found.append(f"{name} imports {imported}; what two of them share moves down a floor")
        elif height > FLOOR[package] or (height == FLOOR[package] and package == "jaxseq.train"):
            found.append(f"{name} imports {imported}, which stands no lower")
    if FLOOR[package] < FLOOR["jaxseq.layers"] and ("import flax" in source or "from flax" in source):
        found.append(f"{name} imports flax; linen starts at layers")
    return found


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) != "jaxseq.__init__"], ids=name_of)
def test_imports_come_from_lower_floors(path):
    assert not complaints(name_of(path), path.read_text())


@pytest.mark.parametrize(
    "name, source",
    [
        ("jaxseq.ops.gla", "from ..mixers.gla import GLA"),
        ("jaxseq.ops.gla", "from .. import layers"),
        ("jaxseq.mixers.gla", "from .mamba import Mamba"),
        ("jaxseq.train.fit", "from jaxseq.models import LanguageModel"),
        ("jaxseq.train.fit", "from ..data import text"),
        ("jaxseq.decode.generate", "import experiments.generate"),
        ("jaxseq.monoid", "import flax.linen as nn"),
        ("experiments.generate", "from .language_model import CONFIG"),
        ("experiments.generate", "from experiments import language_model"),
    ],
)
def test_a_breach_is_seen(name, source):
    assert complaints(name, source)
