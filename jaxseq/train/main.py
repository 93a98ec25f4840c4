"""From a command line to an exit code: 0 completed or interrupted in order, 1 diverged, 2 for the user to put right."""

import dis
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from .command_line import parse, refuse
from .interrupt import Interrupted
from .run import Run, open_run, summary

Config = TypeVar("Config")


def main(
    experiment: str,
    presets: Mapping[str, Config],
    measure: Callable[[Run[Config]], Any],
    argv: Sequence[str] | None = None,
    *,
    facts: Callable[[Config], Mapping[str, Any]] | None = None,
) -> None:
    """Run `measure(run)` with the config of the command line, in its folder `--out` (default runs/EXPERIMENT).

    The same command again resumes; a finished run says so and prints its result. `facts(config)` is what the config
    does not say, such as the digest of a table that grows: a run that began with other facts is refused, a finished
    one too. The module docstring of `measure` is the text of --help.
    """
    description = sys.modules[measure.__module__].__doc__ or experiment
    arguments = parse(presets, argv, out=f"runs/{experiment}", description=description)
    with exit_codes():
        run = open_run(arguments.config, experiment, arguments.out)
        try:
            if facts is not None:
                run.require_same(**facts(run.config))
            if run.result is None:
                measure(run)
            else:
                print(f"{run.folder} is finished; more --train.steps continue it.\n{summary(run.result)}")
        except BaseException:
            run.withdraw()
            raise


@contextmanager
def exit_codes() -> Iterator[None]:
    """Exit codes: 2 with one line for what the user can put right, 0 if interrupted, 1 if diverged; a bug keeps its
    traceback.

    The user's are the errors that a `raise` of ours states, and those of the operating system about files. An error
    that comes up anywhere else was not foreseen: a bug.
    """
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on from there", file=sys.stderr)
        raise
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        if not (isinstance(error, OSError) or _stated(error)):
            raise
        refuse(str(error))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(*_) -> None:
    """SIGTERM outside of training: what is on disk is complete, the same command does the rest."""
    raise SystemExit(0)


def _stated(error: Exception) -> bool:
    """Whether a `raise` statement in jaxseq or in the script's own package made the error."""
    kinds = (ValueError, TypeError, NotImplementedError, ImportError)
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    main_package = (getattr(sys.modules["__main__"], "__package__", None) or "__main__").partition(".")[0]
    raises = frame.f_code.co_code[frame.f_lasti] == dis.opmap["RAISE_VARARGS"]
    return isinstance(error, kinds) and raises and package in {"jaxseq", "__main__", main_package}
