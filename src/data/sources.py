"""Where documents come from: files, folders, data sets, dialogues, or the interpreter's own library."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from llamita import hub, stdlib

log = logging.getLogger(__name__)


class Kind(StrEnum):
    """What a source is."""

    text = "text"
    """Each file is a document; also .gz and .zst."""
    jsonl = "jsonl"
    """Each line is an object with a text; also .gz and .zst."""
    parquet = "parquet"
    """Each row has a column of text."""
    datasets = "datasets"
    """A name on the Hugging Face hub, or a folder that ``Dataset.save_to_disk`` wrote."""
    dialogues = "dialogues"
    """JSONL whose lines have ``messages``: ``[{"role": …, "content": …}, …]``; only the assistant is supervised."""
    python_stdlib = "python_stdlib"
    """The source files of the running interpreter's standard library, its tests left out."""


SUFFIXES = {
    Kind.text: (".txt", ".text", ".md", ".rst", ".py"),
    Kind.jsonl: (".jsonl", ".ndjson", ".json"),
    Kind.parquet: (".parquet",),
}
COMPRESSED = (".gz", ".zst")
LARGEST_DOCUMENT = 2**30
"""Bytes of one document. What is larger is a corpus in a single file, which no machine's memory need hold."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents."""

    path: str | None = None
    """A file, a folder, a glob, or the name of a data set; ``python_stdlib`` needs none."""
    kind: Kind | None = None
    """Unset: told from the suffix."""
    text_field: str = "text"
    """The field of a JSON object or the column of a table that holds the text."""
    suffixes: list[str] = field(default_factory=list)
    """Which files of a folder or a glob are read, such as ``[.py, .md]``; empty: those known for the kind."""
    subset: str | None = None
    """The configuration of a data set that has several."""
    split: str = "train"
    """The split of a data set."""
    weight: float | None = None
    """Share of the training tokens, relative to the other sources' weights; unset for all: everything is taken."""
    max_documents: int | None = None
    """Read no more than the first so many documents."""
    max_bytes: int | None = None
    """Stop after the document with which so many UTF-8 bytes are reached."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"source.weight must be > 0, got {self.weight}")
        for name in ("max_documents", "max_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"source.{name} must be at least 1, got {value}")
        if bad := [suffix for suffix in self.suffixes if not suffix.startswith(".")]:
            raise ValueError(f"source.suffixes must begin with a dot, got {bad[0]!r}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source whose kind is known and whose files were found."""

    name: str
    kind: Kind
    config: SourceConfig
    files: tuple[Path, ...]


def resolve(name: str, config: SourceConfig) -> Source:
    """Find the files of a source.

    Raises:
        ValueError: there is no such path, its kind cannot be told, or nothing in it has a fitting suffix.
    """
    setting = f"source {name!r}: path={config.path}"
    if config.kind is Kind.python_stdlib:
        return Source(name=name, kind=config.kind, config=config, files=tuple(stdlib.files()))
    if config.path is None:
        raise ValueError(f"source {name!r} has no path; set it, or kind=python_stdlib which needs none")
    path = Path(config.path).expanduser()
    if config.kind is Kind.datasets or (config.kind is None and hub.is_saved(path)):
        return Source(name=name, kind=Kind.datasets, config=config, files=())
    files, named = _find(path)
    if not files:
        raise ValueError(
            f"{setting} does not exist or holds no file; for a data set of the hub set kind=datasets (and "
            "allow_network=true where it is not here yet)"
        )
    if config.suffixes:
        files = [file for file in files if suffix_of(file) in config.suffixes]
    kind = config.kind or _kind_of(files, setting, default=Kind.text if config.suffixes else None)
    if not named and not config.suffixes:
        known = SUFFIXES[Kind.jsonl if kind is Kind.dialogues else kind]
        files = [file for file in files if suffix_of(file) in known]
    if not files:
        raise ValueError(f"{setting} has no file with a suffix that is wanted; see source.suffixes")
    return Source(name=name, kind=kind, config=config, files=tuple(files))


def suffix_of(file: Path) -> str:
    """The suffix that tells the content: that before ``.gz`` or ``.zst`` where a file is compressed."""
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _find(path: Path) -> tuple[list[Path], bool]:
    """Files of a path, a folder (all below it) or a glob, sorted; and whether one file was named outright."""
    if path.is_file():
        return [path], True
    if path.is_dir():
        visible = (p for p in path.rglob("*") if not any(q.startswith(".") for q in p.relative_to(path).parts))
        return sorted(p for p in visible if p.is_file()), False
    return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()), False


def _kind_of(files: list[Path], setting: str, *, default: Kind | None) -> Kind:
    kinds = {kind for kind, known in SUFFIXES.items() for file in files if suffix_of(file) in known}
    if len(kinds) > 1:
        raise ValueError(f"{setting} holds files of several kinds ({', '.join(sorted(kinds))}): set the source's kind")
    if kinds:
        return kinds.pop()
    if default is not None:
        return default
    known = ", ".join(suffix for values in SUFFIXES.values() for suffix in values)
    raise ValueError(
        f"{setting} has an unknown suffix ({files[0].name}); known are {known}, also with .gz or .zst: "
        "else set the source's kind"
    )


def documents(source: Source, *, allow_network: bool = False) -> Iterator[str]:
    """The documents of a source in its order; a dialogue is the JSON text of its messages. Empty ones are left out.

    Raises:
        ValueError: a file is damaged or not what the kind promises; the message names file and line.
    """
    texts = (text for text in _all_documents(source, allow_network) if text)
    limited = itertools.islice(texts, source.config.max_documents)
    total = 0
    for text in limited:
        yield text
        if source.config.max_bytes is not None:
            total += len(text.encode())
            if total >= source.config.max_bytes:
                return


def _all_documents(source: Source, allow_network: bool) -> Iterator[str]:
    match source.kind:
        case Kind.text | Kind.python_stdlib:
            return map(read_text, source.files)
        case Kind.jsonl:
            return _json_fields(source.files, source.config.text_field, _text)
        case Kind.dialogues:
            return _json_fields(source.files, "messages", _messages)
        case Kind.parquet:
            return _parquet(source)
        case Kind.datasets:
            return _dataset(source, allow_network)


def read_text(file: Path) -> str:
    """A whole file as UTF-8, newlines as they are."""
    with _open(file) as stream:
        return _decode(_limited(stream.read(LARGEST_DOCUMENT + 1), f"{file}, one document to kind=text,"), str(file))


def _limited(data: bytes, place: str) -> bytes:
    if len(data) > LARGEST_DOCUMENT:
        raise ValueError(
            f"{place} has more than {LARGEST_DOCUMENT} bytes: split it into documents, such as one JSON object per line"
        )
    return data


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from error


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed by its suffix; damage is a ``ValueError`` that names the file."""
    try:
        if file.suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                yield stream  # type: ignore[misc]
        elif file.suffix == ".zst":
            with file.open("rb") as compressed, io.BufferedReader(_Zstd(compressed)) as stream:
                yield stream
        else:
            with file.open("rb") as stream:
                yield stream
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error


class _Zstd(io.RawIOBase):
    """Decompressed bytes of all frames of a zstd file.

    ``zstandard.open`` stops without a word after the first frame, and where a frame is cut short. Windows are accepted
    up to the largest there are, ``zstd --long=31``.
    """

    def __init__(self, compressed: IO[bytes]) -> None:
        self._compressed = compressed
        self._frame: Any = None
        self._ahead = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._ahead or self._compressed.read(2**17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last zstd frame has no end")
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._ahead = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _json_fields(files: Iterable[Path], name: str, check: Callable[[Any, str], str]) -> Iterator[str]:
    for file in files:
        with _open(file) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LARGEST_DOCUMENT + 1), b""), start=1):
                place = f"{file}:{number}"
                if _limited(line, place).strip():
                    yield check(_field(_decode(line, place), name, place), place)


def _field(line: str, name: str, place: str) -> Any:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict) or name not in row:
        has = f"an object with {', '.join(sorted(row)[:8])}" if isinstance(row, dict) else f"a {type(row).__name__}"
        hint = "; kind=dialogues reads messages" if isinstance(row, dict) and "messages" in row else ""
        raise ValueError(f"{place} is {has}, and has no field {name!r} (text_field names the field{hint})")
    return row[name]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: the text is a {type(value).__name__}, it must be a string")
    return value


def _messages(value: Any, place: str) -> str:
    """The messages as JSON text with a fixed order of keys, so that equal dialogues are equal documents."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: messages must be a list that is not empty")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{place}: each message needs role and content, both strings, got {str(message)[:80]}")
    if not any(message["role"] == "assistant" for message in value):
        raise ValueError(f"{place}: no message of the assistant, so nothing to learn from")
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in value], ensure_ascii=False)


def _parquet(source: Source) -> Iterator[str]:
    column = source.config.text_field
    for file in source.files:
        try:
            with pq.ParquetFile(file) as table:
                _check_column(column, table.schema_arrow.names, str(file))
                for batch in table.iter_batches(columns=[column], batch_size=1024):
                    for value in batch.column(0).to_pylist():
                        yield _text(value, str(file))
        except (pa.ArrowInvalid, pa.ArrowException) as error:
            raise ValueError(f"{file} is not a whole Parquet file: {error}") from error


def _check_column(column: str, names: list[str], place: str) -> None:
    if column not in names:
        raise ValueError(f"{place} has no column {column!r}; it has {', '.join(names)} (text_field names the column)")


def _dataset(source: Source, allow_network: bool) -> Iterator[str]:
    config = source.config
    assert config.path is not None
    rows = hub.load(config.path, subset=config.subset, split=config.split, allow_network=allow_network)
    _check_column(config.text_field, rows.column_names, config.path)
    for batch in rows.select_columns([config.text_field]).iter(batch_size=1024):
        for value in batch[config.text_field]:
            yield _text(value, config.path)


SCHEMA = pa.schema([("text", pa.large_string()), ("digest", pa.binary(16)), ("bytes", pa.int64())])


def store(texts: Iterable[str], path: Path, *, place: str, batch_bytes: int = 2**24) -> int:
    """Write documents with a digest of their content and their UTF-8 size to an Arrow file; returns how many."""
    count = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        rows: list[tuple[str, bytes, int]] = []
        size = 0
        for text in texts:
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{place}: document {count + len(rows) + 1} is not valid Unicode text: {error}"
                ) from error
            rows.append((text, hashlib.blake2b(data, digest_size=16).digest(), len(data)))
            size += len(data)
            if size >= batch_bytes or len(rows) == 10_000:
                writer.write_batch(_record_batch(rows))
                count += len(rows)
                rows, size = [], 0
        if rows:
            writer.write_batch(_record_batch(rows))
    return count + len(rows)


def _record_batch(rows: list[tuple[str, bytes, int]]) -> pa.RecordBatch:
    columns = [pa.array(column, type=kind) for column, kind in zip(zip(*rows, strict=True), SCHEMA.types, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
