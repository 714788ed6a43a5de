"""Documents of every kind of source, and a clear word about each that is damaged."""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from huggingface_hub import constants

from llamita.data import sources
from llamita.data.sources import Kind, SourceConfig, documents, resolve, store

TEXTS = ["first\r\ndocument", "second", "третий ✓"]


def read(path: Path | str, **settings: Any) -> list[str]:
    return list(documents(resolve("source", SourceConfig(path=str(path), **settings))))


def lines(values: list[Any]) -> bytes:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode()


def two_frames(data: bytes) -> bytes:
    """As ``pzstd`` or ``cat a.zst b.zst`` write."""
    return b"".join(zstandard.compress(part) for part in (data[: len(data) // 2], data[len(data) // 2 :]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": two_frames}


@pytest.mark.parametrize("suffix", PACKERS)
def test_each_line_of_jsonl_is_a_document(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(PACKERS[suffix](lines([{"text": text, "id": 1} for text in TEXTS]) + b"\n"))
    assert read(file) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
def test_each_text_file_is_a_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(PACKERS[suffix](text.encode()))
    assert read(tmp_path) == TEXTS


def test_the_largest_window_of_zstd_is_read(tmp_path: Path) -> None:
    """A frame by hand (RFC 8878): a window of 2^31 bytes, as ``zstd --long=31`` asks for, and one raw block."""
    text = b"far apart"
    window, block = bytes([(31 - 10) << 3]), (len(text) << 3 | 1).to_bytes(3, "little")
    (tmp_path / "x.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + window + block + text)
    assert read(tmp_path / "x.txt.zst") == ["far apart"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_short_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"x.jsonl{suffix}"
    packed = PACKERS[suffix](lines([{"text": str(number) * 50} for number in range(1000)]))
    file.write_bytes(packed[:-5])
    with pytest.raises(ValueError, match=rf"x\.jsonl\{suffix} is damaged or cut short"):
        read(file)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_it_says_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.txt{suffix}").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=rf"x\.txt\{suffix} is damaged or cut short"):
        read(tmp_path)


def test_each_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": TEXTS, "n": [1, 2, 3]}), tmp_path / "x.parquet", row_group_size=2)
    assert read(tmp_path / "x.parquet", text_field="body") == TEXTS
    with pytest.raises(ValueError, match=r"x\.parquet has no column 'text'; it has body, n"):
        read(tmp_path / "x.parquet")


def test_a_parquet_file_that_was_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": TEXTS}), file)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"x\.parquet is not a whole Parquet file"):
        read(file)


def test_a_saved_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "other": rows.select([1])}).save_to_disk(str(tmp_path / "several"))
    assert read(tmp_path / "one") == TEXTS
    assert read(tmp_path / "several", split="other") == TEXTS[1:2]
    with pytest.raises(ValueError, match="has no split 'test'; it has train, other"):
        read(tmp_path / "several", split="test")
    with pytest.raises(ValueError, match="has no column 'body'; it has text"):
        read(tmp_path / "one", text_field="body")


def test_a_data_set_that_is_not_here_is_not_fetched_unless_told() -> None:
    with pytest.raises(ValueError, match="the network is not used unless allow_network=true"):
        read("no-such/data-set-of-this-test", kind=Kind.datasets)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_network_is_on_only_where_it_is_allowed_and_only_meanwhile(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load(path: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((path, subset, split, datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    source = resolve("source", SourceConfig(path="some/name", kind=Kind.datasets, subset="en", split="test"))
    assert list(documents(source, allow_network=allowed)) == TEXTS
    assert asked == [("some/name", "en", "test", not allowed, not allowed)]
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_dialogues_are_the_text_of_their_messages(tmp_path: Path) -> None:
    messages = [{"content": "hi", "role": "user", "extra": 1}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "x.jsonl").write_bytes(lines([{"messages": messages}]))
    (text,) = read(tmp_path / "x.jsonl", kind=Kind.dialogues)
    assert json.loads(text) == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list that is not empty"),
        ("hello", "messages must be a list that is not empty"),
        ([{"role": "user"}], "each message needs role and content, both strings"),
        ([{"role": "user", "content": "hi"}], "no message of the assistant"),
    ],
)
def test_a_dialogue_that_teaches_nothing_is_refused_with_its_line(
    tmp_path: Path, messages: object, message: str
) -> None:
    good = [{"role": "assistant", "content": "x"}]
    (tmp_path / "x.jsonl").write_bytes(lines([{"messages": good}, {"messages": messages}]))
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {message}"):
        read(tmp_path / "x.jsonl", kind=Kind.dialogues)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "is not JSON"),
        (b'{"body": "x"}', r"is an object with body, and has no field 'text' \(text_field names the field\)"),
        (b'{"messages": []}', "kind=dialogues reads messages"),
        (b"[1, 2]", "is a list, and has no field 'text'"),
        (b'{"text": 5}', "the text is a int, it must be a string"),
        (b'{"text": "\xff"}', "is not UTF-8 text: byte 10 is 0xff"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": "good"}]) + line + b"\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2:? {message}|x\.jsonl:2.*{message}"):
        read(tmp_path / "x.jsonl")


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"x\.txt is not UTF-8 text: byte 2 is 0xff"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_corpus_in_a_single_document_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(sources, "LARGEST_DOCUMENT", 1000)
    row = lines([{"text": "x" * 900}])
    (tmp_path / f"x.jsonl{suffix}").write_bytes(PACKERS[suffix](row * 2 + lines([{"text": "x" * 1000}])))
    with pytest.raises(ValueError, match=r"x\.jsonl.*:3 has more than 1000 bytes: split it into documents"):
        read(tmp_path / f"x.jsonl{suffix}")
    (tmp_path / f"x.txt{suffix}").write_bytes(PACKERS[suffix](b"x" * 1001))
    with pytest.raises(ValueError, match=r"x\.txt.*, one document to kind=text, has more than 1000 bytes"):
        read(tmp_path / f"x.txt{suffix}")


def test_a_lone_surrogate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\\ud800"}\n')
    texts = documents(resolve("source", SourceConfig(path=str(tmp_path))))
    with pytest.raises(ValueError, match="here: document 2 is not valid Unicode text"):
        store(texts, tmp_path / "out.arrow", place="here")


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": ""}, {"text": "a"}, {"text": ""}]))
    assert read(tmp_path / "x.jsonl") == ["a"]


def test_limits_stop_early(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines([{"text": "äää"}] * 10))
    assert len(read(tmp_path / "x.jsonl", max_documents=4)) == 4
    assert len(read(tmp_path / "x.jsonl", max_bytes=13)) == 3


def test_folders_globs_and_suffixes(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", ".hidden/d.txt", "e.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.md", "b.txt", "deep/c.txt"]
    assert read(tmp_path, suffixes=[".log"]) == ["e.log"]
    assert read(tmp_path, kind=Kind.text, suffixes=[".txt", ".log"]) == ["b.txt", "deep/c.txt", "e.log"]
    assert read(tmp_path / "**" / "*.txt") == ["b.txt", "deep/c.txt"]
    assert read(tmp_path / "e.log", kind=Kind.text) == ["e.log"]


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(ValueError, match=r"has an unknown suffix \(x\.docx\); known are \.txt"):
        read(tmp_path / "x.docx")
    with pytest.raises(ValueError, match=r"path=.*nowhere does not exist or holds no file"):
        read(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "x.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"holds files of several kinds \(jsonl, text\): set the source's kind"):
        read(tmp_path)
    with pytest.raises(ValueError, match="source 'source' has no path"):
        resolve("source", SourceConfig(kind=Kind.text))
    with pytest.raises(ValueError, match="no file with a suffix that is wanted"):
        read(tmp_path, kind=Kind.parquet)


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 0.0), ("weight", -1.0), ("max_documents", 0), ("max_bytes", 0), ("suffixes", ["py"])]
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"source\.{name} must"):
        SourceConfig(**{name: value})


def test_the_standard_library_is_there_sorted_and_without_its_tests() -> None:
    files = resolve("source", SourceConfig(kind=Kind.python_stdlib)).files
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [file.relative_to(root).as_posix() for file in files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idlelib", "lib2to3", "site-packages", "__pycache__"}


def test_a_stored_document_keeps_its_text_size_and_digest(tmp_path: Path) -> None:
    assert store([*TEXTS, TEXTS[0]], tmp_path / "x.arrow", place="here", batch_bytes=1) == 4
    table = datasets.Dataset.from_file(str(tmp_path / "x.arrow"))
    assert table["text"][:] == [*TEXTS, TEXTS[0]]
    assert table["bytes"][:] == [len(text.encode()) for text in [*TEXTS, TEXTS[0]]]
    assert table["digest"][0] == table["digest"][3] != table["digest"][1]
