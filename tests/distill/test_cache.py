"""A cache gives back what the teacher said, whoever wrote it and however the rows are shared out."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored
import torch
import toy

from llamita import manifests, runs, storage
from llamita.distill import cache_format, cached, capture
from llamita.distill.cache import Cache, distance
from llamita.distill.losses import IGNORE, LossConfig, supervised
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import TeacherConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored.make(tmp_path_factory.mktemp("cache") / "whole").path


def contents(path: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache itself."""
    files = [path / "cache.json", path / "index.bin", path / "identity.json", *(path / "shards").rglob("*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def test_every_supervised_position_has_the_targets_of_the_teacher(made: Path) -> None:
    """Systematic counts are N p rounded up or down, so no target is further than 1/N from p."""
    batch = stored.splits()["train"].rows(np.arange(12))
    found = Cache.open(made).lookup(batch)
    lengths, picked = found["lengths"], supervised(batch["labels"])
    assert torch.equal(lengths[:, :-1] > 0, picked)
    assert not lengths[:, -1].any()
    rows = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
    table = torch.zeros(lengths.numel(), toy.VOCABULARY).index_put_((rows, found["ids"]), found["values"])
    p = stored.dense(batch)[:, :-1][picked]
    gap = (table.reshape(*lengths.shape, -1)[:, :-1][picked] - p).abs()
    assert gap.max() < 1 / 50 + 1e-6
    assert gap.max() > 1e-3


def test_any_batch_gives_the_same_targets(made: Path) -> None:
    cache, rows = Cache.open(made), stored.splits()["train"]
    order = np.array([7, 3, 31, 12, 3])
    whole = cache.lookup(rows.rows(order))
    parts = [cache.lookup(rows.rows(order[part])) for part in (slice(0, 2), slice(2, 3), slice(3, 5))]
    for name in ("ids", "values", "lengths"):
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))


def test_a_document_is_found_in_any_row(made: Path) -> None:
    """The targets of a document are those of its own, behind whatever stands before it in the row."""
    cache, batch = Cache.open(made), stored.splits()["train"].rows(np.arange(1, 3))
    swapped = {name: tensor.clone() for name, tensor in batch.items()}
    cuts = [int((batch["position_ids"][row] == 0).nonzero()[-1]) for row in range(2)]
    for name, tensor in batch.items():
        for row in range(2):
            swapped[name][row] = torch.cat([tensor[row, cuts[row] :], tensor[row, : cuts[row]]])
    before, after = cache.lookup(batch), cache.lookup(swapped)
    for row in range(2):
        lengths = before["lengths"][row]
        assert torch.equal(after["lengths"][row], torch.cat([lengths[cuts[row] :], lengths[: cuts[row]]]))
    assert sorted(before["ids"].tolist()) == sorted(after["ids"].tolist())


def test_padding_and_documents_without_a_label_take_no_space() -> None:
    batch = toy.rows(10)
    slices = list(cache_format.slices(batch))
    assert not any(one.row % 5 == 0 for one in slices)
    batch["labels"][:] = IGNORE
    assert list(cache_format.slices(batch)) == []


@pytest.mark.parametrize("sampler", list(Sampler))
def test_an_entry_takes_three_bytes_and_two_more_where_its_value_is_its_own(sampler: Sampler, tmp_path: Path) -> None:
    cache = stored.make(tmp_path / "cache", sampler=sampler, samples_per_token=20)
    for folder in (tmp_path / "cache/shards").iterdir():
        held = storage.read_json(folder / "shard.json")
        assert (folder / "entries.bin").stat().st_size == 3 * held["entries"]
        assert (folder / "lengths.bin").stat().st_size == held["tokens"]
        _, counts = cache_format.unpack(np.fromfile(folder / "entries.bin", dtype=np.uint8))
        values = folder / "values.bin"
        assert (values.stat().st_size if values.exists() else 0) == 2 * np.count_nonzero(counts == 0)
        assert values.exists() == sampler.stores_values
    found = cache.lookup(stored.splits()["validation"].rows(np.arange(6)))
    assert (
        distance(
            found,
            stored.teacher(sampler=sampler, samples_per_token=20).targets(
                stored.splits()["validation"].rows(np.arange(6))
            ),
            toy.VOCABULARY,
        )
        == 0
    )


@pytest.mark.parametrize("sampler", [Sampler.systematic, Sampler.threshold])
@pytest.mark.parametrize("workers", [1, 3])
def test_any_workers_and_batches_write_the_same_bytes(sampler: Sampler, workers: int, tmp_path: Path) -> None:
    whole = stored.make(tmp_path / "whole", sampler=sampler)
    out, rows, teacher = tmp_path / "parts", stored.splits(), stored.teacher(sampler=sampler)
    planned = capture.shards({name: len(split) for name, split in rows.items()}, 16)
    assert len(planned) == 4
    with runs.start(out, "cache", {}, runs.RunConfig()) as run:
        capture.claim(out, teacher.identity)
        for worker in reversed(range(workers)):
            capture.capture_all(teacher, planned[worker::workers], rows, run, out, batch_rows=3 + worker)
        run.finish(capture.finish(out, teacher.identity, planned))
    assert contents(out) == contents(whole.path)


def test_another_seed_gives_other_targets(tmp_path: Path, made: Path) -> None:
    other = stored.make(tmp_path / "cache", seed=1)
    batch = stored.splits()["train"].rows(np.arange(12))
    assert 0 < distance(other.lookup(batch), Cache.open(made).lookup(batch), toy.VOCABULARY) < 0.5


def test_what_was_stopped_goes_on_with_the_same_bytes(tmp_path: Path, made: Path) -> None:
    out, rows, teacher = tmp_path / "cache", stored.splits(), stored.teacher()
    planned = capture.shards({name: len(split) for name, split in rows.items()}, 16)

    class Stopping(stored.Rows):
        def rows(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
            if 24 in indices:
                (out / "control").mkdir(exist_ok=True)
                (out / "control/stop").touch()
            return super().rows(indices)

    asked = {**rows, "train": Stopping(rows["train"].data)}
    with runs.start(out, "cache", {}, runs.RunConfig()) as run:
        capture.claim(out, teacher.identity)
        with pytest.raises(runs.Stopped):
            capture.capture_all(teacher, planned, asked, run, out, batch_rows=4)
    assert [path.name for path in (out / "shards").iterdir()] == ["train-00000"]
    assert capture.missing(out, planned) == planned[1:]
    (out / "shards/.tmp-train-00001-dead").mkdir()
    assert contents(stored.make(out).path) == contents(made)
    assert not list((out / "shards").glob(".tmp-*"))


def test_verify_finds_another_teacher_and_agrees_with_its_own(made: Path) -> None:
    cache, rows, teacher = Cache.open(made), stored.splits(), stored.teacher()
    assert capture.verify(cache, teacher, rows, batches=3, batch_rows=8, allowed=0.0) == 0
    with torch.no_grad():
        teacher.teacher.model.lm_head.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"computed again differ by .* max_distance=0.01 is allowed"):
        capture.verify(cache, teacher, rows, batches=3, batch_rows=8, allowed=0.01)


def test_the_distance_of_targets_is_their_total_variation() -> None:
    lengths = torch.tensor([[2, 0, 1]])
    one = {"ids": torch.tensor([1, 3, 0]), "values": torch.tensor([0.5, 0.5, 1.0]), "lengths": lengths}
    other = {**one, "ids": torch.tensor([1, 2, 0])}
    assert distance(one, one, 9) == 0
    assert distance(one, other, 9) == pytest.approx(0.25)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize(
    "change",
    [{"teacher": "other"}, {"data": "other"}, {"temperature": 2.0}, {"seed": 5}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_a_directory_of_another_cache_is_refused(change: dict[str, Any], copy: Path) -> None:
    name = next(iter(change))
    with pytest.raises(ValueError, match=rf"cache of something else \({name}: .* there, .* now\)"):
        capture.claim(copy, replace(stored.identity(), **change))


@pytest.mark.parametrize("field", ["mask", "format"])
def test_a_mask_rule_or_format_that_is_not_known_is_refused(field: str, copy: Path) -> None:
    storage.write_json(copy / "identity.json", storage.read_json(copy / "identity.json") | {field: 99})
    with pytest.raises(ValueError, match=f"has {field} 99, this program knows"):
        capture.claim(copy, stored.identity())


def test_a_missing_or_short_shard_is_refused_when_it_is_opened(copy: Path) -> None:
    entries = copy / "shards/train-00001/entries.bin"
    os.truncate(entries, entries.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train-00001/entries.bin has .* bytes"):
        Cache.open(copy)
    shutil.rmtree(entries.parent)
    with pytest.raises(ValueError, match=r"train-00001/.* has None bytes"):
        Cache.open(copy)
    (copy / "DONE.json").unlink()
    with pytest.raises(ValueError, match=r"has no DONE.json"):
        Cache.open(copy)
    (copy / "cache.json").unlink()
    with pytest.raises(ValueError, match="of an unfinished run"):
        Cache.open(copy)


@pytest.mark.parametrize("limit", [2**40, 0])
@pytest.mark.parametrize("name", ["entries", "lengths", "slices"])
def test_a_changed_byte_is_found_before_training_and_while_reading(
    name: str, limit: int, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copy / f"shards/train-00000/{name}.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    cache = Cache.open(copy)
    monkeypatch.setattr("llamita.distill.cache.HASHED_BYTES", limit)
    with pytest.raises(ValueError, match="is not what was written"):
        cache.check_content()
    if name == "entries":
        with pytest.raises(ValueError, match=r"slice .* is not what was written"):
            cache.lookup(stored.splits()["train"].rows(np.arange(16)))


def test_rows_that_are_not_cached_are_refused(made: Path) -> None:
    cache, rows = Cache.open(made), stored.splits()
    foreign = stored.Rows(toy.rows(5, seed=77))
    cache.check_covers(rows, "toy")
    cache.check_covers(rows, "the same rows, packed in another order")
    with pytest.raises(ValueError, match=r"made from other data .* lacks (\d+) of \1 documents of its split train"):
        cache.check_covers({"train": foreign}, "foreign")
    with pytest.raises(ValueError, match="holds train, validation and lacks the split test"):
        cache.check_covers({"test": rows["train"]}, "toy")
    with pytest.raises(ValueError, match=r"has nothing for a document of .* tokens"):
        cache.lookup(foreign.rows(np.arange(5)))


@pytest.mark.parametrize("change", ["labels", "position_ids"])
def test_other_labels_or_another_mask_are_other_documents(change: str, made: Path) -> None:
    batch = stored.splits()["train"].rows(np.arange(1, 2))
    if change == "labels":
        batch["labels"] = torch.where(batch["position_ids"] == 0, IGNORE, batch["input_ids"])
    else:
        batch["position_ids"] = torch.arange(12)[None]
    with pytest.raises(ValueError, match="packed or masked in another way"):
        Cache.open(made).lookup(batch)


def test_two_keys_that_begin_alike_are_told_apart(made: Path) -> None:
    cache = Cache.open(made)
    slices = list(cache_format.slices(stored.splits()["train"].rows(np.arange(8))))
    key = slices[0].key
    assert cache.find([key, key[:8] + bytes(8), key]) == [cache.find([key])[0], None, cache.find([key])[0]]


@pytest.mark.parametrize(
    ("loss", "tokenizer", "message"),
    [
        ({}, "other", "is of another tokenizer"),
        ({"temperature": 2.0}, "words", "loss.temperature=2.0 is not the temperature 1.0"),
        ({"divergence": "reverse_kl"}, "words", "loss.divergence=reverse_kl needs whole distributions"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(loss: dict[str, Any], tokenizer: str, message: str, made: Path) -> None:
    teachers = {"big": TeacherConfig(cache=made)}
    assert cached.open_all(teachers, LossConfig(), "words")["big"].path == made
    with pytest.raises(ValueError, match=message):
        cached.open_all(teachers, LossConfig(**loss), tokenizer)


def test_another_teacher_than_the_one_beside_it_is_refused(made: Path) -> None:
    caches, parents = {"big": Cache.open(made)}, {"student": "s"}
    cached.check_content(caches, parents, stored.splits(), "toy")
    assert parents == {"student": "s", "big": "abc", "big/cache": storage.sha256(made / "cache.json")}
    with pytest.raises(ValueError, match=r"is of another teacher \(abc\) than teachers.big.path \(xyz\)"):
        cached.check_content(caches, {"big": "xyz"}, stored.splits(), "toy")


def test_a_shard_is_published_whole(made: Path) -> None:
    for folder in (made / "shards").iterdir():
        assert manifests.check_manifest(folder, hashes=True) is None


def test_a_process_waits_for_the_shards_of_others_and_hears_of_a_stop(tmp_path: Path) -> None:
    """Whole ones are not waited for; one that is removed is, until the stop comes."""
    out = tmp_path / "cache"
    stored.make(out)
    wanted = capture.shards({name: len(split) for name, split in stored.splits().items()}, 16)
    with runs.start(tmp_path / "other", "cache", {}, runs.RunConfig()) as run:
        capture.wait(wanted, run, out)
        shutil.rmtree(out / "shards" / wanted[1].name)
        (out / "control").mkdir(exist_ok=True)
        (out / "control" / "stop").touch()
        with pytest.raises(runs.Stopped, match="the shards that are whole stay"):
            capture.wait(wanted, run, out)
