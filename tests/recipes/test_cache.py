"""The recipe from a teacher to a student that never saw it: every start, every ending, the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

import invented
from conftest import REPOSITORY
from llamita import checkpoints, locks, runs, storage
from llamita.distill import cache, losses, optim, student
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import Storage, TeacherConfig, check_settings
from llamita.metrics import read_metrics


@pytest.fixture(scope="module")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents of invented words in rows of 64 tokens."""
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("cache"))


def distilled(module: ModuleType, data: Path, out: Path, **changes: Any) -> Path:
    shape = student.ShapeConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    fields: dict[str, Any] = {
        "student": student.StudentConfig(shape=shape),
        "data": module._training.DataConfig(path=data),
        "steps": 3,
        "global_batch_rows": 4,
        "micro_batch_rows": 4,
        "validation_rows": 6,
        "optim": optim.OptimConfig(learning_rate=3e-3, warmup_steps=2),
        "out": out,
    }
    module.run(module.Distill(**{**fields, **changes}))
    return out


@pytest.fixture(scope="module")
def teacher(recipe: Callable[[str], ModuleType], data: Path) -> Path:
    return distilled(recipe("distill"), data, data.parent / "teacher")


def settings(module: ModuleType, teacher: Path, data: Path, out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "teacher": module.TeacherConfig(path=teacher),
        "data": module.DataConfig(path=data),
        "shard_tokens": 64 * 16,
        "out": out,
    }
    return module.Cache(**{**fields, **changes})


@pytest.fixture(scope="module")
def made(recipe: Callable[[str], ModuleType], teacher: Path, data: Path) -> Path:
    module, out = recipe("cache"), data.parent / "cache"
    module.run(settings(module, teacher, data, out, verify=2))
    return out


def contents(path: Path) -> dict[str, bytes]:
    """Every file that belongs to the cache itself."""
    files = [path / "cache.json", path / "index.bin", path / "identity.json", *(path / "shards").rglob("*")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def test_a_cache_says_what_it_was_made_from_and_what_it_takes(made: Path, teacher: Path) -> None:
    done, manifest = runs.check_done(made), storage.read_json(made / "cache.json")
    assert done["parents"]["teacher"] == manifest["teacher"] == checkpoints.content_hash(teacher)
    summary = done["summary"]
    assert summary["distance"] == 0
    assert summary["entries"] == sum(shard["entries"] for shard in manifest["shards"])
    assert summary["bytes"] >= 3 * summary["entries"]
    assert 1 <= summary["entries_per_token"] <= 50
    rows = read_metrics(made)
    assert len([row for row in rows if "cache/tokens_per_s" in row]) == len(manifest["shards"]) > 2
    assert {shard["split"] for shard in manifest["shards"]} == {"train", "validation"}


def test_a_finished_cache_is_left_alone_and_verified_when_asked(
    made: Path, teacher: Path, data: Path, recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, before = recipe("cache"), contents(made)
    looked = []
    monkeypatch.setattr(module.capture, "verify", lambda *_, **asked: looked.append(asked["batches"]))
    for verify in (0, 3):
        module.run(settings(module, teacher, data, made, verify=verify))
    assert looked == [3]
    assert contents(made) == before


def test_workers_in_any_order_make_the_same_cache(
    made: Path, teacher: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module, out = recipe("cache"), tmp_path / "parts"
    for worker in (2, 0, 1):
        assert not (out / "DONE.json").exists()
        module.run(settings(module, teacher, data, out, worker=worker, workers=3, batch_rows=3))
    assert contents(out) == contents(made)
    assert runs.check_done(out)["summary"]["entries"] == runs.check_done(made)["summary"]["entries"]
    module.run(settings(module, teacher, data, out, worker=1, workers=3))


def test_another_number_of_workers_goes_on_and_a_removed_shard_is_made_again(
    recipe: Callable[[str], ModuleType], made: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, out = recipe("cache"), tmp_path / "cache"
    for worker in (0, 1):
        module.run(settings(module, teacher, data, out, worker=worker, workers=4))
    assert not (out / "DONE.json").exists()
    for worker in (0, 1):
        module.run(settings(module, teacher, data, out, worker=worker, workers=2))
    assert contents(out) == contents(made)
    (out / "DONE.json").unlink()
    shutil.rmtree(next((out / "shards").iterdir()))
    for worker in (0, 1):
        module.run(settings(module, teacher, data, out, worker=worker, workers=2))
    assert contents(out) == contents(made)


def test_a_worker_waits_while_another_looks_at_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = locks.Lock(tmp_path)
    lock.acquire()
    monkeypatch.setattr(runs.time, "sleep", lambda _: lock.release())
    with runs.start_when_free(tmp_path, "cache", {}, runs.RunConfig()):
        pass
    lock = locks.Lock(tmp_path)
    lock.acquire()
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "stop").touch()
    with pytest.raises(runs.Stopped, match="another owner"):
        runs.start_when_free(tmp_path, "cache", {}, runs.RunConfig()).__enter__()
    lock.release()


def test_a_student_learns_from_a_cache_and_says_whose(
    made: Path, teacher: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("distill")
    out = distilled(module, data, tmp_path / "student", teachers={"big": TeacherConfig(cache=made)})
    provenance = json.loads((out / "llamita.json").read_text())
    assert provenance["parents"]["big"] == {"path": str(made), "sha256": checkpoints.content_hash(teacher)}
    assert provenance["parents"]["big/cache"] == {"path": str(made), "sha256": storage.sha256(made / "cache.json")}
    summary = runs.check_done(out)["summary"]
    assert {"train/kd", "kd/soft_ce_big", "val/held_out/soft_ce_big", "val/held_out/bits_per_byte"} <= summary.keys()
    online = distilled(module, data, tmp_path / "online", teachers={"big": TeacherConfig(path=teacher)})
    losses_ = [runs.check_done(run)["summary"]["val/held_out/loss"] for run in (out, online)]
    assert losses_[0] == pytest.approx(losses_[1], rel=0.01)


def test_a_cache_mixes_with_another_and_with_a_teacher_that_is_run(
    made: Path, teacher: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("cache")
    module.run(settings(module, teacher, data, tmp_path / "other", sampler=Sampler.threshold, samples_per_token=9))
    mixed = {
        "one": TeacherConfig(cache=made, path=teacher, weight=3.0),
        "two": TeacherConfig(cache=tmp_path / "other"),
        "run": TeacherConfig(path=teacher),
    }
    out = distilled(recipe("distill"), data, tmp_path / "student", teachers=mixed)
    summary = runs.check_done(out)["summary"]
    assert {"kd/soft_ce_one", "kd/soft_ce_two", "kd/kl_run"} <= summary.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": losses.LossConfig(temperature=2.0)}, r"temperature=2.0 is not the temperature 1.0"),
        ({"loss": losses.LossConfig(divergence=losses.Divergence.jsd)}, r"loss.divergence=jsd needs whole"),
    ],
)
def test_a_loss_that_cannot_learn_from_entries_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, made: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        distilled(recipe("distill"), data, tmp_path / "out", teachers={"big": TeacherConfig(cache=made)}, **change)
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_teacher_than_its_path_is_refused(
    made: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("distill")
    other = distilled(module, data, tmp_path / "other", run=runs.RunConfig(seed=5))
    with pytest.raises(ValueError, match=r"teachers.big.cache=.* is of another teacher"):
        distilled(module, data, tmp_path / "out", teachers={"big": TeacherConfig(cache=made, path=other)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_token": 64}, "samples_per_token must be in 1..63"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"worker": 2, "workers": 2}, r"worker must be in 0..workers-1 = 0..1, got 2"),
        ({"batch_rows": 0}, "batch_rows must be at least 1"),
        ({"verify": -1}, "verify must be >= 0"),
        ({"max_distance": 2.0}, "max_distance must be in 0..1"),
    ],
)
def test_settings_without_meaning_are_refused(
    change: dict[str, Any], message: str, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(recipe("cache"), tmp_path, tmp_path, tmp_path / "out", **change)


@pytest.mark.slow
def test_a_quantised_teacher_is_captured_and_says_what_that_changed(
    recipe: Callable[[str], ModuleType], made: Path, teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, out = recipe("cache"), tmp_path / "cache"
    config = settings(module, teacher, data, out, verify=1)
    config.teacher.weights, config.teacher.max_kl = Storage.int8, 1e-12
    with pytest.raises(ValueError, match=r"^teacher.weights=int8 moves .* more than teacher.max_kl=1e-12"):
        module.run(config)
    config.teacher.max_kl = 0.1
    module.run(config)
    costs = [row["teacher/kl_quantised_teacher"] for row in read_metrics(out) if len(row) == 4]
    assert len(costs) == 1
    assert 0 < costs[0] < 0.1
    assert cache.Cache.open(out).identity.weights is Storage.int8
    both = {"teacher.path": teacher, "data.path": data, "teacher.weights": "int8"}
    process = on_two_processes(tmp_path / "both", **both)
    assert process.returncode == 0, process.stdout + process.stderr
    assert contents(tmp_path / "both") == contents(out)
    assert contents(out) != contents(made)
    with pytest.raises(ValueError, match=r"teacher.weights: 'int8' -> 'full'"):
        module.run(settings(module, teacher, data, out))


def test_a_split_that_is_not_there_is_refused_before_anything_is_written(
    teacher: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("cache")
    config = settings(module, teacher, data, tmp_path / "out")
    config.data.splits = ["test"]
    with pytest.raises(ValueError, match=r"data.splits must be among train, validation, got test"):
        module.run(config)
    assert not (tmp_path / "out").exists()


def test_a_teacher_needs_a_path_or_a_cache() -> None:
    with pytest.raises(ValueError, match=r"teachers.big needs path, or cache, or both"):
        check_settings({"big": TeacherConfig()})


def test_a_job_of_a_slurm_array_is_one_of_its_workers(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, found = recipe("cache"), []
    for task in ("", "3"):
        if task:
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
            monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "16")
        with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
            cfg = compose("cache", overrides=["teacher.path=a", "data.path=b", "out=c"])
        config = sys.modules["_main"].settings(cfg, module.Cache)
        found.append((config.worker, config.workers))
    assert found == [(0, 1), (3, 16)]


def planned(
    module: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["plan.py", *words, "format=json", "hardware=cpu"])
    capsys.readouterr()
    with contextlib.suppress(ValueError):  # the mistakes are in what is printed
        module.main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_plan_tells_the_bytes_of_a_cache_and_takes_one_for_a_teacher(
    made: Path,
    teacher: Path,
    data: Path,
    recipe: Callable[[str], ModuleType],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, out = recipe("plan"), f"out={tmp_path / 'out'}"
    words = ("recipe=cache", f"teacher.path={teacher}", f"data.path={data}", out)
    answer = planned(module, capsys, monkeypatch, *words)
    assert answer["mistakes"] == []
    (stage,) = answer["stages"]
    tokens = runs.check_done(made)["summary"]["tokens"]
    assert 48 * tokens <= stage["disk_bytes"]["entries"] < 1.2 * 48 * tokens
    refused = planned(module, capsys, monkeypatch, *words, "data.path=nowhere", "samples_per_token=64")
    assert any("samples_per_token must be in 1..63" in mistake for mistake in refused["mistakes"])
    words = ("recipe=distill", f"student.path={teacher}", f"data.path={data}", out)
    answer = planned(module, capsys, monkeypatch, *words, f"teachers.big.cache={made}")
    assert answer["mistakes"] == []
    assert answer["stages"][0]["parameters"].keys() == {"student"}
    answer = planned(module, capsys, monkeypatch, *words, f"teachers.big.cache={tmp_path / 'none'}")
    assert answer["mistakes"] == [f"teachers.big.cache={tmp_path / 'none'} does not exist"]


def command(*launcher: str, overrides: dict[str, Any]) -> list[str]:
    words = [f"{name}={value}" for name, value in overrides.items()]
    return [sys.executable, *launcher, str(REPOSITORY / "recipes/cache.py"), *words]


@pytest.mark.slow
@pytest.mark.parametrize("crash", ["mid_shard:4", "before_rename:2", "after_rename:1", "before_done:1"])
def test_a_killed_run_goes_on_with_the_same_bytes(
    crash: str, made: Path, teacher: Path, data: Path, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module, out = recipe("cache"), tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "OMP_NUM_THREADS": "1", "LLAMITA_CRASH_AT": crash}
    overrides = {"teacher.path": teacher, "data.path": data, "shard_tokens": 64 * 16, "out": out}
    process = subprocess.run(command(overrides=overrides), env=env, capture_output=True, text=True, check=False)
    assert process.returncode == -9, process.stdout + process.stderr
    assert not (out / "DONE.json").exists()
    module.run(settings(module, teacher, data, out))
    assert contents(out) == contents(made)
    logged = [row["step"] for row in read_metrics(out) if "cache/tokens_per_s" in row]
    # A restart hides no row of the start before it; of a shard that was published and not yet logged there is none.
    unlogged = {1} if crash == "after_rename:1" else set()
    assert logged == [step for step in range(1, len(list((out / "shards").iterdir())) + 1) if step not in unlogged]


def on_two_processes(out: Path, **overrides: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "OMP_NUM_THREADS": "1"}
    env["LLAMITA_EXIT_DIR"] = str(out.parent)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = command(*launcher, overrides={**overrides, "shard_tokens": 64 * 16, "out": out})
    return subprocess.run(words, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_two_processes_make_the_same_cache(made: Path, teacher: Path, data: Path, tmp_path: Path) -> None:
    process = on_two_processes(tmp_path / "run", **{"teacher.path": teacher, "data.path": data, "verify": 1})
    assert process.returncode == 0, process.stdout + process.stderr
    assert contents(tmp_path / "run") == contents(made)


@pytest.mark.slow
def test_a_process_without_work_stops_and_goes_on_with_the_one_that_has_some(
    made: Path, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 2 is the second one of worker 0, so that of its second process; the first has nothing to capture."""
    out = shutil.copytree(made, tmp_path / "run")
    for name in ("DONE.json", "cache.json", "index.bin"):
        (out / name).unlink()
    shutil.rmtree(out / "shards" / "train-00002")
    given = {"teacher.path": teacher, "data.path": data, "worker": 0, "workers": 2}
    (out / "control").mkdir(exist_ok=True)
    (out / "control" / "stop-7-0").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = on_two_processes(out, **given)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["75\n", "75\n"], process.stderr
    assert not (out / "shards" / "train-00002").exists()
    monkeypatch.delenv("SLURM_JOB_ID")
    process = on_two_processes(out, **given)
    assert process.returncode == 0, process.stdout + process.stderr
    assert contents(out) == contents(made)


@pytest.mark.slow
def test_a_spread_teacher_is_captured_by_processes_that_have_different_work(
    made: Path, teacher: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process keeps the other company at the end, when both are stopped, and when only one verifies."""
    out, given = tmp_path / "run", {"teacher.path": teacher, "data.path": data, "teacher.placement": "zero3"}
    (out / "control").mkdir(parents=True)
    (out / "control" / "stop-7-0").touch()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = on_two_processes(out, **given)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == ["75\n", "75\n"], process.stderr
    assert not list((out / "shards").glob("*"))
    monkeypatch.delenv("SLURM_JOB_ID")
    process = on_two_processes(out, **given, verify=2)
    assert process.returncode == 0, process.stdout + process.stderr
    assert contents(out) == contents(made)
    assert len(list((out / "shards").iterdir())) % 2
    assert runs.check_done(out)["summary"]["distance"] == 0
