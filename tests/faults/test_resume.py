"""Other numbers of processes, other clocks, other hosts, and two owners: the same run goes on."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import starts
import torch
from cases import BATCH, STEP, Case, ids

from llamita.metrics import read_metrics

Made = Callable[..., Case]
Note = Callable[..., None]
AT_FOURTH = {"signals_at": [[STEP, 4, [signal.SIGTERM]]]}
"""A stop after four steps."""


def check_near(run: Case, whole: Case) -> dict[str, int]:
    """The same samples in the same order, and losses within 1e-5."""
    assert run.samples() == whole.samples()
    for name in ("train/loss", "val/validation/loss"):
        mine, theirs = dict(starts.curve(run.out, name)), dict(starts.curve(whole.out, name))
        assert len(mine) == len(starts.curve(run.out, name))
        assert mine == pytest.approx(theirs, rel=1e-5)
    return {"steps_lost": max(run.lost()), "samples_wrong": run.wrong_samples(whole)}


def test_f13_other_numbers_of_ranks_see_the_same_samples_and_losses(whole: Made, case: Made, note: Note) -> None:
    """Two ranks, then one, two and four, each stopped after four steps."""
    run = case(16)
    for ranks in (2, 1, 2):
        run.ends(*[75] * ranks, ranks=ranks, spies=AT_FOURTH)
    run.ends(0, 0, 0, 0, ranks=4)
    assert run.lost() == [0, 0, 0]
    note("2, 1, 2 and 4 ranks: the same samples, losses within 1e-5", **check_near(run, whole(16)))


def test_f13_a_number_of_ranks_that_cannot_keep_the_batch_is_refused(case: Made, note: Note) -> None:
    """Before anything is read, with the numbers; the run goes on with one that can."""
    run = case()
    run.ends(75, spies=AT_FOURTH)
    start = run.ends(64, 64, 64, ranks=3)
    assert "global_batch_rows must be a multiple of micro_batch_rows * processes = 1 * 3, got 4" in start.output()
    assert run.good() == [4, 3]
    note("code 64, with the numbers that do not go together")


def test_f14_another_split_into_micro_batches_sees_the_same_samples_and_losses(
    whole: Made, case: Made, note: Note
) -> None:
    """Four, two and one rows at a time."""
    run = case()
    for rows in (4, 2):
        run.ends(75, spies=AT_FOURTH, changes={"micro_batch_rows": rows})
    run.ends(0, changes={"micro_batch_rows": 1})
    note("4, 2 and 1 rows at a time: the same samples, losses within 1e-5", **check_near(run, whole()))


def test_f16_killed_at_steps_of_two_epochs_every_row_is_learnt_from_once_in_each(
    whole: Made, case: Made, small_data: Any, note: Note
) -> None:
    """The short form: between the micro-batches of every third step."""
    from cases import ACCUMULATE, epochs

    from llamita.data.shards import PackedData

    size = len(PackedData.open(small_data).split("train"))
    steps = -(-2 * size // BATCH)
    fields = {"data.path": str(small_data), "validation_rows": 0}
    run, reference = case(steps, **fields), whole(steps, **fields)
    for step in range(2, steps, 3):
        number = BATCH * (step - max(run.good(), default=0)) + step % BATCH + 1
        run.killed(spies={"signals_at": [[ACCUMULATE, number, [signal.SIGKILL]]]})
    run.ends(0)
    told = run.check_equal(reference)
    for counted in epochs(run.samples()[: 2 * size], size):
        assert counted == dict.fromkeys(range(size), 1)
    note(f"each of {size} rows once in each of two epochs", **told)


def test_f19_a_second_start_is_refused_while_the_first_lives_and_goes_on_when_it_is_dead(
    whole: Made, case: Made, note: Note
) -> None:
    """The refusal names the process; a killed owner's lock is taken over at once."""
    run = case()
    first = run.start(spies={"slow_at": [STEP, 5, 300.0]})
    deadline = time.monotonic() + 120
    while run.good() != [3] and time.monotonic() < deadline:
        time.sleep(0.05)
    second = run.ends(64)
    assert f"is owned by another run: process {first.pids[0]} on " in second.output()
    assert (run.out / ".lock").exists()
    first.kill()
    first.wait()
    third = run.ends(0)
    assert "taking over" in third.output()
    note("refused with the process; taken over when it was dead", **run.check_equal(whole()))


def test_f20_clocks_that_jump_and_other_hosts_change_nothing(whole: Made, case: Made, note: Note) -> None:
    """Three requeues of a job: the clock an hour back, then on another host, then a year ahead."""
    run = case()
    job = {"SLURM_JOB_ID": "4711"}
    run.killed(crash_at="before_pointer:1", SLURM_RESTART_COUNT="0", **job)
    identity = ids(run.out)
    run.killed(crash_at="before_pointer:1", spies={"clock": -3600.0}, SLURM_RESTART_COUNT="1", **job)
    run.killed(crash_at="before_pointer:1", spies={"host": "other", "clock": 0.5}, SLURM_RESTART_COUNT="2", **job)
    run.ends(0, spies={"clock": 3.2e7}, SLURM_RESTART_COUNT="3", **job)
    assert ids(run.out) == identity
    told = run.check_equal(whole())
    rows = [row for row in read_metrics(run.out) if "perf/step_s" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert {row["restart"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert 0 < row["perf/step_s"] < 60
        assert row["perf/tokens_per_s_per_gpu"] > 0
    seconds = [float(text) for text in re.findall(r"(\d+) s gone", run.starts[-1].output())]
    assert all(value < 600 for value in seconds)
    note("the same identity, the order of steps, and sane times", **told)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_f28_a_run_in_bfloat16_on_a_gpu_that_is_stopped_three_times_stays_in_the_envelope(
    whole: Made, case: Made, note: Note
) -> None:
    """Before the first step after a restart everything is equal: its loss is the undisturbed run's to 1e-6; later
    losses stay within 2 %.
    """
    fields = {"precision": "bfloat16"}
    run, reference = case(20, **fields), whole(20, **fields)
    for _ in range(3):
        run.ends(75, spies=AT_FOURTH)
    run.ends(0)
    mine, theirs = dict(starts.curve(run.out)), dict(starts.curve(reference.out))
    assert mine[5] == pytest.approx(theirs[5], rel=1e-6)
    assert mine == pytest.approx(theirs, rel=2e-2)
    assert run.samples() == reference.samples()
    note("three restarts: the next loss within 1e-6, later ones within 2 %", steps_lost=max(run.lost()))
