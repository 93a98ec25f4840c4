"""A file imports only from lower floors, so that each could be read, or deleted, without what stands on it."""

import ast
import builtins
import importlib
import inspect
import symtable
from pathlib import Path

import flax.linen as nn
import pytest

from jaxseq.layers import Mixer

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"jaxseq.shapes", "jaxseq.exact", "jaxseq.fields", "pallas_kernels"},
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


def undefined(source: str) -> set[str]:
    """Names that a file uses and does not have. Linters are told to pass over them: shapes are words in annotations."""
    whole = symtable.symtable(source, "file", "exec")
    had = {s.get_name() for s in whole.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}

    def used(table):
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or table is whole):
                yield symbol.get_name()
        for child in table.get_children():
            yield from used(child)

    return set(used(whole)) - had - set(dir(builtins)) - {"__file__"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_names_are_defined(path):
    assert not undefined(path.read_text())


def test_a_name_that_is_missing_is_seen():
    assert undefined("import jax\n\ndef f(x):\n    return lambda: Dense(x) + jax.nn.relu(x)\n\ng = h") == {"Dense", "h"}
    assert not undefined("def f(x: 'B T'):\n    return print(x, __name__)")


@pytest.mark.parametrize("package", ["ops", "layers", "mixers", "models", "decode", "segments"])
def test_what_takes_arrays_checks_them(package):
    """Exported functions and modules have their jaxtyping annotations checked; `generate` checks its prompt itself."""
    exported = vars(importlib.import_module(f"jaxseq.{package}"))
    public = {n: f for n, f in exported.items() if getattr(f, "__module__", "").startswith("jaxseq") and n[0] != "_"}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    for name, kind in public.items():
        if inspect.isclass(kind) and issubclass(kind, nn.Module):
            body = "prefill" if issubclass(kind, Mixer) else "__call__"
            functions |= {f"{name}.{body}": getattr(kind, body)} if kind is not Mixer else {}
    elsewhere = {"generate", "stream", "byte_text", "typed"}
    elsewhere |= {"named_language_model", "mixer_names", "named_forecaster", "forecaster_names"}
    assert functions
    assert not [name for name, f in functions.items() if not hasattr(f, "is_typed") and name not in elsewhere]
