"""The recall tasks as TensorFlow Datasets: fixed examples to evaluate on, made offline. Importing this registers them.

    import tensorflow_datasets as tfds
    import jaxseq.tasks.builders

    test = tfds.load("jaxseq_mqar/small", split="test")  # a sequence of {"inputs": T, "labels": T}, NumPy, int32
    test = tfds.data_source("jaxseq_mqar/small", split="test")  # the same

The files are array_record, which needs no TensorFlow, and `tfds.load` gives what `tfds.data_source` gives. Where
TensorFlow is installed, `tfds.load(..., builder_kwargs={"file_format": "tfrecord"})` writes its own format, in a folder
`data_dir` of its own, and gives a `tf.data.Dataset`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from .copying import compression, induction, selective_copying
from .fuzzy_recall import fuzzy_recall
from .recall import associative_recall, mqar, noisy_recall

CHUNK = 1000
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass
class TaskConfig(tfds.core.BuilderConfig):
    """The arguments of a task, the seed, and the examples of each split, which have keys of their own."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    examples: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 100_000, "validation": 3_000, "test": 3_000}
    )
    seed: int = 0

    def __post_init__(self):
        if "length" not in self.settings:
            raise ValueError(f"settings={self.settings} of {self.name!r} have no length; give the task's arguments.")
        if unknown := set(self.examples) - set(SPLITS):
            raise ValueError(f"examples: no split is called {min(unknown)!r}; choose {', '.join(SPLITS)}.")


class TaskBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Examples of `task` at the settings of the config: a function of seed and split.

    Raises:
      ValueError: the files that are there say that they were made of other settings or another seed.
    """

    VERSION = tfds.core.Version("1.0.0")
    task: Callable

    def __init__(self, *, file_format: Any = "array_record", **options):
        super().__init__(file_format=file_format, **options)
        made, due = dict(self.info.metadata or {}), self._made_of()
        if made and made != due:
            raise ValueError(
                f"{self.data_dir} was made of {made}; config {self.builder_config.name!r} has {due} now: give it "
                "another name, or remove the folder."
            )

    def _made_of(self) -> dict[str, Any]:
        """What the examples depend on, as JSON gives it back."""
        config = self.builder_config
        return json.loads(json.dumps({"settings": config.settings, "examples": config.examples, "seed": config.seed}))

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self.builder_config.settings["length"],), dtype=np.int32)
        features = tfds.features.FeaturesDict({"inputs": tokens, "labels": tokens})
        description = " ".join((type(self).task.__doc__ or "").split())
        metadata = tfds.core.MetadataDict(self._made_of())
        return tfds.core.DatasetInfo(builder=self, description=description, features=features, metadata=metadata)

    def _split_generators(self, dl_manager):
        draw = jax.jit(partial(type(self).task, num_examples=CHUNK, **self.builder_config.settings))
        return {split: self._generate_examples(split, draw) for split in self.builder_config.examples}

    def _generate_examples(self, split: str, draw: Callable) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        config = self.builder_config
        key = jax.random.fold_in(jax.random.key(config.seed), SPLITS.index(split))
        for start in range(0, config.examples[split], CHUNK):
            inputs, labels = map(np.asarray, draw(jax.random.fold_in(key, start)))
            for i in range(min(CHUNK, config.examples[split] - start)):
                yield start + i, {"inputs": inputs[i], "labels": labels[i]}

    def as_dataset(self, split=None, **options):
        """What the file format allows: a `tf.data.Dataset` needs another one than array_record."""
        if self.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            return super().as_dataset(split, **options)
        asked = {name: value for name, value in options.items() if value and name != "read_config"}
        if asked:
            raise ValueError(
                f"{asked}: array_record is read as it is; choose file_format='tfrecord' for a tf.data set."
            )
        return self.as_data_source(split)


def _builder(called: str, task: Callable, **settings: dict[str, Any]) -> type[TaskBuilder]:
    """The builder `jaxseq_NAME` of a task, with a config for each of the settings.

    `called` is this module's name for it: pickles of its data sources look it up there.
    """
    configs = [TaskConfig(name=name, settings=options) for name, options in settings.items()]
    fields = {"name": f"jaxseq_{task.__name__}", "task": staticmethod(task), "BUILDER_CONFIGS": configs}
    return type(called, (TaskBuilder,), fields | {"__module__": __name__})


#: Zoology's grid, without filler of random tokens as in its figure 2, and a small setting.
MQAR = _builder(
    "MQAR",
    mqar,
    small=dict(length=64, num_pairs=8, vocab_size=256, random_non_queries=False),
    n64_d4=dict(length=64, num_pairs=4, random_non_queries=False),
    n128_d8=dict(length=128, num_pairs=8, random_non_queries=False),
    n256_d16=dict(length=256, num_pairs=16, random_non_queries=False),
    n512_d64=dict(length=512, num_pairs=64, random_non_queries=False),
)
#: Orchid's vocabularies, with the token that asks, and the first length of each task's own paper.
AssociativeRecall = _builder(
    "AssociativeRecall", associative_recall, **{f"v{v}": dict(length=128, vocab_size=v + 1) for v in (10, 20, 30, 40)}
)
NoisyRecall = _builder("NoisyRecall", noisy_recall, small=dict(length=128))
FuzzyRecall = _builder("FuzzyRecall", fuzzy_recall, small=dict(length=128))
SelectiveCopying = _builder("SelectiveCopying", selective_copying, small=dict(length=256), mamba=dict(length=4096))
Compression = _builder("Compression", compression, small=dict(length=32))
Induction = _builder("Induction", induction, small=dict(length=256))
