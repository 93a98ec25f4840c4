"""The text of a TensorFlow Datasets set, read through array_record: no TensorFlow, one plain line on failure."""

import os
from urllib.error import HTTPError
from urllib.request import urlopen


def texts(name: str, data_dir: str | os.PathLike[str] | None) -> dict[str, list[bytes]]:
    """The first `Text` feature of every example, for those of train, validation and test that the set has."""
    import tensorflow_datasets as tfds  # a second to import, and needed by few

    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except ValueError as error:  # unknown, or stored in another format
        reason = str(error).splitlines()[0].rpartition('}": ')[2]
        raise ValueError(
            f"tfds cannot open {name!r} ({reason}); choose a set that tfds knows, or one stored in data_dir={data_dir} "
            "as array_record."
        ) from None
    if not builder.is_prepared():
        _prepare(builder, name)
    feature = next((key for key, kind in builder.info.features.items() if isinstance(kind, tfds.features.Text)), None)
    if feature is None or "train" not in builder.info.splits:
        found = f"features {', '.join(builder.info.features)}; splits {', '.join(builder.info.splits)}"
        raise ValueError(f"{name!r} lacks a Text feature or a train split ({found}); choose a text set.")
    splits = [split for split in ("train", "validation", "test") if split in builder.info.splits]
    return {split: [bytes(example[feature]) for example in builder.as_data_source(split)] for split in splits}


def _prepare(builder, name: str) -> None:
    import tensorflow_datasets as tfds

    for url in list(builder.url_infos or {})[:1]:  # ask once: the download itself would retry for minutes
        try:
            urlopen(url, timeout=10).close()
        except HTTPError:
            pass  # it answered
        except (OSError, ValueError) as error:
            raise ConnectionError(
                f"{name!r} is not in {builder.data_path}, and {url} cannot be reached ({error}); on a machine with a "
                f"network run tfds.builder({name!r}, file_format='array_record').download_and_prepare() and copy the "
                f"folder it makes to {builder.data_path}."
            ) from None
    try:
        config = tfds.download.DownloadConfig(try_download_gcs=False)  # what lies there is not array_record
        builder.download_and_prepare(download_config=config)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{name!r} could not be prepared in {builder.data_path}: {reason}") from error
