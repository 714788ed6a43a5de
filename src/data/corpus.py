"""All documents of all sources, stored once, each known by its content.

Shape letters: D = distinct documents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from llamita.data import sources, split, tokens
from llamita.data.shards import Words
from llamita.data.sources import Kind, Source

log = logging.getLogger(__name__)

Int = NDArray[np.int64]


@dataclass(kw_only=True)
class Corpus:
    """The distinct documents, memory-mapped; only a few numbers of each are in memory."""

    sources: Sequence[Source]
    read: list[int]
    """How many documents each source gave, copies included."""
    tables: list[Any]
    """The ``datasets.Dataset`` of each source's distinct documents."""
    source_index: Int
    num_bytes: Int
    priority: NDArray[np.uint64]


def read(found: Sequence[Source], folder: Path, *, seed: int, allow_network: bool = False) -> Corpus:
    """Store the documents of all sources in ``folder``; of equal documents only the first is kept.

    Raises:
        ValueError: a source has no documents, or is damaged.
    """
    tables: list[Any] = []
    counts: list[int] = []
    for source in found:
        place = f"source {source.name!r} ({source.kind}, path={source.config.path})"
        path = folder / f"documents-{len(tables)}.arrow"
        count = sources.store(sources.documents(source, allow_network=allow_network), path, place=place)
        if not count:
            raise ValueError(f"{place} is empty: it holds no document with any text")
        log.info("%s: %d documents", place, count)
        tables.append(datasets.Dataset.from_file(str(path)))
        counts.append(count)
    digest_D2 = np.concatenate([_digests(table) for table in tables])
    source_D = np.repeat(np.arange(len(tables)), counts)
    first = split.first_copies(digest_D2)
    begins = np.cumsum([0, *counts])
    distinct = [first[source_D[first] == index] - begins[index] for index in range(len(tables))]
    bytes_D = np.concatenate([_column(table, "bytes") for table in tables])
    return Corpus(
        sources=found,
        read=counts,
        tables=[table.select(index) for table, index in zip(tables, distinct, strict=True)],
        source_index=source_D[first],
        num_bytes=bytes_D[first],
        priority=split.priority(digest_D2[first, 0], seed),
    )


def _digests(table: Any) -> NDArray[np.uint64]:
    """The 16 bytes of each digest as two words."""
    chunks = table.data.column("digest").chunks
    return np.concatenate(
        [np.frombuffer(c.buffers()[1], np.uint64).reshape(-1, 2)[c.offset : c.offset + len(c)] for c in chunks]
    )


def _column(table: Any, name: str) -> Int:
    column: Int = table.data.column(name).to_numpy()
    return column


def sample(corpus: Corpus, wanted: NDArray[np.bool_], max_bytes: int) -> Iterator[str]:
    """Texts of the wanted documents in pseudo-random order, until ``max_bytes`` of UTF-8 are reached; no dialogues.

    Raises:
        ValueError: there is none.
    """
    is_text = np.array([source.kind is not Kind.dialogues for source in corpus.sources])
    candidates = np.flatnonzero(wanted & is_text[corpus.source_index])
    if not candidates.size:
        raise ValueError("tokenizer.path is unset, and there is no text to train a vocabulary on but dialogues")
    candidates = candidates[np.argsort(corpus.priority[candidates], kind="stable")]
    before = np.cumsum(corpus.num_bytes[candidates]) - corpus.num_bytes[candidates]
    begins = np.searchsorted(corpus.source_index, np.arange(len(corpus.tables)))
    for document in candidates[before < max_bytes].tolist():
        source = int(corpus.source_index[document])
        yield corpus.tables[source][int(document - begins[source])]["text"]


def encode(corpus: Corpus, tokenizer: Any, folder: Path, *, date: str, num_proc: int) -> tuple[Words, Int]:
    """The words of all distinct documents end to end, memory-mapped, and the length of each document."""
    path = folder / "stream.bin"
    lengths: list[Int] = []
    with path.open("wb") as file:
        for index, (source, table) in enumerate(zip(corpus.sources, corpus.tables, strict=True)):
            if not len(table):
                continue
            encoder = (
                tokens.DialogueEncoder(tokenizer, date)
                if source.kind is Kind.dialogues
                else tokens.TextEncoder(tokenizer)
            )
            scratch = folder / f"words-{index}.arrow"
            texts = table.select_columns(["text"])
            mean_bytes = float(corpus.num_bytes[corpus.source_index == index].mean())
            for words, length_D in tokens.encode(texts, encoder, scratch, mean_bytes=mean_bytes, num_proc=num_proc):
                file.write(words.data)
                lengths.append(length_D)
            for part in folder.glob(f"{scratch.stem}*"):
                part.unlink()
    return np.memmap(path, dtype=np.uint32, mode="r"), np.concatenate(lengths)


def describe(corpus: Corpus, length_D: Int, chosen: Mapping[str, Int]) -> dict[str, Any]:
    """What each source gave to each split: documents and tokens, and how many copies were left out."""
    described: dict[str, Any] = {}
    for index, source in enumerate(corpus.sources):
        described[source.name] = {
            "kind": source.kind.value,
            "path": source.config.path,
            "weight": source.config.weight,
            "documents_read": corpus.read[index],
            "duplicates": corpus.read[index] - len(corpus.tables[index]),
        }
        for name, documents in chosen.items():
            here = documents[corpus.source_index[documents] == index]
            described[source.name][name] = {"documents": here.size, "tokens": int(length_D[here].sum())}
    return described
