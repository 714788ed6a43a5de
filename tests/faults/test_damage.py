"""Disks that are full, slow, gone, or lie; checkpoints, data and settings that were changed under the run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import starts
from cases import Case

from llamita import manifests, runs, storage
from llamita.data.shards import PackedData
from llamita.distill import state
from llamita.metrics import mend_metrics, metric_rows, read_metrics

Made = Callable[..., Case]
Note = Callable[..., None]


@pytest.fixture
def damaged(whole: Made, case: Made) -> Case:
    """A copy of the undisturbed run that is not finished: as if it had been killed after its last checkpoint."""
    reference, run = whole(), case()
    shutil.copytree(reference.out, run.out)
    for name in ("DONE.json", "model.safetensors"):
        (run.out / name).unlink()
    shutil.copy(reference.rows_file, run.rows_file)
    run.starts += reference.starts
    config = Path(run.out / "config.yaml")
    config.write_text(config.read_text().replace(str(reference.out), str(run.out)))
    return run


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 7)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "weights cut by seven bytes": ("weights.safetensors", cut),
    "a bit of the moments": ("optimizer.safetensors", flip),
    "a bit of the random states": ("random-00000.json", flip),
    "a bit of the manifest": ("MANIFEST.json", flip),
    "no state": ("state.json", Path.unlink),
    "no manifest": ("MANIFEST.json", Path.unlink),
    "empty manifest": ("MANIFEST.json", lambda file: file.write_text("")),
    "manifest of nothing": ("MANIFEST.json", lambda file: file.write_text('{"files": {}}')),
    "manifest of a list": ("MANIFEST.json", lambda file: file.write_text('{"files": ["weights.safetensors"]}')),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_f07_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    kind: str, damaged: Case, whole: Made, note: Note
) -> None:
    """The start says which and why, and makes the steps again; the damaged one is put aside until then."""
    name, damage = DAMAGE[kind]
    damage(damaged.folder / "step-12" / name)
    output = damaged.ends(0).output()
    assert "checkpoint step-12 is passed over: " in output
    assert "going on from" in output
    assert damaged.lost() == [3]
    note("the checkpoint before was taken, and why was said", **damaged.check_equal(whole()))


def test_f07_any_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path, note: Note) -> None:
    """Of its manifest and of its files: there is no bit that could change unseen."""
    with manifests.publishing(tmp_path / "step-1") as folder:
        (folder / "weights.safetensors").write_bytes(bytes(range(64)))
        (folder / "state.json").write_text('{"step": 1}')
    found = 0
    for file in sorted((tmp_path / "step-1").iterdir()):
        content = file.read_bytes()
        for place in range(8 * len(content)):
            changed = bytearray(content)
            changed[place // 8] ^= 1 << place % 8
            file.write_bytes(changed)
            harmless = file.name == "MANIFEST.json" and same_json(content, bytes(changed))
            assert harmless or manifests.check_manifest(tmp_path / "step-1", hashes=True), (file.name, place)
            found += not harmless
        file.write_bytes(content)
    assert manifests.check_manifest(tmp_path / "step-1", hashes=True) is None
    note(f"each of {found} flipped bits was found")


def same_json(one: bytes, other: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(one) == json.loads(other))
    return False


def test_f07_a_damaged_checkpoint_of_the_right_size_pushes_no_good_one_out(whole: Made, case: Made, note: Note) -> None:
    """With another interval, its step is not saved again: it must not count among those that are kept."""
    run = case()
    run.killed(crash_at="before_tmp:3")
    flip(run.folder / "step-6" / "weights.safetensors")
    run.killed(crash_at="before_tmp:2", changes={"checkpoint_every": 4})
    assert run.good() == [4, 3]
    assert [p.name for p in run.folder.glob("damaged-*")] == ["damaged-step-6"]
    run.ends(0)
    assert list(run.folder.glob("damaged-*")) == []
    note("two good ones were kept beside it", **run.check_equal(whole(), every=6))  # two faults, two intervals


@pytest.mark.parametrize("text", [None, "", "step-99\n", "../../elsewhere\n", "link", "folder"])
def test_f08_a_pointer_that_lies_is_not_followed(
    text: str | None, damaged: Case, whole: Made, tmp_path: Path, note: Note
) -> None:
    """Missing, empty, dangling, pointing outside, a link to a file outside, or a folder in its place."""
    pointer = damaged.folder / "LATEST"
    pointer.unlink()
    (tmp_path / "elsewhere").write_text("mine")
    if text == "link":
        pointer.symlink_to(tmp_path / "elsewhere")
    elif text == "folder":
        pointer.mkdir()
    elif text is not None:
        pointer.write_text(text)
    shutil.rmtree(damaged.folder / "step-12")
    damaged.ends(0)
    assert (tmp_path / "elsewhere").read_text() == "mine"
    note("the folders were looked at instead; nothing outside was touched", **damaged.check_equal(whole()))


def test_f08_a_checkpoint_outside_of_the_run_is_refused(damaged: Case, whole: Made, tmp_path: Path, note: Note) -> None:
    """A manifest that names files elsewhere; and a link in a checkpoint's place is removed, not what it points to."""
    manifest = damaged.folder / "step-12" / "MANIFEST.json"
    files = storage.read_mapping(manifest)["files"]
    manifest.write_text(json.dumps({"files": files | {"../step-9/state.json": files["state.json"]}}))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (damaged.folder / "step-10").symlink_to(tmp_path / "kept")
    assert "names a file outside" in damaged.ends(0).output()
    assert (tmp_path / "kept" / "file").read_text() == "mine"
    note("refused, with the name", **damaged.check_equal(whole()))


WRITES = [
    *[("llamita.storage:write_atomically", number) for number in (3, 4, 5, 7, 8, 9)],
    *[("llamita.checkpoints:save_tensors", number) for number in (1, 2, 4)],
    ("llamita.manifests:sync_and_hash", 2),
    ("llamita.storage:fsync", 12),
    ("llamita.runs:Run.log", 4),
]


QUOTA = [("llamita.checkpoints:save_tensors", 2), ("llamita.storage:write_atomically", 9), ("llamita.runs:Run.log", 5)]


def test_f10_a_full_disk_at_any_write_ends_with_one_line_and_the_next_start_goes_on(
    whole: Made, case: Made, note: Note
) -> None:
    """Every write in turn is refused with the system's own error; what was published stays, and is gone on from."""
    run, reference = case(48), whole(48)
    refused = 0
    for code, writes in ((errno.ENOSPC, WRITES), (errno.EDQUOT, QUOTA)):
        for target, number in writes:
            before = run.good()
            start = run.start(spies={"refuse_at": [target, number, code]})
            assert start.wait() == [64], f"{target} {number}: {start.output()}"
            assert os.strerror(code) in start.output().splitlines()[-1]
            assert max(run.good(), default=0) >= max(before, default=0)
            assert list(run.folder.glob(".tmp-*")) == []
            refused += 1
    run.ends(0)
    note(f"{refused} refused writes: one line, code 64; the older checkpoints stayed", **run.check_equal(reference))


def test_f10_a_pointer_that_cannot_be_written_stops_nothing(whole: Made, case: Made, note: Note) -> None:
    """Its checkpoint is published, and two ranks agree on that."""
    run = case()
    output = run.ends(0, 0, ranks=2, spies={"refuse_at": ["llamita.distill.state:prune", 2, errno.ENOSPC]}).output()
    assert "could not be tidied up" in output
    note("training went on with a warning", **run.check_equal(whole(12, 2)))


def test_f10_two_ranks_of_which_one_has_no_room_end_together(whole: Made, case: Made, note: Note) -> None:
    """Nobody waits for a rank that could not write."""
    run = case()
    for rank, number in ((0, 3), (1, 2)):  # of its second checkpoint; the main rank syncs the manifest's too
        spy = {"refuse_at": ["llamita.manifests:sync_and_hash", number, errno.ENOSPC]}
        start = run.start(ranks=2, rank_spies={rank: spy})
        codes = start.wait(60)
        assert codes[rank] == 64, start.output()
        assert codes[1 - rank] == 1, "the other one's error is not its own"
        assert list(run.folder.glob(".tmp-*")) == []
        assert run.good(), "the older checkpoint stays"
    run.ends(0, 0, ranks=2)
    note("both ranks ended; the older checkpoint stayed", **run.check_equal(whole(12, 2)))


@pytest.mark.parametrize("size", [60_000, 120_000])
def test_f10_a_file_that_may_not_grow_further_ends_with_one_line(
    size: int, whole: Made, case: Made, note: Note
) -> None:
    """The system's own limit of a file's size, in the middle of weights or moments."""
    run = case()
    start = run.ends(64, spies={"largest_file": [size, False]})
    assert "File too large" in start.output().splitlines()[-1]
    assert run.good() == []
    run.ends(0)
    note("one line, code 64", **run.check_equal(whole()))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, where this process may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "llamita-test", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_f10_a_disk_that_is_really_full_loses_nothing(disk: Path, whole: Made, case: Made, note: Note) -> None:
    """Two checkpoints fit and a third does not; with more room the same command goes on."""
    run = case()
    run.out = disk / "run"
    start = run.start()
    assert start.wait() == [64], start.output()
    assert "no space left" in start.output().splitlines()[-1].lower()
    assert len(run.good()) >= 1
    assert list(run.folder.glob(".tmp-*")) == []
    lost = 2 - len(run.good())
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    run.ends(0)
    note("one line, code 64; with more room it went on", checkpoints_lost=lost, **run.check_equal(whole()))


@pytest.mark.parametrize(
    ("code", "ending"), [(errno.EROFS, 64), (errno.ESTALE, 1), (errno.EIO, 1)], ids=["read-only", "stale", "broken"]
)
@pytest.mark.parametrize("target", ["llamita.manifests:publishing", "llamita.storage:sha256"], ids=["write", "read"])
def test_f11_a_file_system_that_fails_ends_the_run_loudly_on_every_rank(
    code: int, ending: int, target: str, damaged: Case, whole: Made, note: Note
) -> None:
    """What the user must mend ends with 64, what may pass by itself with 1, which is started again.

    When it fails while checkpoints are looked at, none is passed over: whether they are good is not known.
    """
    shutil.rmtree(damaged.folder / "step-12")
    start = damaged.start(spies={"refuse_at": [target, 1 if "publishing" in target else 2, code]})
    assert start.wait() == [ending], start.output()
    assert os.strerror(code) in start.output()
    assert "passed over" not in start.output()
    assert damaged.good() == [9]
    damaged.ends(0)
    note("ended with an error that names it; nothing was skipped in silence", **damaged.check_equal(whole()))


def test_f11_a_slow_write_is_waited_for(whole: Made, case: Made, note: Note) -> None:
    """As long as a collective may take; beyond that the others end, as they do for a rank that hangs (F03)."""
    run = case()
    slow = {"slow_at": ["llamita.manifests:write_manifest", 2, 6.0]}
    run.ends(0, 0, ranks=2, spies={"collective_timeout": 30.0}, rank_spies={0: slow})
    note("waited for; beyond the time-out as F03", **run.check_equal(whole(12, 2)))


def test_f12_what_was_not_synced_when_the_power_went_is_not_needed(
    whole: Made, case: Made, tmp_path: Path, note: Note
) -> None:
    """At each sync and rename of a run two disks are made up: one that kept only what was synced, and one that kept
    every name but only the synced content. Each must hold all checkpoints, metrics and results that were published.
    """
    run, cuts = case(6), tmp_path / "cuts"
    cuts.mkdir()
    run.ends(0, spies={"power_cuts": [str(run.out), str(cuts)]})
    states = sorted(cuts.iterdir(), key=lambda path: int(path.name.split("-")[0]))
    told = json.loads((tmp_path / "cuts.json").read_text()) if (tmp_path / "cuts.json").exists() else {}
    assert len(states) > 60
    published = 0
    for disk in states:
        promised = told[disk.name]
        steps = state.steps_in(disk / "checkpoints")
        newest = max(state.newest_good(disk / "checkpoints"), 0)
        assert newest >= promised, f"{disk.name}: step-{promised} was published; there are {steps}"
        if (disk / "metrics.jsonl").is_file():
            mend_metrics(disk / "metrics.jsonl")
            rows = {row["step"] for row in metric_rows(disk) if "train/loss" in row}
            assert set(range(1, newest + 1)) <= rows, f"{disk.name}: rows of the steps before step-{newest} are gone"
        else:
            assert newest == 0
        if (disk / "DONE.json").is_file():
            runs.check_done(disk)
            assert starts.model_hash(disk) == starts.model_hash(run.out)
        published = max(published, newest)
    assert published == 6
    for number in (len(states) // 3, len(states) // 2, len(states) - 3):
        again = case(6)
        shutil.rmtree(again.out, ignore_errors=True)
        shutil.copytree(states[number], again.out)
        again.rows_file.unlink(missing_ok=True)
        again.ends(0)
        assert starts.model_hash(again.out) == starts.model_hash(run.out)
    note(f"{len(states)} disks as a power cut may leave them: each holds what was published")


def changed_shard(data: Path) -> str:
    """Change a token, as an editor would, without the row's checksum."""
    file = sorted((data / "shards").glob("train-*"))[0]
    content = bytearray(file.read_bytes())
    for place in range(0, len(content) // 2, 4):
        content[place] ^= 1
    file.write_bytes(content)
    return file.name


def added_rows(data: Path) -> str:
    """A manifest of other shards: what preparing more documents would write."""
    manifest = storage.read_mapping(data / "data.json")
    manifest["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (data / "data.json").write_text(json.dumps(manifest))
    return "train"


def cut_shard(data: Path) -> str:
    file = sorted((data / "shards").glob("train-*"))[0]
    os.truncate(file, file.stat().st_size - 4)
    return file.name


@pytest.mark.parametrize("change", [changed_shard, added_rows, cut_shard])
def test_f17_data_changed_under_the_run_are_refused_with_their_name(
    change: Callable[[Path], str], damaged: Case, data: Path, tmp_path: Path, note: Note
) -> None:
    """A row whose content changed, a split of other shards, and a shard that was cut."""
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    damaged.changes["data.path"] = copied
    config = damaged.out / "config.yaml"
    config.write_text(config.read_text().replace(str(data), str(copied)))
    shutil.rmtree(damaged.folder / "step-12")
    name = change(copied)
    before = damaged.good()
    start = damaged.ends(64)
    assert name in start.output().splitlines()[-1]
    assert damaged.good() == before
    PackedData.open(data)
    note("code 64, with the shard's or the split's name")


CHANGES: dict[str, dict[str, Any]] = {
    "optim.learning_rate": {"optim.learning_rate": 0.02},
    "steps": {"steps": 24},
    "student.shape.hidden_size": {"student.shape.hidden_size": 32},
    "data.path": {"data.path": "elsewhere"},
    "teachers": {"teachers.big.path": "a/model"},
    "run.seed": {"run.seed": 7},
    "optim.warmup_steps": {"optim.warmup_steps": 3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_f18_a_setting_that_decides_what_is_learnt_cannot_change_on_a_restart(
    name: str, damaged: Case, data: Path, tmp_path: Path, note: Note
) -> None:
    """Code 64 and the difference; nothing is written."""
    changes = dict(CHANGES[name])
    if name == "data.path":
        shutil.copytree(data, tmp_path / "elsewhere")
        changes["data.path"] = tmp_path / "elsewhere"
    if name == "teachers":
        changes["teachers.big.path"] = model_beside(damaged, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in damaged.out.rglob("*") if p.is_file()}
    output = damaged.ends(64, changes=changes).output()
    assert "belongs to a run with other settings" in output
    assert name in output
    assert {p: p.stat().st_mtime_ns for p in damaged.out.rglob("*") if p.is_file()} == before
    note("code 64, with the difference")


def model_beside(run: Case, tmp_path: Path) -> Path:
    """A model that could be a teacher."""
    out = tmp_path / "teacher"
    teacher = Case(run.zygote, out, run.data, 1)
    teacher.ends(0)
    return out


def test_f18_bookkeeping_may_change_on_a_restart(damaged: Case, whole: Made, note: Note) -> None:
    """How often it saves and how many rows are held at a time."""
    shutil.rmtree(damaged.folder / "step-12")
    damaged.ends(0, changes={"checkpoint_every": 2, "log_every": 1, "keep_checkpoints": 2})
    assert starts.model_hash(damaged.out) == starts.model_hash(whole().out)
    note("what moves only bookkeeping was taken", steps_lost=max(damaged.lost()))


def test_f21_metrics_cut_in_a_line_are_mended_and_every_step_is_there_once(whole: Made, case: Made, note: Note) -> None:
    """The process dies of a limit in the middle of a line, and half a line is really in the file."""
    run = case()
    start = run.start(spies={"largest_file": [4000, True]}, changes={"checkpoint_every": 500})
    assert start.wait() == [-signal.SIGXFSZ], start.output()
    metrics = run.out / "metrics.jsonl"
    text = metrics.read_bytes()
    assert len(text) == 4000
    assert not text.endswith(b"\n")
    assert len(read_metrics(run.out)) == text.count(b"\n"), "a reader never sees a part of a line"
    run.ends(0)
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
    # There was no checkpoint yet, so all steps are taken again.
    note("the half line was cut off; every step is there once", **run.check_equal(whole(), every=12))
