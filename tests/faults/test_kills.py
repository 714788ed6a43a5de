"""Killed, stopped, and started again: the run ends as the undisturbed one does, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import ACCUMULATE, EVERY, STEP, Case

from llamita import runs

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
SMALL_FILES = [f"mid_write:{number}" for number in range(1, 7)]
"""config.yaml, run.json, and of the first checkpoint: the random states, the state, the manifest, the pointer."""
SAVER = [
    "before_tmp:2",
    "mid_checkpoint:2",
    "after_shards:2",
    "before_manifest:2",
    "before_rename:2",
    "after_rename:2",
    "before_pointer:2",
    "during_purge:1",
]
EXPORT = ["after_model_shard:1", "before_rename:9", "mid_rename:1", "mid_rename:2", "before_done:1", "after_done:1"]
ON_RANK_1 = [f"mid_write:{number}:1" for number in (1, 2)]
"""The random states of its checkpoints."""
Made = Callable[..., Case]
Note = Callable[..., None]


def test_f01_killed_at_every_point_of_the_saver_it_ends_the_same(whole: Made, case: Made, note: Note) -> None:
    """One start after the other dies at the next crash point; the last one comes to the end."""
    run, reference = case(48), whole(48)
    for point in [*SMALL_FILES, *SAVER]:
        before = run.good()
        run.killed(crash_at=point)
        assert set(before[:1]) <= set(run.good()), f"{point} lost the newest checkpoint"
    for point in EXPORT:
        run.killed(crash_at=point.replace(":9", f":{saves_left(run) + 1}"))
    run.ends(0)
    told = run.check_equal(reference)
    note(f"{len(run.starts) - 1} kills, one at each point of writing; the same bytes at the end", **told)


def saves_left(run: Case) -> int:
    """Checkpoints that the next start will publish."""
    return (run.steps - max(run.good(), default=0)) // EVERY


@pytest.mark.parametrize("rank", [0, 1])
def test_f01_killed_with_one_rank_at_a_point_both_ranks_end_the_same(
    rank: int, whole: Made, case: Made, note: Note
) -> None:
    """The rank dies at the point by itself, and the other one is killed wherever it is."""
    run, reference = case(36), whole(36, 2)
    points = [f"{point}:0" for point in SAVER] if rank == 0 else ON_RANK_1
    for point in points:
        run.killed(crash_at=point, ranks=2)
    run.ends(0, 0, ranks=2)
    note("both ranks went on from the newest checkpoint; the same bytes", **run.check_equal(reference))


@pytest.mark.parametrize(
    ("file", "spy"),
    [
        ("weights.safetensors", {"dies_in_file": [1, 1]}),
        ("weights.safetensors", {"dies_in_file": [3, 50_000]}),
        ("optimizer.safetensors", {"dies_in_file": [4, 190_000]}),
        ("shard-0", {"dies_in_file": [9, 50_000]}),
    ],
)
def test_f01_killed_in_the_middle_of_a_file_it_ends_the_same(
    file: str, spy: dict[str, list[int]], whole: Made, case: Made, note: Note
) -> None:
    """After so many bytes of it: weights, moments, and the model that is published. For metrics see F21."""
    run = case()
    start = run.start(spies=spy)
    assert start.wait() == [-KILL], start.output()
    size = spy["dies_in_file"][1]
    assert size in {p.stat().st_size for p in run.out.rglob("*") if p.name == file}, "no such file was cut"
    run.ends(0)
    note("a file was cut at a byte and not published", **run.check_equal(whole()))


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_f02_two_hundred_kills_at_random_times_cost_nothing_but_time(whole: Made, case: Made, note: Note) -> None:
    """Killed while it starts, computes, logs or saves, without knowing which; no kill costs more than an interval."""
    kills, dice = 200, random.Random(0)
    fields = {"checkpoint_every": 2, "validation_every": 0}
    run, reference = case(800, **fields), whole(800, **fields)
    began = time.monotonic()
    for _ in range(kills):
        start = run.start()
        if dice.random() < 0.2:
            time.sleep(dice.uniform(0, 1.5))
        else:
            wait_for_rows(run, dice.randint(1, 4), start)
            time.sleep(dice.uniform(0, 0.04))
        start.kill()
        assert start.wait() == [-KILL], "it came to its end before it was killed so often: give it more steps"
    run.ends(0)
    told = run.check_equal(reference, every=2)
    at_all = sum(run.lost())
    print(f"{kills} kills in {time.monotonic() - began:.0f} s; {at_all} steps taken again, {told} at most")
    note(f"{kills} kills, {at_all} of {run.steps} steps taken again in all; the same bytes at the end", **told)


def wait_for_rows(run: Case, steps: int, start: Any) -> None:
    """Return when this start has begun so many steps."""
    number, deadline = f'"start": {len(run.starts) - 1},', time.monotonic() + 120
    begun, position = 0, run.rows_file.stat().st_size if run.rows_file.exists() else 0
    while begun < steps and time.monotonic() < deadline and not start.ended():
        if run.rows_file.exists():
            with run.rows_file.open() as file:
                file.seek(position)
                begun = file.read().count(number)
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("rank", "spy"),
    [
        (1, {"signals_at": [[ACCUMULATE, 9, [KILL]]]}),
        (0, {"signals_at": [["llamita.manifests:write_manifest", 2, [KILL]]]}),
        (1, {"signals_at": [["llamita.manifests:sync_and_hash", 2, [KILL]]]}),
        (1, {"signals_at": [[STEP, 5, [signal.SIGSTOP]]]}),
    ],
    ids=["in a step", "main rank in a save", "later rank in a save", "hangs"],
)
def test_f03_when_one_rank_is_killed_or_hangs_the_others_end_and_publish_nothing(
    rank: int, spy: dict[str, Any], whole: Made, case: Made, note: Note
) -> None:
    """Within the time-out of a collective (here 8 s), with a code that is not zero."""
    run = case()
    start = run.start(ranks=2, spies={"collective_timeout": 8.0, "leave_seconds": 2.0}, rank_spies={rank: spy})
    assert start.ended(1 - rank, 120), start.output()
    assert start.codes[1 - rank] not in (0, runs.EXIT_DONE, runs.EXIT_REQUEUE, runs.EXIT_USER), start.output()
    steps = sorted(run.good())
    assert {p.name for p in run.folder.glob("step-*")} == {f"step-{step}" for step in steps}, "a part was published"
    start.kill()
    start.wait()
    assert sorted(run.good()) == steps == [EVERY]
    run.ends(0, 0, ranks=2)
    note("the other rank ended by itself with an error; nothing half was published", **run.check_equal(whole(12, 2)))


STOPS: dict[str, tuple[int, dict[int, dict[str, Any]]]] = {
    "to one of two ranks": (2, {1: {"signals_at": [[STEP, 5, [TERM]]]}}),
    "to the main rank of two": (2, {0: {"signals_at": [[STEP, 5, [USR1]]]}}),
    "to all": (2, {0: {"signals_at": [[STEP, 5, [USR1]]]}, 1: {"signals_at": [[STEP, 5, [USR1]]]}}),
    "twice": (1, {0: {"signals_at": [[STEP, 5, [TERM, TERM]]]}}),
    "twice, in the step and in the save": (
        1,
        {0: {"signals_at": [[STEP, 5, [TERM]], ["llamita.manifests:write_manifest", 2, [TERM]]]}},
    ),
    "in a save": (1, {0: {"signals_at": [["llamita.manifests:write_manifest", 1, [TERM]]]}}),
    "in a save, one of two ranks": (2, {1: {"signals_at": [["llamita.manifests:sync_and_hash", 1, [TERM]]]}}),
}


@pytest.mark.parametrize("kind", STOPS)
def test_f04_a_signal_saves_one_step_on_all_ranks(kind: str, whole: Made, case: Made, note: Note) -> None:
    """To one rank, to all, twice, and while it saves; that to the batch shell alone is tested with the batch script."""
    ranks, spies = STOPS[kind]
    run = case()
    start = run.ends(*[75] * ranks, ranks=ranks, rank_spies=spies)
    stopped = max(run.good())
    assert f"stopped after step {stopped} of 12" in start.output()
    assert stopped == (4 if "in a save" in kind and "twice" not in kind else 5)
    assert [p.name for p in run.folder.glob(".*")] == []
    run.ends(*[0] * ranks, ranks=ranks)
    assert run.lost() == [0]
    note("saved the step once on all ranks, code 75", **run.check_equal(whole(12, ranks)))


@pytest.mark.parametrize(
    ("moment", "target", "number", "code"),
    [
        ("before step 1", "llamita.distill.engines:build", 1, 75),
        ("in the first validation", "llamita.distill.loop:Trainer._measure_set", 1, 75),
        ("in warm-up", STEP, 2, 75),
        ("in a later validation", "llamita.distill.loop:Trainer._measure_set", 2, 75),
        ("in the last step", STEP, 12, 0),
        ("in the export", "llamita.distill.student:publish", 1, 0),
    ],
)
def test_f05_a_stop_file_ends_the_run_cleanly_whenever_it_comes(
    moment: str, target: str, number: int, code: int, whole: Made, case: Made, note: Note
) -> None:
    """With 75 and a checkpoint while there is something left to do, with 0 when there is not."""
    run = case(12, **{"optim.warmup_steps": 3})
    run.ends(code, spies={"touch_at": [target, number, str(run.out / "control" / "stop")]})
    if code:
        run.ends(0)
    told = run.check_equal(whole(12, **{"optim.warmup_steps": 3}))
    note("75 and a checkpoint, or 0 where everything was done; no step twice", **told)


def test_f06_a_kill_in_the_save_after_a_stop_leaves_no_half_checkpoint(whole: Made, case: Made, note: Note) -> None:
    """The time of grace was too short; the next start says from which step it goes on."""
    run = case()
    run.killed(spies={"signals_at": [[STEP, 5, [TERM]], ["llamita.manifests:write_manifest", 2, [KILL]]]})
    assert run.good() == [3]
    assert [p.name for p in run.folder.glob("step-*")] == ["step-3"]
    assert "checkpoints/step-3" in run.ends(0).output(), "the message names the last good step"
    note("nothing half was published; the next start names the step it goes on from", **run.check_equal(whole()))


def test_f09_ten_starts_that_die_in_their_first_save_keep_the_last_good_one(
    whole: Made, case: Made, note: Note
) -> None:
    """A crash loop fills no disk and pushes nothing out."""
    run = case()
    run.killed(crash_at="before_tmp:3")
    kept = run.good()
    assert kept == [6, 3]
    for _ in range(10):
        run.killed(crash_at="after_shards:1")
        assert run.good() == kept
        assert len(list(run.folder.glob(".tmp-*"))) == 1, "what earlier crashes left is swept"
    run.ends(0)
    note("ten crashes in a row left both good checkpoints", **run.check_equal(whole()))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_f16_killed_between_any_two_micro_batches_every_row_is_learnt_from_once_an_epoch(
    whole: Made, case: Made, small_data: Path, note: Note
) -> None:
    """Two epochs. The loader has no worker processes: rows are mapped files, and the position is one number."""
    from cases import BATCH, epochs

    from llamita.data.shards import PackedData

    size = len(PackedData.open(small_data).split("train"))
    steps = -(-2 * size // BATCH)
    fields = {"data.path": small_data, "checkpoint_every": 1, "validation_rows": 0}
    run, reference = case(steps, **fields), whole(steps, **{k: str(v) for k, v in fields.items()})
    for micro_batch in range(steps * BATCH):
        number = micro_batch - BATCH * max(run.good(), default=0) + 1
        run.killed(spies={"signals_at": [[ACCUMULATE, number, [KILL]]]})
    run.ends(0)
    told = run.check_equal(reference, every=1)
    for counted in epochs(run.samples()[: 2 * size], size):
        assert counted == dict.fromkeys(range(size), 1)
    note(f"{steps * BATCH} kills; each of {size} rows once in each of two epochs", **told)
