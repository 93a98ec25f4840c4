"""Sequences with labels: ListOps against files of its format, and what readers refuse."""

import gzip

import jax
import numpy as np
import pytest
from recorded import REFERENCE
from scipy import ndimage

from jaxseq.data import Labelled, epoch_rows, listops_table, mnist, spoken_digits
from jaxseq.tasks import listops, pathfinder
from jaxseq.tasks.listops import PADDING, evaluate

DATA = REFERENCE.parent / "data"


@pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")
@pytest.mark.parametrize("name", ["listops_short", "listops_lra_length"])
def test_every_tree_of_the_tables_has_its_value(name):
    for split in listops_table(DATA / "listops" / f"{name}.tsv.gz"):
        for tokens, label, length in zip(*split, strict=True):
            assert evaluate(tokens[:length].tolist()) == label
            assert (tokens[length:] == PADDING).all()


def test_trees_are_distinct_and_of_the_lengths_asked_for():
    tokens, labels, lengths = listops(3, 50, lengths=(30, 100), max_depth=6, max_arguments=5)
    assert (lengths > 30).all() and (lengths < 100).all()
    assert len({row.tobytes() for row in tokens}) == 50 and set(labels) <= set(range(10))
    again = listops(3, 50, lengths=(30, 100), max_depth=6, max_arguments=5)
    for a, b in zip((tokens, labels, lengths), again, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="hardly any tree"):
        listops(0, 1, lengths=(100, 200), max_depth=2, max_arguments=2)
    for wrong in ([11], [10, 14], [1, 2], [14]):
        with pytest.raises(ValueError, match="tokens="):
            evaluate(wrong)


@pytest.mark.parametrize("size, dashes, number", [(32, 6, 60), (64, 9, 10)])
def test_a_path_joins_the_dots_or_none_does(size, dashes, number):
    """By the pixels alone: both dots lie in one connected part of the image, or in two parts of about one size."""
    images, labels = pathfinder(1, number, size=size, dashes=dashes)
    assert images.shape == (number, size * size, 1) and images.min() == 0 and images.max() == 1
    assert 0.25 < labels.mean() < 0.75
    for image, label in zip(images.reshape(number, size, size), labels, strict=True):
        parts, _ = ndimage.label(image > 0.05, np.ones((3, 3)))
        dots, count = ndimage.label(ndimage.binary_erosion(image > 0.85), np.ones((3, 3)))
        assert count == 2
        first, second = (parts[dots == n][0] for n in (1, 2))
        assert (first == second) == bool(label)
        sizes = np.sort(np.bincount(parts[parts > 0]))
        assert sizes[-2] > 0.5 * sizes[-1]  # the curve without dots is as long
    for a, b in zip(pathfinder(1, 5), pathfinder(1, 5), strict=True):
        np.testing.assert_array_equal(a, b)


def test_paths_that_do_not_fit():
    with pytest.raises(ValueError, match="size=16: two curves of 14 dashes .* hardly fit; choose fewer"):
        pathfinder(0, 1, size=16, dashes=14)
    for fields, message in (
        (dict(dashes=0), "dashes=0; pathfinder takes 1 or more, whole numbers"),
        (dict(size=32.5), "size=32.5; pathfinder takes 16 or more"),
        (dict(bend=float("nan")), "bend=nan; pathfinder takes"),
        (dict(dash=float("inf")), "dash=inf, "),
    ):
        with pytest.raises(ValueError, match=message):
            pathfinder(0, 1, **fields)


def write_digits(folder, rng, count=30):
    """Four idx files of tiny images."""
    for split in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (count, 4, 4), np.uint8), rng.integers(0, 10, count, np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return images, labels


def test_digits(tmp_path):
    images, labels = write_digits(tmp_path, np.random.default_rng(0))
    train, test = mnist(tmp_path)
    assert train.inputs.shape == (30, 16, 1) and train.inputs.dtype == np.float32
    assert abs(train.inputs.mean()) < 1e-5 and abs(train.inputs.std() - 1) < 1e-4
    np.testing.assert_array_equal(test.labels, labels)
    line = np.polyfit(images.reshape(-1).astype(float), test.inputs.reshape(-1), 1)
    np.testing.assert_allclose(np.polyval(line, images.reshape(30, 16)), test.inputs[..., 0], atol=1e-5)
    pooled = mnist(tmp_path, pool=2)[1]
    cells = images.reshape(30, 2, 2, 2, 2).mean(axis=(2, 4)).reshape(30, 4)
    assert np.corrcoef(cells.reshape(-1), pooled.inputs.reshape(-1))[0, 1] > 0.99999
    with pytest.raises(ValueError, match="pool=3 does not divide the 4 pixels"):
        mnist(tmp_path, pool=3)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes())[:-1]))
    with pytest.raises(ValueError, match="is no idx file of rank 1"):
        mnist(tmp_path)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        mnist(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte does not exist"):
        mnist(tmp_path)


def test_recordings(tmp_path):
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 40, 20)
    audio = rng.integers(-3000, 3000, sizes.sum()).astype(np.int16)
    offsets, index = np.concatenate([[0], np.cumsum(sizes)]), np.tile(np.arange(10), 2)
    digit = np.repeat([3, 7], 10).astype(np.int8)
    np.savez(tmp_path / "fsdd_recordings.npz", audio=audio, offsets=offsets, digit=digit, index=index)
    train, test = spoken_digits(tmp_path, length=30)
    assert len(train.labels) == len(test.labels) == 10
    np.testing.assert_array_equal(test.lengths, np.minimum(sizes[index <= 4], 30))
    spans = list(zip(offsets[:-1], offsets[1:], strict=True))
    scale = np.concatenate([audio[a:b][:30] for (a, b), n in zip(spans, index, strict=True) if n > 4]).std()
    for row, i in enumerate(np.flatnonzero(index <= 4)):
        part = audio[offsets[i] : offsets[i + 1]][:30]
        np.testing.assert_allclose(test.inputs[row, : len(part), 0], part / scale, rtol=1e-5)
        assert (test.inputs[row, len(part) :] == 0).all()
    half = spoken_digits(tmp_path, length=30, keep_every=2)[1]
    np.testing.assert_array_equal(half.lengths, -(-test.lengths // 2))
    for row, (whole, length) in enumerate(zip(test.inputs[..., 0], test.lengths, strict=True)):
        means = [whole[t : min(t + 2, length)].mean() for t in range(0, length, 2)]
        np.testing.assert_allclose(half.inputs[row, : len(means), 0], means, rtol=1e-5, atol=1e-6)
    with pytest.raises(FileNotFoundError):
        spoken_digits(tmp_path / "nothing.npz")


def test_recordings_that_are_none(tmp_path):
    """Words, nothing, a zip cut off or damaged inside, one array alone, and silence."""
    path = tmp_path / "fsdd_recordings.npz"
    arrays = dict(offsets=np.array([0, 4, 8]), digit=np.zeros(2, int), index=np.array([0, 5]))
    np.savez_compressed(path, audio=np.arange(8), **arrays)
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", np.arange(3))
    at = whole.index(b"audio.npy") + 40
    damaged = (b"no zip", b"", whole[:-30], whole[:at] + b"\xff" * 20 + whole[at + 20 :], b"\x80\x04]\x94.")
    for content in (*damaged, (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="fsdd_recordings.npz is no npz file of arrays") as error:
            spoken_digits(tmp_path)
        assert "\n" not in str(error.value)
    np.savez(path, audio=np.zeros(8), **arrays)
    with pytest.raises(ValueError, match="has no sound to train on"):
        spoken_digits(tmp_path)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="has no array audio"):
        spoken_digits(tmp_path)


def test_a_table_that_is_none(tmp_path):
    for text in ("Source\tTarget\n[MIN 1 2 ]\tx\n", "a\tb\n1\t2\n", "Source\tTarget\n[FOO 1 ]\t1\n"):
        (tmp_path / "t.tsv").write_text(text)
        with pytest.raises(ValueError, match="is no table of ListOps"):
            listops_table(tmp_path / "t.tsv")
    (tmp_path / "t.tsv").write_text("Source\tTarget\n" + "1 " * 70_000 + "\t1\n")
    with pytest.raises(ValueError, match="is no table of ListOps .*field larger than field limit"):
        listops_table(tmp_path / "t.tsv")


def test_an_epoch_uses_each_sequence_once():
    data = Labelled(np.arange(10)[:, None, None].astype(np.float32), np.arange(10), np.ones(10, int))
    batch = data.batches(3, seed=0)
    first = np.concatenate([batch(step)["labels"] for step in range(3)])
    assert len(set(first)) == 9
    second = np.concatenate([batch(step)["labels"] for step in range(3, 6)])
    assert len(set(second)) == 9 and not (first == second).all()
    np.testing.assert_array_equal(batch(4)["labels"], data.batches(3, seed=0)(4)["labels"])
    with pytest.raises(ValueError, match="batch_size=11 is more than the 10 sequences there are"):
        data.batches(11, seed=0)
    with pytest.raises(ValueError, match="batch_size=0; choose 1 or more"):
        epoch_rows(10, 0, seed=0)


def test_what_is_drawn_has_its_own_label():
    """On the host and on a device, inside `jit`; another key draws others, all are drawn in time."""
    data = Labelled(10.0 * np.arange(6)[:, None], np.arange(6), np.ones(6, int))
    inputs, labels = data.draw(jax.random.key(0), 100)
    assert set(labels.tolist()) == set(range(6))
    np.testing.assert_array_equal(inputs[:, 0], 10 * labels)
    on_device = jax.jit(jax.device_put(data).draw, static_argnums=1)(jax.random.key(0), 100)
    np.testing.assert_array_equal(on_device[1], labels)
    assert (data.draw(jax.random.key(1), 100)[1] != labels).any()


def test_rows_are_taken_of_all_arrays():
    data = Labelled(np.arange(6)[:, None], np.arange(6), np.arange(6))
    for rows in (slice(2, 4), np.array([2, 3]), data.labels // 2 == 1):
        assert all(np.ravel(x).tolist() == [2, 3] for x in data.take(rows))
