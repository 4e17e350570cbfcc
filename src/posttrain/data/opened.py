"""Open a data file as bytes: compression is told by its first bytes, and what can't be read is refused by name."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, DataError

MAX_ROW = 64 << 20
"""Bytes a row may have: a longer one is a wrong file, and a row is held in memory whole."""

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".parquet": "parquet",
}
"""Suffix to kind of file; all but Parquet also as .gz or .zst."""

READABLE = "JSON lines, JSON, CSV, TSV or YAML (each also as .gz or .zst), Parquet"
PARQUET = b"PAR1"

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BUFFER = 1 << 17
_ZSTD_PIECE = 2048  # a block of 4 bytes can stand for 128 KiB, so little is fed at a time
_REFUSED = (
    (b"PK\x03\x04", "a zip archive (or .xlsx, .npz)", "unpack it"),
    (b"BZh", "bzip2", "unpack it, or pack it with gzip"),
    (b"\xfd7zXZ\x00", "xz", "unpack it, or pack it with gzip"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (b"ARROW1\x00\x00", "an Arrow file", "write Parquet, or name the directory that save_to_disk wrote"),
    (b"\x93NUMPY", "a NumPy array", "write one JSON object a line"),
    (b"\x80\x04", "a pickle, which is never loaded", "write one JSON object a line"),
    (b"\x80\x05", "a pickle, which is never loaded", "write one JSON object a line"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data itself", "run `git lfs pull`"),
    (b"<!doctype", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (_GZIP, "packed twice", "unpack it once"),
    (_ZSTD, "packed twice", "unpack it once"),
)


def kind_by_name(path: str | Path) -> str:
    """Return the kind of file that a name's suffix promises (a value of `SUFFIXES`), '' for any other."""
    return SUFFIXES.get(Path(_unpacked(Path(path).name)).suffix.lower(), "")


def stem(path: str | Path) -> str:
    """Return a data file's name without the suffixes of its kind and packing."""
    name = _unpacked(Path(path).name)
    return Path(name).stem if kind_by_name(path) else name


def _unpacked(name: str) -> str:
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in (".gz", ".zst") else name


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """Open a file for reading its bytes, unpacked if it begins as gzip or Zstandard does.

    Raises:
        DataError: a packed file that is cut off or damaged (also while it is read), a name that promises packing.
        ConfigError: a file that can't be opened, or Zstandard without its package.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"can't read '{path}': {error.strerror}; check the path and its permissions") from error
    packing = "gzip"
    try:
        with file:
            head = file.peek(4)[:4]
            if head.startswith(_GZIP):
                with gzip.GzipFile(fileobj=file) as raw, io.BufferedReader(raw, _BUFFER) as handle:
                    yield handle
            elif head == _ZSTD:
                packing = "Zstandard"
                with io.BufferedReader(_Zstandard(file, path), _BUFFER) as handle:
                    yield handle
            elif head and path.suffix.lower() in (".gz", ".zst"):
                raise DataError(f"{path}: named {path.suffix}, but isn't packed; drop the {path.suffix}")
            else:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole {packing} file ({error}); copy or pack it again") from error


class _Zstandard(io.RawIOBase):
    """Zstandard frames, unpacked as they are read; a frame that is cut off raises EOFError, as gzip does."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f"'{path}' needs the extra zst: pip install 'posttrain[zst]'") from error
        self._file = file
        self._error = zstandard.ZstdError
        self._new: Callable[[], Any] = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._frame: Any = None
        self._left = b""  # of the file, after the end of a frame
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._out:
            piece = self._left or self._file.read(_ZSTD_PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError("it ends before the end of its last frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._out = memoryview(self._frame.decompress(piece))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._left = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def refuse_foreign(head: bytes, file: object) -> None:
    """Raise `DataError` if a file's first bytes are those of a kind that isn't read here, saying which."""
    for magic, what, remedy in _REFUSED:
        if head[: len(magic)].lower() == magic.lower():
            raise DataError(f"{file}: it is {what}; {remedy}; expected {READABLE}")
