"""Continue a prompt from the checkpoint of `experiments.language_model`, or of another library, streaming.

Run     python -m experiments.generate --run runs/language_model --prompt "def " [--max-tokens 256 --temperature 0.8]
        python -m experiments.generate --hf FOLDER --prompt "Once upon" (with its tokenizer.json)
"""

from dataclasses import dataclass
from pathlib import Path

import jax

from jaxseq.data import VOCABULARY, TextConfig
from jaxseq.decode import byte_text, stream
from jaxseq.interop import load_huggingface, tokenizer_text
from jaxseq.models import ModelConfig, named_language_model
from jaxseq.train import command_line, exit_codes, read_config, restore_parameters


@dataclass(frozen=True)
class Trained:
    """What of the run's config says how to read its checkpoint."""

    model: ModelConfig
    data: TextConfig


@dataclass(frozen=True)
class Options:
    """Continue a prompt from a trained language model."""

    run: Path = Path("runs/language_model")
    """The folder of the run."""
    hf: str | None = None
    """Instead of a run: a folder in the Hugging Face format, or owner/name on the hub."""
    prompt: str = "def "
    """The text to continue."""
    max_tokens: int = 256
    """Bytes, or tokens of the folder's tokenizer, to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Draw among this many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws."""


def main() -> None:
    options = command_line(Options, description=__doc__)
    with exit_codes():
        if options.hf is None:
            trained = read_config(options.run, Trained)
            model = named_language_model(trained.model, VOCABULARY, trained.data.context)
            params, text = restore_parameters(options.run / "checkpoints"), byte_text()
        else:
            text = tokenizer_text(options.hf)  # first: without it there is no need of the weights
            model, params = load_huggingface(options.hf)
        prompt = text.encode(options.prompt)
        if not len(prompt):
            raise ValueError("prompt='' has no token; give a text to go on from.")
        blocks = stream(
            model,
            params,
            prompt[None],
            max_tokens=options.max_tokens,
            key=jax.random.key(options.seed),
            stop=text.stop,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
        print(options.prompt, end="", flush=True)
        for piece in text.pieces((block[0] for block in blocks), prompt.tolist()):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
