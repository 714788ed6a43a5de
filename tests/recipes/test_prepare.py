"""The whole of ``prepare``: what it writes, what it refuses, and that a kill at any point only costs time."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from llamita import chat, checkpoints, runs, stops
from llamita.data import tokens
from llamita.data.loader import Loader, Sequential
from llamita.data.shards import ID, START, UNSUPERVISED, PackedData
from llamita.data.sources import Kind, SourceConfig
from llamita.data.split import ValidationConfig
from llamita.data.tokens import TokenizerConfig

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = [file.read_text(encoding="utf-8") for file in sorted((REPOSITORY / "src").rglob("*.py"))]


@pytest.fixture
def prepare(recipe: Callable[[str], ModuleType]) -> ModuleType:
    return recipe("prepare")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer"
    tokens.save(tokens.train(TEXTS, 400), None, path)
    return path


@pytest.fixture
def settings(tokenizer_path: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "source": SourceConfig(path=str(REPOSITORY / "src")),
        "tokenizer": TokenizerConfig(path=tokenizer_path),
        "validation": ValidationConfig(fraction=0.2),
        "sequence_length": 64,
        "num_proc": 1,
        "out": tmp_path / "out",
    }


def documents_in(data: PackedData, split: str) -> Counter[int]:
    """How often each token id is in a split, padding left out."""
    rows = data.split(split)
    words = rows.words(np.arange(len(rows)))
    pad_id = chat.borders(checkpoints.load_tokenizer(data.tokenizer_path)).pad_id
    ids, counts = np.unique(words[(words & ID) != pad_id] & ID, return_counts=True)
    return Counter(dict(zip(ids.tolist(), counts.tolist(), strict=True)))


def texts_in(data: PackedData, split: str, *, supervised: bool = False) -> list[str]:
    """The documents of a split without begin and end, or their supervised part; where no document is cut."""
    tokenizer = checkpoints.load_tokenizer(data.tokenizer_path)
    pad_id = chat.borders(tokenizer).pad_id
    rows = data.split(split)
    words = rows.words(np.arange(len(rows))).ravel()
    pieces = np.split(words, np.flatnonzero(words & START)[1:])
    pieces = [piece for piece in pieces if piece[0] & ID != pad_id]
    if supervised:
        pieces = [piece[(piece & UNSUPERVISED) == 0] for piece in pieces]
    texts = [tokenizer.decode((piece & ID).tolist()) for piece in pieces]
    return [text.removeprefix(chat.BOS).removesuffix(chat.EOS) for text in texts]


def exit_code(prepare: ModuleType, *overrides: str, limit_bytes: int | None = None) -> int | None:
    """How ``python recipes/prepare.py overrides…`` ends; forked, so that nothing is imported again."""

    def program() -> None:
        sys.argv = ["prepare.py", *overrides]
        if limit_bytes is not None:  # the nearest to a full disk that needs no rights: no file may grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        prepare.exit_with(prepare.main)

    child = multiprocessing.get_context("fork").Process(target=program)
    child.start()
    child.join()
    return child.exitcode


def test_every_token_of_every_document_is_there_once(prepare: ModuleType, settings: dict[str, Any]) -> None:
    prepare.run(prepare.Prepare(**settings))
    data = PackedData.open(settings["out"])
    encoder = tokens.TextEncoder(checkpoints.load_tokenizer(data.tokenizer_path))
    wanted = Counter(t for text in set(TEXTS) if text for t in encoder({"text": [text]})["words"][0].tolist())
    assert documents_in(data, "train") + documents_in(data, "validation") == wanted
    manifest = data.manifest
    assert sum(split["tokens"] for split in manifest["splits"].values()) == wanted.total()
    assert sum(split["utf8_bytes"] for split in manifest["splits"].values()) == sum(
        len(text.encode()) for text in set(TEXTS)
    )
    assert manifest["splits"]["train"]["padding"] < 0.02
    assert data.tokenizer_hash == checkpoints.tokenizer_hash(checkpoints.load_tokenizer(data.tokenizer_path))
    assert (data.vocab_size, data.sequence_length) == (400, 64)


def test_the_directory_feeds_a_run(prepare: ModuleType, settings: dict[str, Any]) -> None:
    prepare.run(prepare.Prepare(**settings))
    data = PackedData.open(settings["out"])
    loader = Loader(data.split("train"), seed=0, global_batch_rows=4, micro_batch_rows=2)
    assert [batch["input_ids"].shape for batch in next(loader)] == [(2, 64), (2, 64)]
    labels = sum(int((b["labels"] != -100).sum()) for b in Sequential(data.split("validation"), batch_rows=8))
    assert labels == data.manifest["splits"]["validation"]["labels"]


def test_a_second_run_returns_at_once_and_writes_nothing(prepare: ModuleType, settings: dict[str, Any]) -> None:
    prepare.run(prepare.Prepare(**settings))
    before = {path: path.stat().st_mtime_ns for path in settings["out"].rglob("*") if path.is_file()}
    prepare.run(prepare.Prepare(**settings | {"num_proc": 2}))
    assert {path: path.stat().st_mtime_ns for path in settings["out"].rglob("*") if path.is_file()} == before


def test_the_number_of_processes_changes_no_byte(prepare: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    hashes = set()
    for num_proc in (1, 2):
        out = tmp_path / str(num_proc)
        prepare.run(prepare.Prepare(**settings | {"num_proc": num_proc, "out": out}))
        hashes.add(PackedData.open(out).content_hash)
    assert len(hashes) == 1


def test_a_system_that_does_not_tell_which_cores_are_mine_has_them_all(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS."""
    assert prepare.num_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert prepare.num_cores() == os.cpu_count()


def test_a_vocabulary_is_trained_where_no_tokenizer_is_given(prepare: ModuleType, settings: dict[str, Any]) -> None:
    settings["tokenizer"] = TokenizerConfig(vocab_size=500, train_bytes=30_000)
    prepare.run(prepare.Prepare(**settings))
    data = PackedData.open(settings["out"])
    tokenizer = checkpoints.load_tokenizer(data.tokenizer_path)
    assert data.vocab_size == len(tokenizer) == 500
    assert tokenizer.bos_token == chat.BOS


def test_the_bytes_to_train_on_change_the_vocabulary(
    prepare: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    hashes = set()
    for train_bytes in (20_000, 200_000):
        out = tmp_path / str(train_bytes)
        settings |= {"tokenizer": TokenizerConfig(vocab_size=300, train_bytes=train_bytes), "out": out}
        prepare.run(prepare.Prepare(**settings))
        hashes.add(PackedData.open(out).tokenizer_hash)
    assert len(hashes) == 2


def test_a_copy_of_a_held_out_document_is_not_trained_on(
    prepare: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Every document twice, in two sources, in two orders: no first line may be in both splits."""
    texts = [f"{number} is a number of its own." for number in range(200)]
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
    settings.pop("source")
    settings["sources"] = {name: SourceConfig(path=str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")}
    with pytest.raises(
        ValueError, match="source 'b' has no document left to train on: all are held out, or are copies"
    ):
        prepare.run(prepare.Prepare(**settings))
    settings["packing"] = prepare.PackingConfig(max_padding=1.0)
    settings["out"] = tmp_path / "other"
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write(json.dumps({"text": "and one that is not"}) + "\n")
    prepare.run(prepare.Prepare(**settings))
    data = PackedData.open(settings["out"])
    found = {split: texts_in(data, split) for split in ("train", "validation")}
    assert len(found["validation"]) > 10
    assert not set(found["train"]) & set(found["validation"])
    assert sorted(found["train"] + found["validation"]) == sorted([*texts, "and one that is not"])
    assert data.manifest["sources"]["b"]["duplicates"] == 200


def test_weights_are_shares_of_the_training_tokens(
    prepare: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        rows = [{"text": f"{name} {number} " * 3} for number in range(300)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings.pop("source")
    settings["sources"] = {
        "a": SourceConfig(path=str(tmp_path / "a.jsonl"), weight=3),
        "b": SourceConfig(path=str(tmp_path / "b.jsonl"), weight=1),
    }
    prepare.run(prepare.Prepare(**settings, max_tokens=2000))
    sources = PackedData.open(settings["out"]).manifest["sources"]
    assert 1450 < sources["a"]["train"]["tokens"] <= 1500
    assert 450 < sources["b"]["train"]["tokens"] <= 500


def test_padding_is_bounded_by_the_setting(prepare: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    """Documents of 40 of 64 tokens: whole ones waste more than a third of each row."""
    rows = [{"text": chr(200 + number) * 19} for number in range(200)]  # two byte tokens each: 38, and two around
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["source"] = SourceConfig(path=str(tmp_path / "x.jsonl"))
    padding = {}
    for bound in (0.02, 1.0):
        out = tmp_path / str(bound)
        packing = prepare.PackingConfig(max_padding=bound)
        prepare.run(prepare.Prepare(**settings | {"packing": packing, "out": out}))
        padding[bound] = PackedData.open(out).manifest["splits"]["train"]["padding"]
    assert padding[0.02] < 0.02 < 0.3 < padding[1.0]


def test_dialogues_supervise_the_assistant_only(prepare: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": "A number."}]}
        for n in range(50)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings["source"] = SourceConfig(path=str(tmp_path / "x.jsonl"), kind=Kind.dialogues)
    settings["packing"] = prepare.PackingConfig(max_padding=1.0)
    prepare.run(prepare.Prepare(**settings))
    data = PackedData.open(settings["out"])
    for text in texts_in(data, "train"):
        assert text.endswith("assistant<|end_header_id|>\n\nA number.<|eot_id|>")
    assert set(texts_in(data, "train", supervised=True)) == {"A number.<|eot_id|>"}


def test_dialogues_alone_cannot_train_a_vocabulary(
    prepare: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    row = {"messages": [{"role": "assistant", "content": "x"}]}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    settings |= {
        "source": SourceConfig(path=str(tmp_path / "x.jsonl"), kind=Kind.dialogues),
        "tokenizer": TokenizerConfig(),
        "validation": ValidationConfig(fraction=0),
    }
    with pytest.raises(ValueError, match="there is no text to train a vocabulary on but dialogues"):
        prepare.run(prepare.Prepare(**settings))


@pytest.mark.parametrize("point", ["after_shard", "after_shard:2", "before_rename", "mid_rename:2", "before_done"])
def test_a_run_that_is_killed_can_simply_be_run_again(
    prepare: ModuleType, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    prepare.run(prepare.Prepare(**settings | {"out": tmp_path / "straight"}))
    monkeypatch.setenv("LLAMITA_CRASH_AT", point)
    child = multiprocessing.get_context("fork").Process(target=prepare.run, args=(prepare.Prepare(**settings),))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    monkeypatch.delenv("LLAMITA_CRASH_AT")
    with pytest.raises(ValueError, match="unfinished run"):
        PackedData.open(settings["out"])
    prepare.run(prepare.Prepare(**settings))
    names = ("data.json", "shards/train-00000.bin", "shards/validation-00000.bin", "tokenizer/tokenizer.json")
    for name in names:
        assert (settings["out"] / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not list(settings["out"].glob(".*"))


def test_a_run_that_is_asked_to_stop_leaves_nothing_half_written(
    prepare: ModuleType, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stops.StopSignal, "is_set", lambda self: True)
        with pytest.raises(runs.Stopped, match="start it again"):
            prepare.run(prepare.Prepare(**settings))
    assert not {"data.json", "shards", "tokenizer", ".data"} & {path.name for path in settings["out"].glob("*")}
    prepare.run(prepare.Prepare(**settings))
    PackedData.open(settings["out"])


def _say_and_sleep(pipe: Any) -> None:
    pipe.send("ready")
    time.sleep(600)


def test_a_forked_worker_of_a_run_ends_when_it_is_told(tmp_path: Path) -> None:
    """Else the pool that ``datasets`` ends after its work would wait for it for ever."""
    with runs.start(tmp_path, "prepare", {}, runs.RunConfig()):
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=_say_and_sleep, args=(there,))
        child.start()
        assert here.recv() == "ready"
        child.terminate()
        child.join(300)
        assert child.exitcode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sequence_length": 1}, "sequence_length must be at least 2, got 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
        ({"source": SourceConfig()}, r"set either source\.path .* or sources"),
        ({"sources": {"a": SourceConfig(path="x")}}, r"set either source\.path .* or sources"),
        ({"source": SourceConfig(path="/nowhere")}, "path=/nowhere does not exist or holds no file"),
        ({"tokenizer": TokenizerConfig(path=Path("/nowhere"))}, r"tokenizer\.path=/nowhere is not a directory"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    prepare: ModuleType, settings: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare.run(prepare.Prepare(**settings | overrides))
    assert not settings["out"].exists()


def test_an_empty_corpus_is_refused(prepare: ModuleType, settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n')
    settings["source"] = SourceConfig(path=str(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match=r"source 'source' .* is empty: it holds no document with any text"):
        prepare.run(prepare.Prepare(**settings))
    assert not (settings["out"] / ".data").exists()


def test_a_single_document_from_which_some_shall_be_held_out_is_refused(
    prepare: ModuleType, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Else the evaluation finds out, after the training."""
    (tmp_path / "corpus.txt").write_text("All books in one file. " * 100)
    settings["source"] = SourceConfig(path=str(tmp_path / "corpus.txt"))
    with pytest.raises(ValueError, match=r"validation\.fraction=0\.2 can hold nothing out of a single document"):
        prepare.run(prepare.Prepare(**settings))
    settings["validation"] = ValidationConfig(fraction=0)
    prepare.run(prepare.Prepare(**settings))
    assert PackedData.open(settings["out"]).manifest["splits"]["train"]["documents"] == 1


def test_the_command_of_the_contract_works(tokenizer_path: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(REPOSITORY / "recipes" / "prepare.py")]
    overrides = [f"source.path={REPOSITORY / 'src'}", f"tokenizer.path={tokenizer_path}", "sequence_length=64"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "typings")}
    subprocess.run([*program, *overrides, f"out={tmp_path}"], env=environment, cwd="/", check=True)
    assert len(PackedData.open(tmp_path).split("train")) > 100


def test_a_mistake_ends_with_64_and_one_message(
    prepare: ModuleType, tokenizer_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = (f"source.path={REPOSITORY / 'src'}", f"tokenizer.path={tokenizer_path}", f"out={tmp_path / 'out'}")
    for mistake, message in (
        ("source.weight=-1", "source.weight must be > 0, got -1.0"),
        ("sequence_length=many", "could not be converted to Integer"),
        ("source.weigth=1", "Key 'weigth' not in 'SourceConfig'"),
        ("source.kind=movies", "Invalid value 'movies', expected one of"),
        ("source.path=/nowhere", "path=/nowhere does not exist"),
        ("sequence_length=???", "sequence_length"),
    ):
        assert exit_code(prepare, *given, "sequence_length=64", mistake) == 64
        said = capfd.readouterr().err
        assert message in said
        assert "Traceback" not in said
        assert not list((tmp_path / "out").glob("*"))  # Hydra makes the folder before it knows any setting


def test_a_full_disk_is_the_users_error_and_leaves_nothing_half_written(
    prepare: ModuleType, tokenizer_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wherever it strikes: while the documents are stored, in a worker that encodes, in the stream of all."""
    rows = [{"text": f"{n}" + "語" * 100} for n in range(3000)]  # 1.0 MB, 1.8 in each worker, 3.7 as stream
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (f"source.path={tmp_path / 'x.jsonl'}", f"tokenizer.path={tokenizer_path}", "sequence_length=64")
    for limit_bytes in (500_000, 1_400_000, 2_500_000):
        out = tmp_path / str(limit_bytes)
        assert exit_code(prepare, *given, "num_proc=2", f"out={out}", limit_bytes=limit_bytes) == 64
        assert "File too large" in capfd.readouterr().err
        assert {path.name for path in out.glob("*")} <= {"config.yaml", "run.json", "logs", "metrics.jsonl"}
