"""A run from a cache: exact on a restart, at any number of rows at a time, and beside a teacher that is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stored
import toy

from llamita import runs
from llamita.distill.cache import Cache
from llamita.distill.cached import CachedSource, CachedTeacher
from llamita.distill.losses import LossConfig
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import ResidentTeacher
from llamita.metrics import read_metrics


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored.make(tmp_path_factory.mktemp("cached") / "cache").path


def go(out: Path, cache: Path, *, kind: type[toy.Source] = toy.Source, micro: int = 8, **arguments: Any) -> Any:
    teacher = CachedTeacher("big", Cache.open(cache))
    source = CachedSource(kind(batch=8, micro=micro), [teacher])
    settings = {"teachers": [teacher], "loss": LossConfig(ce_weight=0.25), "micro_batch_rows": micro}
    return toy.go(out, source=source, **{**settings, **arguments})


def curve(out: Path, name: str = "train/loss") -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(out) if name in row}


def test_a_run_from_a_cache_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    whole = toy.digest(go(tmp_path / "whole", made).engine)
    with pytest.raises(runs.Stopped, match="stopped after step"):
        go(tmp_path / "run", made, kind=toy.Interrupted)
    assert toy.digest(go(tmp_path / "run", made).engine) == whole
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_the_position_is_that_of_the_step_and_not_of_what_is_read_ahead(made: Path) -> None:
    inner = toy.Source(batch=8, micro=4)
    source = CachedSource(inner, [CachedTeacher("big", Cache.open(made))])
    assert source.state_dict()["samples_consumed"] == 0
    first = next(source)
    assert source.state_dict()["samples_consumed"] == 8
    next(source)
    source.load_state_dict({"samples_consumed": 0})
    again = next(source)
    assert [sorted(batch) for batch in first] == [sorted(batch) for batch in again]
    assert all(bool((a[name] == b[name]).all()) for a, b in zip(first, again, strict=True) for name in a)
    assert source.state_dict()["samples_consumed"] == 8


def test_the_number_of_rows_held_at_a_time_changes_nothing(made: Path, tmp_path: Path) -> None:
    for micro in (8, 2):
        go(tmp_path / f"rows{micro}", made, micro=micro)
    assert curve(tmp_path / "rows2") == pytest.approx(curve(tmp_path / "rows8"), rel=1e-5)
    assert curve(tmp_path / "rows2", "val/held/kd") == pytest.approx(curve(tmp_path / "rows8", "val/held/kd"), rel=1e-5)


def test_two_caches_of_one_teacher_learn_what_the_mixture_says_and_a_cache_goes_beside_a_teacher(
    made: Path, tmp_path: Path
) -> None:
    other = stored.make(tmp_path / "other", seed=9, sampler=Sampler.threshold)
    model = ResidentTeacher("online", toy.model(stored.SEED, hidden=24, tied=False), weight=2.0)
    toy.go(tmp_path / "online", loss=LossConfig(), teachers=[model], steps=30)
    for name, teachers in {
        "two": [CachedTeacher("a", Cache.open(made), 3.0), CachedTeacher("b", other)],
        "beside": [CachedTeacher("a", Cache.open(made)), model],
    }.items():
        toy.go(tmp_path / name, loss=LossConfig(), teachers=teachers, steps=30)
        mine, dense = (curve(tmp_path / run, "val/held/loss") for run in (name, "online"))
        # The same teacher in expectation: the student arrives where the dense targets lead.
        assert abs(mine[30] - dense[30]) < 0.25 * abs(dense[0] - dense[30])


def test_a_batch_that_was_not_read_ahead_is_looked_up(made: Path) -> None:
    teacher, batch = CachedTeacher("big", Cache.open(made), 0.5), toy.rows(40)
    looked_up, attached = teacher.states(batch, None), teacher.states(teacher.attach(batch), None)
    assert looked_up.ids.tolist() == attached.ids.tolist()
    assert looked_up.weight == 0.5


def test_an_error_while_reading_ahead_ends_the_run(made: Path) -> None:
    source = toy.Source(batch=8, micro=8)
    source.data = toy.rows(40, seed=77)
    with pytest.raises(ValueError, match="has nothing for a document"):
        next(CachedSource(source, [CachedTeacher("big", Cache.open(made))]))
