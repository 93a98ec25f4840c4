"""Continue a prompt from the checkpoint of `experiments.language_model`, streaming to standard output.

Run     python -m experiments.generate --run runs/language_model --prompt "def " [--max-tokens 256 --temperature 0.8]
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxseq.data import BEGIN, VOCABULARY, encode
from jaxseq.decode import stream
from jaxseq.models import ModelConfig, named_language_model
from jaxseq.train import command_line, exit_codes, read_config, restore_parameters


@dataclass(frozen=True)
class Trained:
    """What of the run's config says how to read its checkpoint."""

    model: ModelConfig


@dataclass(frozen=True)
class Options:
    """Continue a prompt from a trained language model."""

    run: Path = Path("runs/language_model")
    """The folder of the run."""
    prompt: str = "def "
    """The text to continue."""
    max_tokens: int = 256
    """Bytes to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest byte."""
    top_k: int = 0
    """Draw among this many likeliest bytes; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest bytes that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws."""


def main() -> None:
    options = command_line(Options, description=__doc__)
    with exit_codes():
        model = named_language_model(read_config(options.run, Trained).model, VOCABULARY)
        params = restore_parameters(options.run / "checkpoints")
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(options.prompt, end="", flush=True)
        blocks = stream(
            model,
            params,
            encode(options.prompt)[None],
            max_tokens=options.max_tokens,
            key=jax.random.key(options.seed),
            stop=BEGIN,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
        for block in blocks:
            produced = block[0].tolist()
            ended = BEGIN in produced
            produced = produced[: produced.index(BEGIN)] if ended else produced
            print(text.decode(bytes(produced)), end="", flush=True)
            if ended:
                break
        print(text.decode(b"", final=True), file=sys.stdout)


if __name__ == "__main__":
    main()
