"""Series in the files of the archives: what is read, and one clear line for each bad file."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from jaxseq.data import labelled_series

DATA = Path(__file__).parents[2] / "shared" / "data"
HEADERS = "# a remark, by Müller\n@problemName toy\n@timeStamps false\n@classLabel true up down\n@data\n"
TRAIN = HEADERS + "1,2,3:0,0,1:up\n\n3,2,1:1,0,0:down\n5,6:7,8:up\n"
TEST = HEADERS.upper().replace("UP DOWN", "up down") + "2,2,2,2:1,1,1,1:down\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that are given, by name."""

    def write(**files: str | bytes) -> Path:
        for name, content in files.items():
            content = content.encode("latin-1") if isinstance(content, str) else content
            path = tmp_path / name.replace("__", ".")
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return tmp_path

    return write


@pytest.mark.skipif(not DATA.exists(), reason="the data sets are not beside the repository")
def test_public_sets():
    motions = labelled_series(DATA / "ucr_uea", "BasicMotions")
    assert motions.train.inputs.shape == motions.test.inputs.shape == (40, 100, 6)
    assert sorted(motions.classes) == ["Badminton", "Running", "Standing", "Walking"]
    assert np.bincount(motions.test.labels).tolist() == [10] * 4
    appliances = labelled_series(DATA / "ucr_uea", "PLAID")
    assert appliances.train.lengths.min() < appliances.train.lengths.max() == appliances.train.inputs.shape[1]
    assert appliances.classes == tuple(map(str, range(11)))
    hearts = labelled_series(DATA / "ecg5000", "ECG5000")
    together = np.bincount(hearts.train.labels) + np.bincount(hearts.test.labels)
    assert together.tolist() == [292, 177, 10, 19, 2] and hearts.classes == ("1", "2", "3", "4", "5")
    assert (np.bincount(hearts.train.labels) >= 1).all() and len(hearts.test.labels) == 250


@pytest.mark.parametrize("ending", ["ts", "ts__gz"])
def test_series_of_unequal_lengths(folder, ending):
    """Channels between colons; scaled by what is trained on alone, zeros after the end."""
    found = labelled_series(folder(**{f"toy_TRAIN__{ending}": TRAIN, f"toy_TEST__{ending}": TEST}), "toy")
    assert found.classes == ("down", "up")
    assert found.train.labels.tolist() == [1, 0, 1] and found.test.labels.tolist() == [0]
    assert found.train.lengths.tolist() == [3, 3, 2] and found.test.lengths.tolist() == [4]
    steps = np.array([[1, 0], [2, 0], [3, 1], [3, 1], [2, 0], [1, 0], [5, 7], [6, 8]], float)
    scaled = ((steps - steps.mean(axis=0)) / steps.std(axis=0)).astype(np.float32)
    np.testing.assert_allclose(found.train.inputs[0, :3], scaled[:3], rtol=1e-6)
    np.testing.assert_allclose(found.train.inputs[2, :2], scaled[6:], rtol=1e-6)
    assert (found.train.inputs[2, 2:] == 0).all()
    np.testing.assert_allclose(
        found.test.inputs[0], np.tile(scaled[1:2] + [[0, 1 / steps.std(axis=0)[1]]], (4, 1)), rtol=1e-5
    )


def test_missing_values_take_the_last_before_them(folder):
    where = folder(toy_TRAIN__ts=HEADERS + "?,1,NaN,3:up\n4,4,4,4:down\n3,?,?,3:up\n1,2,3,4:down\n")
    with pytest.raises(ValueError, match="line 6: 2 values are missing; fill them, or set missing to 'forward'"):
        labelled_series(where, "toy")
    found = labelled_series(where, "toy", missing="forward")
    rows = np.concatenate([found.train.inputs, found.test.inputs])[:, :, 0]
    flat = rows[:, 1:] - rows[:, :-1]  # 1 1 1 3, and three times 3
    assert sorted(np.count_nonzero(np.abs(flat) > 1e-6, axis=1).tolist()) == [0, 0, 1, 3]


@pytest.mark.parametrize("between", [",", "\t"])
def test_an_empty_cell_is_a_missing_value(folder, between):
    rows = ["1,1,,3", "2,4,5,6", "1,7,8,9,", "2,1,2,NaN"]
    where = folder(toy_TRAIN__tsv="\n".join(rows).replace(",", between), none_TRAIN__txt=",1,2\n")
    with pytest.raises(ValueError, match="line 1: 1 values are missing"):
        labelled_series(where, "toy")
    found = labelled_series(where, "toy", missing="forward")
    assert sorted([*found.train.lengths, *found.test.lengths]) == [2, 3, 3, 3]
    with pytest.raises(ValueError, match="line 1: a series has its label first; the cell is empty"):
        labelled_series(where, "none")


def test_missing_values_at_the_end_of_all_channels_end_a_series(folder):
    """One that ends a channel alone is missing."""
    rows = "1,2,NaN,NaN:1,2,3,?:up\n1,2,3,4:1,2,3,4:down\n?,1,?,?:1,1,?,?:up\n"
    where = folder(toy_TRAIN__ts=HEADERS + rows, toy_TEST__ts=HEADERS + "1,2,?:1,2,?:up\n")
    with pytest.raises(ValueError, match="line 6: 1 values are missing"):
        labelled_series(where, "toy")
    found = labelled_series(where, "toy", missing="forward")
    assert found.train.lengths.tolist() == [3, 4, 2] and found.test.lengths.tolist() == [2]


def test_a_channel_that_never_changes_in_training_is_shifted_alone(folder):
    where = folder(toy_TRAIN__ts=HEADERS + "1,2:5,5:up\n", toy_TEST__ts=HEADERS + "1,2:5,6:up\n")
    found = labelled_series(where, "toy")
    np.testing.assert_array_equal(found.train.inputs[0, :, 1], [0, 0])
    np.testing.assert_array_equal(found.test.inputs[0, :, 1], [0, 1])


def test_rows_of_a_label_and_values_are_split_by_class(folder):
    """Where there is no test file; another seed, another half; all in one of the two."""
    rows = [f"{1 + n % 2}.0000e+00 {n} {n + 1}  {n * n}" for n in range(20)]
    where = folder(toy_TRAIN__txt="\n".join(rows), csv_TRAIN__tsv="\n".join(rows).replace("  ", " ").replace(" ", ","))
    found = labelled_series(where, "toy", test_share=0.3)
    assert found.classes == ("1", "2")
    assert np.bincount(found.train.labels).tolist() == [7, 7] and np.bincount(found.test.labels).tolist() == [3, 3]
    first = np.concatenate([found.train.inputs, found.test.inputs])[:, 0, 0]
    assert len(set(first.tolist())) == 20
    again, other = labelled_series(where, "toy", test_share=0.3), labelled_series(where, "toy", test_share=0.3, seed=1)
    np.testing.assert_array_equal(again.test.inputs, found.test.inputs)
    assert not np.array_equal(other.test.labels, found.test.labels) or not np.allclose(
        other.test.inputs, found.test.inputs
    )
    commas = labelled_series(where, "csv", test_share=0.3)
    np.testing.assert_array_equal(commas.train.inputs, found.train.inputs)
    with pytest.raises(ValueError, match="test_share=0.01 of the 20 series of .* leaves none"):
        labelled_series(where, "toy", test_share=0.01)


BAD = {
    "no data": (HEADERS.replace("@data\n", ""), "has no line @data"),
    "no headers": ("1,2,3:up\n", "line 1: '1,2,3:up' comes before @data"),
    "no series": (HEADERS, "holds no series"),
    "no label": (HEADERS + "1,2,3\n", "line 6: a series has its label after a colon"),
    "another class": (HEADERS + "1,2:left\n", "line 6: 'left' is none of the classes up, down"),
    "words": (HEADERS + "1,two:up\n", "line 6: 'two' is no number"),
    "infinite": (HEADERS + "1,inf:up\n", "line 6: a value is not finite"),
    "too large": (HEADERS + "1,1e300:up\n" * 2, "column 1 holds 1e\\+300; its deviation is not finite"),
    "python's own": (HEADERS + "1,1_000:up\n", "line 6: '1_000' is no number"),
    "ragged channels": (HEADERS + "1,2:1,2,3:up\n", "line 6: channels of 2 and of 3 values"),
    "other channels": (HEADERS + "1,2:1,2:up\n1,2:down\n", "line 7: 1 channels, and 2 in the first series"),
    "empty channel": (HEADERS + "1,2:?,?:up\n", "line 6: channel 2 has no values"),
    "times": (HEADERS.replace("timeStamps false", "timeStamps true"), "has times beside its values"),
    "regression": (HEADERS.replace("@classLabel true up down", "@targetLabel true"), "has no classes"),
    "binary": (b"\0\1\2", "is no text"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(name, folder):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message) as error:
        labelled_series(folder(toy_TRAIN__ts=content), "toy")
    assert "toy_TRAIN.ts" in str(error.value) and "\n" not in str(error.value)


def test_a_bad_pair_of_files_is_named(folder):
    with pytest.raises(FileNotFoundError, match="has no toy_TRAIN ending in .ts, .txt, .tsv"):
        labelled_series(folder(), "toy")
    where = folder(toy_TRAIN__ts=HEADERS + "1,2:up\n", toy_TEST__ts=HEADERS + "1,3:down\n")
    with pytest.raises(ValueError, match="toy_TEST.ts, line 6: no series to train on is of the class 'down'"):
        labelled_series(where, "toy")
    where = folder(toy_TEST__ts=HEADERS + "1,3:1,3:up\n")
    with pytest.raises(ValueError, match="toy_TEST.ts, line 6: 2 channels, and 1 to train on"):
        labelled_series(where, "toy")
    (where / "toy_TRAIN.ts").unlink()
    (where / "toy_TRAIN.ts.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="toy_TRAIN.ts.gz is damaged"):
        labelled_series(where, "toy")
    for wrong, message in ((dict(missing="drop"), "missing='drop'"), (dict(test_share=1.0), "test_share=1.0")):
        with pytest.raises(ValueError, match=message):
            labelled_series(folder(row_TRAIN__txt="1 2 3\n2 3 4\n"), "row", **wrong)
    with pytest.raises(ValueError, match="line 2: a series has values after its label"):
        labelled_series(folder(row_TRAIN__txt="1 2 3\n2\n"), "row")
