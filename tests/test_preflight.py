"""The checks before a start: what each finds, whose fault it is, and that no time limit is only a number."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import REPOSITORY, tiny_config
from llamita import preflight, runs, storage

CPU = torch.device("cpu")

RANKS = """
import json, os, sys, time
from datetime import timedelta
from pathlib import Path
import torch
from torch import distributed
from llamita import preflight, runs

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
distributed.init_process_group("gloo", timeout=timedelta(hours=1))
versions, matmul, reduce = preflight._versions, preflight._check_matmul, distributed.all_reduce
preflight.REPORT_SECONDS = preflight.REDUCE_SECONDS = 5.0

calls = []

def counted(total, **options):
    calls.append(total.nbytes)
    return reduce(total, **options)

def broken(device):
    raise RuntimeError("xid 79")

def phase(name):
    settings = {"steps": 2 if name == "settings" and rank else 1}
    odd = rank == 1
    preflight._versions = lambda: versions() | ({"numpy": "1.0"} if name == "versions" and odd else {})
    preflight._check_matmul = broken if name == "device" and odd else matmul
    calls.clear()
    if name == "reduce" and odd:
        distributed.all_reduce = lambda total: time.sleep(60)
    else:
        distributed.all_reduce = counted
    if name == "silent" and odd:
        next(preflight._calls)
        return "slept"
    if name == "wrong sum":
        distributed.all_reduce = lambda total: None
    floor = {"fast enough": 1e-6, "too slow": 1e6}.get(name)
    if name == "slow rank" and odd:
        distributed.all_reduce = lambda total, **options: (time.sleep(0.2), reduce(total, **options))
    floor = 2.0**24 / 0.2 / 1e9 if name == "slow rank" else floor  # what 0.2 s for each make of it
    rooms = {"disk_bytes": 2**60 if name == "disk" and odd else 0, "min_allreduce_gb_per_s": floor}
    try:
        preflight.check(folder, torch.device("cpu"), settings, **rooms)
    except runs.BadNode as bad:
        return f"bad node, {'here' if bad.here else 'elsewhere'}: {bad}"
    except ValueError as error:
        return f"user: {error}"
    return f"fine after reducing {sum(calls)} bytes"

phases = ("equal", "settings", "versions", "device", "disk", "wrong sum", "fast enough", "too slow", "slow rank")
phases += ("reduce", "silent")
found = {name: phase(name) for name in phases}
(folder / f"rank-{rank}.json").write_text(json.dumps(found))
time.sleep(6)  # the other one's time is not over
os._exit(0)  # a collective is still waiting
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What two processes say about each fault."""
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "typings")}
    done = subprocess.run(
        [*command, str(folder / "ranks.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("settings", ("user: rank 1 on", "has other settings than rank 0 on")),
        ("versions", ("user: rank 1 on", "has numpy 1.0, rank 0 on")),
        ("disk", ("user: rank 1 on", "GiB of free disk, and checkpoints need")),
        ("device", ("bad node, here: rank 1 on", "RuntimeError: xid 79")),
        ("wrong sum", ("bad node, elsewhere: a sum of ones over 2 processes is 1.0",)),
    ],
)
def test_all_ranks_end_with_the_words_of_the_one_that_found_it(
    found: list[dict[str, str]], fault: str, words: tuple[str, ...]
) -> None:
    assert found[0]["equal"] == found[1]["equal"] == "fine after reducing 4 bytes"
    assert found[0][fault] == found[1][fault]
    assert all(word in found[0][fault] for word in words)


@pytest.mark.slow
def test_processes_that_are_slower_together_than_asked_for_are_bad_nodes(found: list[dict[str, str]]) -> None:
    """The figure and the floor are told; without a floor nothing is measured; one slow rank speaks for all."""
    measured = 4 + 6 * 2**24 + 8
    assert found[0]["fast enough"] == found[1]["fast enough"] == f"fine after reducing {measured} bytes"
    for phase, floor in (("too slow", "1e+06"), ("slow rank", "0.0838861")):
        assert found[0][phase] == found[1][phase]
        assert re.fullmatch(
            r"bad node, elsewhere: an all-reduce of 16 MiB over 2 processes makes [0-9.e+-]+ GB/s, "
            rf"less than run\.min_allreduce_gb_per_s={re.escape(floor)}",
            found[0][phase],
        )


@pytest.mark.parametrize(("world_size", "expected"), [(2, 1.0), (4, 1.5), (1024, 2.0 * 1023 / 1024)])
def test_bus_bandwidth_is_what_each_link_carries(world_size: int, expected: float) -> None:
    """A ring sends 2 (n - 1) / n of the bytes over each link."""
    assert preflight.bus_bandwidth(10**9, world_size, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize("floor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_floor_that_cannot_be_meant_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=r"run\.min_allreduce_gb_per_s must be > 0 and finite, or unset, got"):
        runs.RunConfig(min_allreduce_gb_per_s=floor)


@pytest.mark.slow
def test_a_rank_that_says_nothing_is_named_when_the_time_is_over(found: list[dict[str, str]]) -> None:
    assert found[0]["silent"] == "bad node, elsewhere: ranks [1] said nothing within 5 s"


@pytest.mark.slow
def test_a_collective_that_hangs_ends_within_its_limit(found: list[dict[str, str]]) -> None:
    for told in found:
        assert told["reduce"].startswith("bad node, elsewhere: processes do not reach each other: TimeoutError")


def test_a_healthy_process_passes_in_a_second_and_leaves_nothing_behind(tmp_path: Path) -> None:
    preflight.check(tmp_path, CPU, {"steps": 1})
    begun = time.process_time()
    preflight.check(tmp_path, CPU, {"steps": 1})
    assert time.process_time() - begun < 1.0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_check_that_hangs_is_left_behind_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "LIMIT_SECONDS", 0.3)
    monkeypatch.setattr(preflight, "_check_matmul", lambda device: time.sleep(30))
    begun = time.monotonic()
    with pytest.raises(runs.BadNode, match=r"no answer within 0 s") as raised:
        preflight.check(tmp_path, CPU, {})
    assert time.monotonic() - begun < 10
    assert raised.value.here


@pytest.mark.parametrize("name", ["_check_matmul", "_check_allocation"])
def test_a_device_that_computes_or_remembers_wrongly_is_a_bad_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One wrong bit in what comes back from the device."""
    equal, count = torch.equal, torch.Tensor.sum
    if name == "_check_matmul":
        monkeypatch.setattr(torch, "equal", lambda left, right: equal(left + torch.eye(256), right))
    else:
        monkeypatch.setattr(torch.Tensor, "sum", lambda self, *a, **k: count(self, *a, **k) - 1)
    with pytest.raises(RuntimeError, match=r"wrongly|does not hold"):
        getattr(preflight, name)(CPU)
    with pytest.raises(runs.BadNode):
        preflight.check(tmp_path, CPU, {})


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_a_bad_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(runs.BadNode, match="Slurm gave this node 8 GPUs, and torch sees none"):
        preflight.check(tmp_path, CPU, {})


def test_a_disk_without_room_for_the_checkpoints_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**30))
    preflight.check(tmp_path, CPU, {}, disk_bytes=2**30)
    with pytest.raises(ValueError, match=r"has 1\.0 GiB of free disk, and checkpoints need 3\.0 GiB: make room"):
        preflight.check(tmp_path, CPU, {}, disk_bytes=3 * 2**30)


def test_a_directory_that_cannot_be_written_is_the_users_and_one_that_breaks_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def fail(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return fail

    monkeypatch.setattr(storage, "fsync", refuse(30))
    with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
        preflight.check(tmp_path, CPU, {})
    monkeypatch.setattr(storage, "fsync", refuse(5))
    with pytest.raises(runs.BadNode, match="Input/output error"):
        preflight.check(tmp_path, CPU, {})


def test_what_a_killed_start_left_of_its_probe_is_removed(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    host = socket.gethostname()
    for name in (f"preflight-{host}-{2**30}", f"preflight-{host}-{2**30}-renamed", f"preflight-{host}-1"):
        (tmp_path / "control" / name).write_text("here")
    preflight.check(tmp_path, CPU, {})
    assert [path.name for path in (tmp_path / "control").iterdir()] == [f"preflight-{host}-1"], "process 1 lives"


def test_room_is_asked_for_checkpoints_that_are_still_to_come(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = recipe("distill")
    teaching = sys.modules["_teaching"]
    config = module.Distill(
        student=module._training.student.StudentConfig(path=tmp_path),
        data=module._training.DataConfig(path=tmp_path),
        steps=10,
        checkpoint_every=2,
        out=tmp_path,
    )
    one = 12 * teaching.checkpoints.shape_of(tiny_config()).num_parameters
    assert teaching.room(config, tiny_config()) == 3 * one
    for step in (2, 4, 6):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert teaching.room(config, tiny_config()) == one


def test_a_bad_node_ends_with_70_and_names_itself_to_the_batch_script(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'recipes'); from _main import exit_with; from llamita import runs\n"
        "def main(): raise runs.BadNode('rank 0: xid 79', here='here' in sys.argv)\n"
        "exit_with(main)\n"
    )
    for where, files in (("elsewhere", {"rank-0"}), ("here", {"rank-0", "node-gpu07"})):
        folder = tmp_path / where
        folder.mkdir()
        changes = {"LLAMITA_EXIT_DIR": str(folder), "SLURMD_NODENAME": "gpu07", "PYTHONPATH": "typings"}
        done = subprocess.run(
            [sys.executable, "-c", program, where],
            cwd=REPOSITORY,
            env={**os.environ, **changes},
            capture_output=True,
            text=True,
        )
        assert done.returncode == runs.EXIT_NODE
        assert "error: bad node: rank 0: xid 79" in done.stderr
        assert {path.name: path.read_text().strip() for path in folder.iterdir()} == dict.fromkeys(files, "70")


def test_a_fault_is_found_before_any_weight_is_read_or_hashed(
    recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise runs.BadNode("xid 79", here=True)

    monkeypatch.setattr(preflight, "check", fail)
    module = recipe("distill")
    accelerator = SimpleNamespace(device=CPU, is_main_process=True)
    monkeypatch.setattr(module, "check", lambda config: (None, tmp_path, {}))
    monkeypatch.setattr(module._training.launch, "new_accelerator", lambda *_, **__: accelerator)
    monkeypatch.setattr(module._training._teaching, "room", lambda *_: 0)
    config = SimpleNamespace(deepspeed=None, optim=SimpleNamespace(clip_norm=1.0), run=runs.RunConfig())
    with pytest.raises(runs.BadNode):
        module.train(config, SimpleNamespace(path=tmp_path, settings={}))
    module = recipe("cache")
    monkeypatch.setattr(module, "Inputs", lambda config: SimpleNamespace())  # it can hash nothing
    config = module.Cache(
        teacher=module.TeacherConfig(path=tmp_path), data=module.DataConfig(path=tmp_path), out=tmp_path / "out"
    )
    with pytest.raises(runs.BadNode):
        module.run(config)
    assert not (tmp_path / "out").exists()
