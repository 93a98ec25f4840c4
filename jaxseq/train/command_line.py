"""A configuration dataclass as a command line: every field an option, its docstring the help."""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, NoReturn, TypeVar

import tyro

Options = TypeVar("Options")


@dataclass(frozen=True)
class Arguments(Generic[Options]):
    """What the command line of an experiment says."""

    config: Annotated[Options, tyro.conf.arg(name="")]
    preset: str
    """The settings the other options change."""
    out: Path
    """The folder of the run; the same command again resumes it."""


def parse(
    presets: Mapping[str, Options], argv: Sequence[str] | None = None, *, out: str | Path, description: str = ""
) -> Arguments[Options]:
    """`[--preset NAME] [--out FOLDER] [--field.subfield VALUE ...]`; the first preset is the default.

    Bad arguments end the process with exit code 2 and one line that names them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = next(iter(presets))
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--preset", nargs="?", default=first, const=first)  # a missing name is for tyro to refuse
    preset = reader.parse_known_args(argv)[0].preset
    if preset not in presets:
        refuse(f"--preset {preset} does not exist; choose {', '.join(presets)}.")
    base = Arguments(presets[preset], preset, Path(out))
    # Claim, Source, Expect and Run begin lines; only blank ones part paragraphs here.
    description = re.sub(r"\n+(?=\S)", "\n\n", description)
    description = f"{description}\n\nPresets: {', '.join(presets)}. Defaults shown are those of {preset}.".strip()
    return command_line(Arguments[type(base.config)], argv, default=base, description=description)  # type: ignore


def command_line(kind: type[Options], argv: Sequence[str] | None = None, **options: Any) -> Options:
    """A dataclass from its command line; `options` go to `tyro.cli`."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, **options)
    except SystemExit as leaving:
        if not leaving.code:
            raise
        refuse(_one_line(errors.getvalue()))
    except ValueError as error:  # from a config's own checks
        refuse(str(error))


def refuse(message: str) -> NoReturn:
    """Leave with exit code 2 and this one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _one_line(box: str) -> str:
    """The message in tyro's box, whose title is on its frame or above a rule; and the option it would have expected."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │|") for line in box.splitlines()]
    sections: list[list[str]] = [[]]
    for line in lines:
        if line[:1] in tuple("╭╰+") or (line and set(line) <= set("─-├┤")):
            sections.append([])
        elif line:
            sections[-1].append(line)
    spoken = [" ".join(section) for section in sections if section]
    message = next((text for text in spoken if ":" in text), " ".join(spoken))
    message = re.sub(r"^Error parsing config\.\w+: ", "", message)
    if message.startswith("Unrecognized"):
        similar = re.search(r"^(--[a-z]\S*)", "\n".join(lines), re.MULTILINE)
        message += f" (did you mean {similar[1]}?)" if similar else ""
    return f"{message.rstrip('.')}; --help lists every option."
