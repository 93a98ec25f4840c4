"""Recall tasks: the golden rows, the laws of each generator, and a reader who answers everything from the sequence."""

import pickle
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import load, recorded
from sampled import by_default

from jaxseq import tasks
from jaxseq.tasks.recall import mqar_rows

GOLDEN = ["n64_kv4", "n128_kv8", "n256_kv16", "n512_kv64", "n64_kv4_filled", "small", "uniform"]


def drawn_by_the_authors(vocab, length, pairs, examples, seed, power):
    """Their draws, in their order: all keys, all values, then all slots, of NumPy's legacy generator."""
    rng = np.random.RandomState(seed)
    slots = (length - 2 * pairs) // 2
    weights = power * np.arange(1, slots + 1) ** (power - 1)
    keys = np.stack([rng.choice(np.arange(1, vocab // 2), pairs, replace=False) for _ in range(examples)])
    values = np.stack([rng.choice(np.arange(vocab // 2, vocab), pairs, replace=False) for _ in range(examples)])
    places = [rng.choice(slots, pairs, replace=False, p=weights / weights.sum()) for _ in range(examples)]
    return tuple(a.astype(np.int32) for a in (keys, values, np.stack(places)))


@recorded
@pytest.mark.parametrize("name", by_default(["n64_kv4", *GOLDEN[4:]], GOLDEN))
def test_mqar_lays_out_the_authors_rows(name):
    golden = load("zoology_mqar")
    fields = ("vocab_size", "input_seq_len", "num_kv_pairs", "num_examples", "seed")
    sizes = [int(golden[f"{name}_cfg_{field}"]) for field in fields]
    drawn = drawn_by_the_authors(*sizes, float(golden[f"{name}_cfg_power_a"]))
    inputs, labels = map(np.asarray, mqar_rows(*drawn, length=sizes[1]))
    filled = golden[f"{name}_cfg_random_non_queries"]  # by torch: what was drawn by NumPy is compared
    expected = np.where((inputs == 0) & filled, 0, golden[f"{name}_inputs"])
    np.testing.assert_array_equal(inputs, expected)
    np.testing.assert_array_equal(labels, golden[f"{name}_labels"])
    assert inputs.dtype == labels.dtype == np.int32 and (not filled or (golden[f"{name}_inputs"] != inputs).any())


@recorded
@pytest.mark.parametrize("name", by_default(["n64_kv4"], ["n64_kv4", "n256_kv16"]))
def test_mqar_asks_at_the_authors_distances(name):
    """Histogram of slots within 0.02, mean distance within 3 % at 10,000 examples."""
    golden = {key.removeprefix(f"hist_{name}_"): value for key, value in load("zoology_mqar").items()}
    length, pairs = int(golden["cfg_input_seq_len"]), int(golden["cfg_num_kv_pairs"])
    options = dict(length=length, num_pairs=pairs, vocab_size=int(golden["cfg_vocab_size"]), random_non_queries=False)
    inputs, labels = map(np.asarray, jax.jit(partial(tasks.mqar, num_examples=10_000, **options))(jax.random.key(0)))
    asked = labels != -100
    np.testing.assert_allclose(asked[:, 2 * pairs :: 2].mean(axis=0), golden["query_slot_prob"], atol=0.02)
    rows, places = asked.nonzero()
    at = (inputs[rows, : 2 * pairs : 2] == inputs[rows, places][:, None]).argmax(axis=1)
    assert abs((places - 2 * at).mean() / golden["key_query_distance_mean"] - 1) < 0.03


# Readers: NumPy programs that see the tokens up to a place, and the sizes, and answer what is asked there.


def read_pairs(row, keys, values):
    """Answers at keys that came before, where a value follows at once."""
    known, answers = {}, {}
    for t, token in enumerate(row):
        if token in keys:
            if token in known:
                answers[t] = known[token]
            if t + 1 < len(row) and row[t + 1] in values:
                assert known.setdefault(token, row[t + 1]) == row[t + 1]
    return answers


def read_mqar(row, pairs, passes=1):
    context = row[: 2 * pairs * passes]
    known = dict(zip(context[::2], context[1::2], strict=True))
    return {t: known[row[t]] for t in range(len(context), len(row), 2) if row[t] in known}


def read_associative_recall(row, vocab_size):
    half = (vocab_size - 1) // 2
    assert row[-2] == vocab_size - 1
    read_pairs(row[:-2], range(half), range(half, vocab_size - 1))  # a map
    return {len(row) - 1: dict(zip(row[:-2:2], row[1:-2:2], strict=True))[row[-1]]}


def read_noisy_recall(row, vocab_size, noise_vocab_size):
    letters = vocab_size - noise_vocab_size
    return read_pairs(row, range(letters // 2), range(letters // 2, letters))


def words(row, half):
    """`(places, letters)` of the words: they end where the half of the alphabet changes."""
    starts = [t for t in range(len(row)) if t == 0 or (row[t] < half) != (row[t - 1] < half)]
    return [(range(a, b), tuple(row[a:b])) for a, b in zip(starts, starts[1:] + [len(row)], strict=True)]


def read_fuzzy_recall(row, vocab_size):
    row = row[next(t for t, token in enumerate(row) if token != vocab_size - 1) :]
    known, answers, found = {}, {}, words(row, (vocab_size - 1) // 2)
    for (_, key), (places, value) in zip(found[::2], found[1::2], strict=True):
        assert known.setdefault(key, value) == value and len(set(key)) == len(key) and len(set(value)) == len(value)
        if any(key == earlier for (at, earlier) in found[::2] if at.stop < places.start - len(key)):
            answers |= {t - len(row) - 1: letter for t, letter in zip(places, value, strict=True)}
    return answers


def read_selective_copying(row, vocab_size):
    sign = row.index(vocab_size - 1)
    letters = [token for token in row[:sign] if token < vocab_size - 2]
    assert set(row[sign + 1 :]) == {vocab_size - 2}
    return {t: letter for t, letter in zip(range(sign + 1, len(row)), letters, strict=True)}


def read_compression(row, vocab_size):
    assert row[-1] == vocab_size - 1 and max(row[:-1]) < vocab_size - 1
    return dict(enumerate(row[:-1]))


def read_induction(row, vocab_size):
    first = row.index(vocab_size - 1)
    assert row.count(vocab_size - 1) == 2 and first + 1 < len(row) - 1
    return {len(row) - 1: row[first + 1]}


SETTINGS = {
    "mqar": (dict(length=32, num_pairs=4, vocab_size=40, random_non_queries=False), partial(read_mqar, pairs=4)),
    "mqar, passes": (
        dict(length=32, num_pairs=3, vocab_size=33, num_passes=2, random_non_queries=False, power=1.0),
        partial(read_mqar, pairs=3, passes=2),
    ),
    "mqar, least": (dict(length=4, num_pairs=1, vocab_size=5), partial(read_mqar, pairs=1)),
    "associative_recall": (dict(length=20, vocab_size=20), partial(read_associative_recall, vocab_size=20)),
    "associative_recall, least": (dict(length=4, vocab_size=3), partial(read_associative_recall, vocab_size=3)),
    "noisy_recall": (
        dict(length=24, vocab_size=12, noise_vocab_size=5, noise=0.6),
        partial(read_noisy_recall, vocab_size=12, noise_vocab_size=5),
    ),
    "noisy_recall, least": (
        dict(length=4, vocab_size=3, noise_vocab_size=1, noise=0.0),
        partial(read_noisy_recall, vocab_size=3, noise_vocab_size=1),
    ),
    "fuzzy_recall": (dict(length=40, vocab_size=8), partial(read_fuzzy_recall, vocab_size=8)),
    "fuzzy_recall, tested": (
        dict(length=41, vocab_size=16, key_sizes=(3, 3), value_sizes=(2, 4)),
        partial(read_fuzzy_recall, vocab_size=16),
    ),
    "selective_copying": (
        dict(length=24, num_tokens=5, vocab_size=6),
        partial(read_selective_copying, vocab_size=6),
    ),
    "selective_copying, least": (
        dict(length=7, num_tokens=3, vocab_size=3),
        partial(read_selective_copying, vocab_size=3),
    ),
    "compression": (dict(length=9, vocab_size=4), partial(read_compression, vocab_size=4)),
    "induction": (dict(length=11, vocab_size=5), partial(read_induction, vocab_size=5)),
    "induction, least": (dict(length=3, vocab_size=2), partial(read_induction, vocab_size=2)),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_reader_answers_all_that_is_asked_and_nothing_else(setting):
    options, read = SETTINGS[setting]
    draw = jax.jit(partial(getattr(tasks, setting.split(",")[0]), num_examples=100, **options))
    inputs, labels = draw(jax.random.key(0))
    assert inputs.dtype == labels.dtype == np.int32 and inputs.shape == labels.shape == (100, options["length"])
    assert inputs.min() >= 0 and inputs.max() < options["vocab_size"]
    for row, asked in zip(np.asarray(inputs).tolist(), np.asarray(labels), strict=True):
        expected = np.full(len(row), -100)
        for t, answer in read(row).items():
            expected[t] = answer
        if setting == "mqar, least":  # filled at random: a key may come by accident, unasked
            expected[asked == -100] = -100
        np.testing.assert_array_equal(asked, expected)
    again, other = draw(jax.random.key(0)), draw(jax.random.key(1))
    assert np.array_equal(again[0], inputs) and (setting.endswith("least") or (other[0] != inputs).any())


@settings(max_examples=4, deadline=None)  # each is compiled
@given(st.data())
def test_mqar_of_any_size(data):
    """Keys and values are distinct and of their halves; each key is asked once, after the context."""
    pairs, passes, extra = (data.draw(st.integers(1, n)) for n in (4, 3, 4))
    length = 2 * pairs * (passes + 1) + 2 * (extra - 1)
    vocab = data.draw(st.integers(length + 1, length + 9))
    options = dict(length=length, num_pairs=pairs, vocab_size=vocab, num_passes=passes, random_non_queries=False)
    power = data.draw(st.sampled_from([0.01, 1.0, 3.0]))
    draw = jax.jit(partial(tasks.mqar, num_examples=3, power=power, **options))
    inputs, labels = map(np.asarray, draw(jax.random.key(extra)))
    for row, asked in zip(inputs, labels, strict=True):
        context = row[: 2 * pairs]
        assert (row[: 2 * pairs * passes] == np.tile(context, passes)).all()
        keys, values = context[::2], context[1::2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < vocab // 2 <= values.min() and values.max() < vocab
        places = (asked != -100).nonzero()[0]
        assert sorted(row[places]) == sorted(keys) and places.min() >= 2 * pairs * passes and (places % 2 == 0).all()
        rest = np.delete(row[2 * pairs * passes :], places - 2 * pairs * passes)
        assert (rest == 0).all()


def test_mqar_fills_what_is_no_query_with_anything():
    draw = partial(tasks.mqar, jax.random.key(0), num_examples=500, length=64, num_pairs=4, vocab_size=100)
    (inputs, labels), (empty, same) = jax.jit(draw)(), jax.jit(partial(draw, random_non_queries=False))()
    assert (labels == same).all() and (inputs[empty > 0] == empty[empty > 0]).all()
    filler = np.asarray(inputs[empty == 0])
    assert filler.min() == 0 and filler.max() == 99 and abs(filler.mean() - 49.5) < 1


@pytest.mark.slow
def test_shares_are_what_they_say():
    """Of noise, of sizes of words, of places."""
    inputs, _ = tasks.noisy_recall(jax.random.key(0), num_examples=1000, length=64, noise=0.4)
    assert abs((inputs[:, ::2] >= 16).mean() - 0.4 * 30 / 32) < 0.01  # two of 32 pairs never are
    inputs, _ = tasks.fuzzy_recall(jax.random.key(0), num_examples=200)
    sizes = [len(letters) for row in np.asarray(inputs).tolist() for _, letters in words(row, 7)[1:] if letters[0] < 7]
    np.testing.assert_allclose(np.bincount(sizes, minlength=4)[1:] / len(sizes), 1 / 3, atol=0.03)
    assert ((inputs == 15).sum(axis=1) < 12).all()  # less room is left than two pairs take
    inputs, _ = tasks.selective_copying(jax.random.key(0), num_examples=2000, length=30, num_tokens=5)
    np.testing.assert_allclose((inputs[:, :24] < 14).mean(axis=0), 5 / 24, atol=0.04)
    _, labels = tasks.associative_recall(jax.random.key(0), num_examples=4000, length=32, vocab_size=9)
    np.testing.assert_allclose(np.bincount(labels[:, -1])[4:] / 4000, 1 / 4, atol=0.03)


@pytest.mark.parametrize(
    "setting", by_default(["mqar"], ["mqar", "associative_recall", "noisy_recall", "fuzzy_recall", "induction"])
)
def test_tokens_are_int32_where_numbers_are_64_bits(setting):
    options, _ = SETTINGS[setting]
    with jax.enable_x64(True):
        inputs, labels = jax.jit(partial(getattr(tasks, setting), num_examples=2, **options))(jax.random.key(0))
    assert inputs.dtype == labels.dtype == np.int32


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("mqar", dict(length=63), "length=63; mqar takes an even one"),
        ("mqar", dict(vocab_size=64), "vocab_size=64; mqar takes more than length=64"),
        ("mqar", dict(num_pairs=17), "num_pairs=17: 1 times the pairs, .* need 68 tokens of length=64"),
        ("mqar", dict(num_pairs=8, num_passes=4), "4 times the pairs, .* need 80 tokens of length=64"),
        ("mqar", dict(length=4, vocab_size=5, num_pairs=0), "num_pairs=0; mqar takes 1 or more"),
        ("mqar", dict(power=0.0), "power=0.0; mqar takes a finite number above 0"),
        ("mqar", dict(power=float("nan")), "power=nan"),
        ("mqar", dict(num_passes=0), "num_passes=0; mqar takes 1 or more"),
        ("associative_recall", dict(length=7), "length=7; associative_recall takes an even one"),
        ("associative_recall", dict(vocab_size=2), "vocab_size=2; associative_recall takes 3 or more"),
        ("noisy_recall", dict(noise=1.0), "noise=1.0; noisy_recall takes a share"),
        ("noisy_recall", dict(vocab_size=17), "vocab_size=17; noisy_recall takes 18 or more"),
        ("fuzzy_recall", dict(key_sizes=(1, 8)), r"key_sizes=\(1, 8\); fuzzy_recall takes .* from 1 to 7 letters"),
        ("fuzzy_recall", dict(value_sizes=(2, 1)), r"value_sizes=\(2, 1\)"),
        ("fuzzy_recall", dict(length=11), "length=11; two pairs of up to 6 letters take 12"),
        ("selective_copying", dict(length=32), "length=32; num_tokens=16 twice"),
        ("compression", dict(length=1), "length=1; compression takes 2 or more"),
        ("induction", dict(length=2), "length=2; induction takes 3 or more"),
        ("induction", dict(num_examples=0), "num_examples=0; induction takes 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_named(task, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(tasks, task)(jax.random.key(0), **{"num_examples": 1} | options)


@pytest.fixture
def builders():
    """The builders, with a config `tiny` of MQAR."""
    pytest.importorskip("tensorflow_datasets")
    from jaxseq.tasks import builders

    settings = dict(length=16, num_pairs=2, vocab_size=20)
    examples = {"train": 7, "validation": 3, "test": 4}
    builders.MQAR.BUILDER_CONFIGS.append(builders.TaskConfig(name="tiny", settings=settings, examples=examples, seed=5))
    yield builders
    builders.MQAR.BUILDER_CONFIGS.pop()


def test_the_builders_make_the_tasks_examples(builders, tmp_path):
    """Offline, without TensorFlow; the splits share no example, and are those of the seed."""
    import tensorflow_datasets as tfds

    found = tfds.load("jaxseq_mqar/tiny", data_dir=tmp_path)
    assert {split: len(source) for split, source in found.items()} == {"train": 7, "validation": 3, "test": 4}
    rows = {split: {tuple(example["inputs"]) for example in source} for split, source in found.items()}
    assert len(set.union(*rows.values())) == 14
    test = tfds.data_source("jaxseq_mqar/tiny", split="test", data_dir=tmp_path)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 2), 0)
    settings = dict(length=16, num_pairs=2, vocab_size=20)
    inputs, labels = map(np.asarray, tasks.mqar(key, num_examples=builders.CHUNK, **settings))
    expected = {tuple(row): tuple(asked) for row, asked in zip(inputs[:4], labels[:4], strict=True)}
    assert {tuple(example["inputs"]): tuple(example["labels"]) for example in test} == expected
    assert test[0]["inputs"].dtype == test[0]["labels"].dtype == np.int32
    with pytest.raises(ValueError, match="'as_supervised': True.*array_record is read as it is"):
        tfds.load("jaxseq_mqar/tiny", data_dir=tmp_path, as_supervised=True)
    again = pickle.loads(pickle.dumps(test))  # as loaders with workers do
    np.testing.assert_array_equal(again[1]["inputs"], test[1]["inputs"])


def test_a_builder_knows_what_its_files_were_made_of(builders, tmp_path):
    """Another seed or other settings under one name are refused, where the old examples would come."""
    options = dict(name="mine", settings=dict(length=16, num_pairs=2, vocab_size=20), examples={"test": 4})
    build = lambda **change: builders.MQAR(config=builders.TaskConfig(**options | change), data_dir=tmp_path)
    build().download_and_prepare()
    assert build().info.splits["test"].num_examples == 4
    for change in ({"seed": 6}, {"settings": options["settings"] | {"vocab_size": 400}}):
        with pytest.raises(ValueError, match="was made of .* config 'mine' has .* give it another name, or remove"):
            build(**change)
    with pytest.raises(ValueError, match="settings={} of 'none' have no length"):
        builders.TaskConfig(name="none")
    with pytest.raises(ValueError, match="no split is called 'eval'; choose train, validation, test"):
        builders.TaskConfig(name="none", settings=options["settings"], examples={"eval": 3})


def test_every_recall_task_has_a_builder_whose_settings_it_takes(builders):
    import tensorflow_datasets as tfds

    classes = [kind for kind in vars(builders).values() if isinstance(kind, type) and hasattr(kind, "task")]
    assert len(classes) == 7
    for kind in classes:
        assert tfds.builder_cls(f"jaxseq_{kind.task.__name__}") is kind
        for config in kind.BUILDER_CONFIGS:
            drawn = jax.eval_shape(partial(kind.task, num_examples=2, **config.settings), jax.random.key(0))
            assert drawn[0].shape == (2, config.settings["length"])


def test_many_rows_are_drawn_in_blocks():
    """In less memory than noise for all rows at once would take, none like another, the slots' law as in one block."""
    number, vocab_size = 8192, 2048
    draw = jax.jit(partial(tasks.mqar, vocab_size=vocab_size), static_argnames="num_examples")
    key = jax.random.key(1)
    memory = draw.lower(key, num_examples=number).compile().memory_analysis()
    assert memory.temp_size_in_bytes < number * (vocab_size // 2) * 4
    law = lambda labels: np.bincount(np.nonzero(labels >= 0)[1] // 2, minlength=32) / (labels >= 0).sum()
    inputs, labels = map(np.asarray, draw(key, num_examples=number))
    assert len(np.unique(inputs, axis=0)) == number
    few = np.concatenate([np.asarray(draw(jax.random.key(n), num_examples=1024)[1]) for n in range(4)])
    assert law(few).max() > 0.1 and np.abs(law(labels) - law(few)).max() < 0.015


def test_a_steep_law_asks_late():
    """Powers whose weights no float holds: the mean slot of four pairs comes near the last, 251, and never falls."""
    means = []
    for power in (10.0, 40.0, 1e4):
        draw = partial(tasks.mqar, num_examples=256, length=512, num_pairs=4, vocab_size=1024, power=power)
        _, labels = jax.jit(draw)(jax.random.key(0))
        means.append(float(np.where(labels >= 0, (np.arange(512) - 8) / 2, 0).sum() / (4 * 256)))
    assert means == sorted(means) and means[0] > 220 and means[-1] > 245
    with pytest.raises(ValueError, match="power=inf; mqar takes a finite number above 0"):
        tasks.mqar(jax.random.key(0), num_examples=1, power=float("inf"))


@pytest.mark.parametrize("size", [64.0, "64", True, 0])
def test_sizes_are_whole_numbers(size):
    with pytest.raises(ValueError, match=f"length={size!r}; mqar takes 1 or more, whole numbers"):
        tasks.mqar(jax.random.key(0), num_examples=1, length=size)


def test_sizes_of_words_are_two():
    with pytest.raises(ValueError, match="key_sizes=3; fuzzy_recall takes the least and the largest size"):
        tasks.fuzzy_recall(jax.random.key(0), num_examples=1, key_sizes=3)
