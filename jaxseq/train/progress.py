"""What a person sees while it trains: one live line on a terminal, a plain line now and then elsewhere."""

import shutil
import sys
import time
from typing import TextIO


class Progress:
    """Step, loss, bits per byte, speed and time left; a context manager, so that the line ends when training does."""

    def __init__(self, steps: int, *, tokens_per_step: int | None = None, stream: TextIO | None = None):
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = float("-inf")
        self._first: tuple[int, float] | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._live and self._first:
            self._stream.write("\n")

    def update(self, step: int, metrics: dict[str, float]) -> None:
        now = time.monotonic()
        # Speed is counted from the first step of this process, whose own time is mostly compilation.
        self._first = self._first or (step, now)
        if step < self._steps and now - self._shown < (0.1 if self._live else 10):
            return
        self._shown = now
        self._write(
            "  ".join([f"step {step}/{self._steps}", *_words(metrics), *self._speed(step, now)]), live=self._live
        )

    def evaluated(self, step: int, split: str, metrics: dict[str, float]) -> None:
        words = _words(metrics) or [f"{name} {value:.4f}" for name, value in metrics.items()]
        self.note("  ".join([f"step {step}/{self._steps}", split, *words]))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._write(text, live=False)

    def _speed(self, step: int, now: float) -> list[str]:
        first_step, first_time = self._first or (step, now)
        if step == first_step or now == first_time:
            return []
        rate = (step - first_step) / (now - first_time)
        speed = f"{rate * self._tokens_per_step:,.0f} tokens/s" if self._tokens_per_step else f"{rate:,.1f} steps/s"
        return [speed, f"{duration((self._steps - step) / rate)} left"]

    def _write(self, text: str, *, live: bool) -> None:
        if self._live:
            text = "\r\x1b[2K" + text[: shutil.get_terminal_size().columns - 1 if live else None]
        self._stream.write(text if live else text + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something: 42 s, 3 min 05 s, 2 h 10 min."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def _words(metrics: dict[str, float]) -> list[str]:
    words = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    words += [f"{metrics['bits_per_byte']:.3f} bits/byte"] if "bits_per_byte" in metrics else []
    return words + ([f"{metrics['skipped']} skipped"] if metrics.get("skipped") else [])
