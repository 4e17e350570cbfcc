"""Rows of Arrow tables: Parquet files, data sets of the `datasets` package, in hand, saved on disk or on the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from posttrain.data.formats.fields import Place, doubled, shown
from posttrain.data.json_rows import Found
from posttrain.data.strict import Refused
from posttrain.errors import ConfigError, DataError

_ROWS = 1024  # decoded at a time, fewer where rows are large
_BYTES = 8 << 20
_HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[^/:]+))?(?:/(?P<split>[^/:]+))?")


def parquet_rows(path: Path) -> Iterator[tuple[Place, Found]]:
    """Yield the rows of a Parquet file, a batch of a row group at a time.

    Raises:
        DataError: a file that is cut off or damaged, a column of a type that JSON has no value for.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file:
            meta = file.metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            widest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1.0)
            size = int(max(1, min(_ROWS, _BYTES / max(widest, 1))))
            yield from _tables(file.iter_batches(batch_size=size, use_threads=False), str(path))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole Parquet file ({_line(error)}); copy or write it again") from error


def dataset_rows(data: Any) -> Iterator[tuple[Place, Found]]:
    """Yield the rows of a `datasets.Dataset` or `datasets.IterableDataset`.

    Raises:
        ConfigError: another kind of object; of a dictionary of splits, one has to be chosen.
    """
    import datasets

    if isinstance(data, datasets.Dataset):
        return _tables(data.with_format("arrow").iter(_ROWS), "Dataset")  # pyright: ignore[reportArgumentType]
    if isinstance(data, datasets.IterableDataset):
        return _streamed(data, "IterableDataset")
    if isinstance(data, dict):
        raise ConfigError(f"got the splits {', '.join(map(str, data))}; expected one of them, as in data['train']")
    raise ConfigError(f"can't read rows of {type(data).__name__}; expected a Dataset or an IterableDataset")


def saved_rows(path: Path) -> Iterator[tuple[Place, Found]]:
    """Yield the rows of a directory that ``save_to_disk`` wrote.

    Raises:
        ConfigError: the directory holds several splits.
        DataError: its files are damaged.
    """
    import datasets
    import pyarrow as pa

    if (path / "dataset_dict.json").is_file():
        splits = sorted(item.name for item in path.iterdir() if (item / "state.json").is_file())
        raise ConfigError(f"'{path}' holds the splits {', '.join(splits) or 'none'}; name one, as in '{path}/train'")
    try:
        data: Any = datasets.Dataset.load_from_disk(str(path))
        yield from _tables(data.with_format("arrow").iter(_ROWS), str(path))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a whole saved data set ({_line(error)}); save it again") from error


def hub_rows(name: str) -> Iterator[tuple[Place, Found]]:
    """Yield the rows of a data set on the Hugging Face hub, as they are downloaded.

    Raises:
        ConfigError: a name of another form, several splits and none chosen, a data set that can't be reached.
    """
    import datasets

    parts = _HUB.fullmatch(name)
    if parts is None:
        raise ConfigError(f"got '{name}'; expected hf:ORG/NAME, hf:ORG/NAME:CONFIG or hf:ORG/NAME:CONFIG/SPLIT")
    try:
        data: Any = datasets.load_dataset(parts["name"], parts["config"], split=parts["split"], streaming=True)
    except Exception as error:  # of the hub's client, the network, the file systems: no common class
        raise ConfigError(f"can't open '{name}' on the hub ({_line(error)}); check the name, or read a file") from error
    if isinstance(data, dict):
        if len(data) != 1:
            raise ConfigError(f"'{name}' has the splits {', '.join(map(str, data))}; name one, as in '{name}/train'")
        data = next(iter(data.values()))
    return _streamed(data, name)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def _streamed(rows: Iterable[Any], file: str) -> Iterator[tuple[Place, Found]]:
    for number, row in enumerate(rows, 1):
        place = Place(file, number)
        yield place, _row(row, place)


def _row(row: Any, place: Place) -> Found:
    try:
        return {key: _value(part, key) for key, part in row.items()}
    except Refused as refused:
        return place.fault(*refused.args)


def _tables(batches: Iterable[Any], file: str) -> Iterator[tuple[Place, Found]]:
    """Rows of tables, all of one schema. Arrow can't leave a field of a structure out, so a null there is an absent field."""
    number = 0
    plain: bool | None = None
    for batch in batches:
        plain = _columns(batch.schema, file) if plain is None else plain
        names = batch.schema.names
        for cells in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            number += 1
            row, place = dict(zip(names, cells, strict=True)), Place(file, number)
            yield place, row if plain else _row(row, place)


def _columns(schema: Any, file: str) -> bool:
    """Whether the columns' values are taken as they are; raises on columns of types that JSON has no values for."""
    import pyarrow.types as kinds

    def fits(kind: Any) -> bool:
        if kinds.is_struct(kind):
            return all(fits(kind.field(i).type) for i in range(kind.num_fields))
        if any(is_kind(kind) for is_kind in nested):
            return fits(kind.value_type)
        timed = kinds.is_temporal(kind) and not kinds.is_duration(kind)
        return scalar(kind) or kinds.is_floating(kind) or kinds.is_null(kind) or timed

    def scalar(kind: Any) -> bool:
        text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)
        return text or kinds.is_integer(kind) or kinds.is_boolean(kind)

    nested = (kinds.is_dictionary, kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
    if twice := doubled(schema.names):
        raise DataError(f"{file}: two columns are named {shown(twice[0])}; rename one")
    for i, name in enumerate(schema.names):
        if not fits(schema.field(i).type):
            kind = str(schema.field(i).type)[:60]
            raise DataError(f"{file}: column {shown(name)} is of type {kind}, which is not read; write it without")
    return all(scalar(schema.field(i).type) for i in range(len(schema.names)))


def _value(value: Any, field: str) -> Any:
    """A cell as JSON has it: no nulls in structures, dates as text, no NaN."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Refused(field, f"found {value}", "write a finite number, or null where there is none")
        return value
    if isinstance(value, dict):
        return {key: _value(part, f"{field}.{key}") for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_value(part, f"{field}[{i}]") for i, part in enumerate(value)]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    raise Refused(field, f"a value of type {type(value).__name__} is not read", "write the data without it")
