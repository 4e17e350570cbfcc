"""Public data sets by their usual names: kept as files, and fetched from the Hugging Face hub where they are not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from posttrain.data.opened import READABLE, kind_by_name, stem
from posttrain.errors import ConfigError

_SECONDS = 5.0  # that the hub may take to answer


class Public(NamedTuple):
    """A data set on the hub: its repository, and the file that holds each split."""

    repository: str
    splits: Mapping[str, str]


PUBLIC = {
    "gsm8k": Public(
        "openai/gsm8k",
        {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"},
    )
}
"""Name to where it is."""


def public_files(name: str, directory: Path) -> dict[str, Path]:
    """Split to file of a public data set, in ``directory``, where what is missing is fetched once.

    Raises:
        ConfigError: a split is neither there nor can it be fetched.
    """
    found = {stem(path): path for path in sorted(directory.glob("*")) if kind_by_name(path)}
    for split, file in PUBLIC[name].splits.items():
        if split not in found:
            found[split] = _fetched(name, split, file, directory)
    return {split: found[split] for split in PUBLIC[name].splits}


def _fetched(name: str, split: str, file: str, directory: Path) -> Path:
    """A split's file, copied from the hub."""
    from huggingface_hub import constants, hf_hub_download

    repository = PUBLIC[name].repository
    try:
        _reachable(constants.ENDPOINT)
        path = hf_hub_download(repository, file, repo_type="dataset", etag_timeout=_SECONDS)
    except Exception as error:  # of the hub's client, the network, the file systems: no common class
        raise ConfigError(
            f"data '{name}' is not in '{directory}', and {repository} can't be fetched from the hub "
            f"({type(error).__name__}); put its {split} split there as {split}.jsonl ({READABLE}), or give a file with --data"
        ) from error
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{split}.parquet.tmp"
    shutil.copyfile(path, partial)
    return partial.rename(directory / f"{split}.parquet")


def _reachable(endpoint: str) -> None:
    """Ask the hub for an answer once: its client tries for minutes.

    Raises:
        OSError: it gives none within seconds.
    """
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=_SECONDS).close()
    except HTTPError:
        return  # an answer, whatever it says
