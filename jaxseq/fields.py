"""What configs check of the words on a command line."""

from collections.abc import Iterable


def check_counts(config: object, *names: str, section: str = "") -> None:
    """Raise unless every field named is 1 or more; a command line has `section` in front of them."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{section}{name}={getattr(config, name)} must be at least 1.")


def check_positive(config: object, *names: str, section: str = "") -> None:
    """Raise unless every field named is above 0, which NaN is not; `section` as for `check_counts`."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{section}{name}={getattr(config, name)} must be above 0.")


def chosen(field: str, given: str, known: Iterable[str]) -> list[str]:
    """The names in `given`, with commas between them; all that are known where it is empty.

    Raises:
      ValueError: one of them is not known.
    """
    known = list(known)
    names = [name.strip() for name in given.split(",")] if given else known
    if unknown := set(names) - set(known):
        raise ValueError(f"{field}={given}: none is called {min(unknown)!r}; choose {', '.join(known)}.")
    return names
