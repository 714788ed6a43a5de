"""The batch script, run for real with stand-ins for Slurm's own commands: signals, exit codes, requeue."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from llamita import runs

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPT = REPOSITORY / "slurm" / "run.sbatch"

SRUN = """#!/bin/bash
echo "$@" >> "$STUBS/srun.log"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$STUBS/scontrol.log"
[ "$1" = show ] && echo localhost
exit 0
"""
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from types import ModuleType
from typing import Any
out = Path(next(a for a in sys.argv if a.startswith("out=")).removeprefix("out="))
started, = [out / "control" / f"stop-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"]
def tell(code):
    Path(os.environ["LLAMITA_EXIT_DIR"], "rank-" + os.environ.get("RANK", "0")).write_text(str(code))
    sys.exit(code)
def save():
    (out / "checkpoints" / f"step-{time.time_ns()}").mkdir(parents=True)
    for folder in (out / "checkpoints").iterdir():
        (folder / "weights").write_text("x")
"""


@dataclass
class Cluster:
    """A folder that looks like the repository, and stand-ins that really start what they are told to start."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stubs = self.root / "stubs"
        (self.root / "recipes").mkdir()
        stubs.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (stubs / name).write_text(text)
            (stubs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{stubs}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.root),
            "STUBS": str(stubs),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1",
            "LLAMITA_ROOT": str(self.root),
            "LLAMITA_LOCAL": str(self.root),
            "OMP_NUM_THREADS": "1",
        }

    def recipe(self, name: str, text: str) -> None:
        """A recipe that does ``text`` in place of work."""
        (self.root / "recipes" / f"{name}.py").write_text(PRELUDE + text)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """What Slurm does on the first node of the job."""
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=self.environment | environment,
            cwd=self.root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of one start of the job."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=500)
        return process.returncode, output

    def calls(self, command: str) -> str:
        """What a stand-in was called with."""
        log = self.root / "stubs" / f"{command}.log"
        return log.read_text() if log.exists() else ""

    @property
    def requeued(self) -> bool:
        return "requeue 4711" in self.calls("scontrol")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


def test_a_finished_recipe_ends_the_job(cluster: Cluster) -> None:
    cluster.recipe("prune", "tell(0)")
    code, output = cluster.run("prune", "out=work")
    assert (code, cluster.requeued) == (0, False), output
    assert not list((cluster.root / "work" / "control").iterdir())
    assert not list(cluster.root.glob("llamita-4711*")), "the job's own temporary folder is left behind"


def test_arguments_reach_the_recipe_as_they_are(cluster: Cluster) -> None:
    cluster.recipe("prune", "(out / 'seen').write_text(repr(sys.argv[1:])); tell(0)")
    arguments = ["name=$(touch pwned) `touch pwned`; touch pwned", "list=[a, b]", "star=*", "out=work"]
    code, output = cluster.run("prune", *arguments)
    assert code == 0, output
    assert (cluster.root / "work" / "seen").read_text() == repr(arguments)
    assert not (cluster.root / "pwned").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_batch_shell_becomes_a_stop_file_and_the_run_saves(cluster: Cluster, number: int) -> None:
    waits = "(out / 'control' / 'up').touch()\nwhile not started.exists(): time.sleep(0.02)"
    body = f"{waits}\nsave(); time.sleep(0.3); tell(75)"
    cluster.recipe("prune", body)
    process = cluster.start("prune", "out=work")
    wait_for(cluster.root / "work" / "control" / "up")
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert cluster.requeued
    assert (cluster.root / "work" / "control" / "stop-4711-0").exists()


def test_a_stop_file_of_an_earlier_start_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    control = tmp_path / "run" / "control"
    control.mkdir(parents=True)
    for name in ("stop", "stop-4711-0", "stop-12-1"):
        (control / name).touch()
    with runs.start(tmp_path / "run", "distill", {}, runs.RunConfig()) as run:
        assert not run.stop.is_set()
        (control / "stop-4711-0").touch()
        assert not run.stop.is_set()
        (control / "stop-4711-1").touch()
        assert run.stop.is_set()


def test_a_stop_that_came_before_the_run_had_started_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "stop-4711-0").touch()
    with runs.start(tmp_path, "distill", {}, runs.RunConfig()) as run:
        assert run.stop.is_set()


@pytest.mark.parametrize("name", ["control", "slurm"])
def test_a_batch_job_may_make_its_folder_before_the_run_but_nobody_elses(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no run wrote"), runs.start(tmp_path, "prune", {}, runs.RunConfig()):
        pass
    (tmp_path / "thesis.tex").unlink()
    with runs.start(tmp_path, "prune", {}, runs.RunConfig()) as run:
        assert not run.done


@pytest.mark.parametrize(
    ("body", "code", "requeued"),
    [
        ("save(); tell(75)", 75, True),
        ("tell(75)", 75, True),
        ("tell(64)", 64, False),
        ("save(); tell(64)", 64, False),
        ("save(); raise RuntimeError", 1, True),
        ("raise RuntimeError", 1, False),
        ("tell(70)", 70, True),
        ("save(); os.kill(os.getpid(), signal.SIGKILL)", 137, True),
    ],
)
def test_exit_codes_decide_over_the_requeue(cluster: Cluster, body: str, code: int, requeued: bool) -> None:
    cluster.recipe("prune", body)
    got, output = cluster.run("prune", "out=work")
    assert (got, cluster.requeued) == (code, requeued), output


def test_three_starts_that_leave_nothing_new_end_the_job(cluster: Cluster) -> None:
    cluster.recipe("prune", "tell(75)")
    requeued = []
    for start in range(3):
        (cluster.root / "stubs" / "scontrol.log").unlink(missing_ok=True)
        cluster.run("prune", "out=work", SLURM_RESTART_COUNT=str(start))
        requeued.append(cluster.requeued)
    assert requeued == [True, True, False]


def test_hidden_folders_and_logs_are_no_progress(cluster: Cluster) -> None:
    litter = """
for name in ("logs/rank-00000.log", f".model-{time.time_ns()}/shard-0", "metrics.jsonl", "run.json"):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(str(time.time_ns()))
raise RuntimeError"""
    cluster.recipe("prune", litter)
    code, output = cluster.run("prune", "out=work")
    assert (code, cluster.requeued) == (1, False), output
    assert "before anything new was saved" in output


def test_restarts_have_a_cap(cluster: Cluster) -> None:
    cluster.recipe("prune", "save(); tell(75)")
    code, output = cluster.run("prune", "out=work", SLURM_RESTART_COUNT="2", LLAMITA_MAX_RESTARTS="2")
    assert (code, cluster.requeued) == (75, False), output


def test_a_stop_by_hand_is_not_undone_by_a_requeue(cluster: Cluster) -> None:
    cluster.recipe("prune", "(out / 'control' / 'stop').touch(); save(); tell(75)")
    code, output = cluster.run("prune", "out=work")
    assert (code, cluster.requeued) == (75, False), output


def test_without_scontrol_nothing_starts(cluster: Cluster) -> None:
    """A fall-back to localhost turns one job of 16 nodes into 16 jobs of one node."""
    cluster.recipe("prune", "save(); tell(0)")
    (cluster.root / "stubs" / "scontrol").unlink()
    code, output = cluster.run("prune", "out=work")
    assert code == 64, output
    assert "scontrol" in output
    assert not (cluster.root / "work").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name of a recipe"),
        (("../../bin/sh", "out=work"), "name of a recipe"),
        (("nosuch", "out=work"), "no recipe"),
        (("prune", "target=x"), "out="),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_runs(
    cluster: Cluster, arguments: tuple[str, ...], message: str
) -> None:
    cluster.recipe("prune", "tell(0)")
    code, output = cluster.run(*arguments)
    assert code == 64, output
    assert message in output
    assert not cluster.calls("srun")


def test_a_recipe_of_one_process_refuses_many_nodes(cluster: Cluster) -> None:
    cluster.recipe("prune", "tell(0)")
    code, output = cluster.run("prune", "out=work", SLURM_NNODES="2")
    assert (code, "one process" in output) == (64, True), output


def test_out_of_an_experiment_is_asked_from_the_recipe(cluster: Cluster) -> None:
    """``out`` may stand in the experiment's file; then only Hydra knows it."""
    text = "import sys\nif '--cfg' in sys.argv:\n    print('a: 1\\nout: other/place\\nb: 2')\n"
    (cluster.root / "recipes" / "prune.py").write_text(text)
    code, output = cluster.run("prune", "experiment=one")
    assert code == 0, output
    assert (cluster.root / "other" / "place" / "control").is_dir()


def test_a_node_without_its_gpus_is_left_out_of_the_next_start(cluster: Cluster) -> None:
    cluster.recipe("prune", "save(); tell(0)")
    smi = cluster.root / "stubs" / "nvidia-smi"
    smi.write_text("#!/bin/bash\necho 'GPU 0: one of two'\n")
    smi.chmod(0o755)
    code, output = cluster.run("prune", "out=work", SLURM_GPUS_ON_NODE="2")
    assert (code, cluster.requeued) == (70, True), output
    assert f"ExcNodeList={os.uname().nodename}" in cluster.calls("scontrol")
    assert not (cluster.root / "work" / "checkpoints").exists()


def free_port() -> int:
    """A port of those that jobs get, below those that Linux gives away by itself, that nobody here listens on."""
    for number in range(12_000):
        port = 20_000 + (os.getpid() + number) % 12_000
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("no port is free")


def test_the_real_exit_code_survives_torchrun(cluster: Cluster) -> None:
    """torchrun ends with 1 whatever its workers ended with; ``_main`` leaves the code in a file."""
    shutil.copy(REPOSITORY / "recipes" / "_main.py", cluster.root / "recipes" / "_main.py")
    body = """
from _main import exit_with
from llamita import runs
def main():
    if "bad" in sys.argv:
        raise ValueError("steps must be at least 1, got 0")
    raise runs.Stopped("saved")
exit_with(main)
"""
    cluster.recipe("distill", body)
    job = free_port() - 20000  # the port follows from the job
    changes = {"PYTHONPATH": str(REPOSITORY / "typings"), "LLAMITA_PROCESSES_PER_NODE": "2", "SLURM_JOB_ID": str(job)}
    codes = []
    for last in ("good", "bad"):
        code, output = cluster.run("distill", "out=work", last, **changes)
        codes.append(code)
    assert codes == [75, 64], output
    assert f"--rdzv-endpoint=localhost:{20000 + job % 30000}" in cluster.calls("srun")


SBATCH = """#!/bin/bash
printf '%s\\0' "$@" > "$STUBS/sbatch.args"
echo "$LLAMITA_ROOT" > "$STUBS/root"
[ -e "$STUBS/refuse" ] && { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "815;cluster"
"""


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Submission with a stand-in for sbatch."""
    stub = cluster.root / "stubs" / "sbatch"
    stub.write_text(SBATCH)
    stub.chmod(0o755)
    monkeypatch.setenv("STUBS", str(stub.parent))
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    return cluster


@pytest.fixture
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_slurm", REPOSITORY / "recipes" / "_slurm.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["recipe_slurm"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def test_a_stage_waits_for_the_one_before_and_dies_with_it(
    slurm: Cluster, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DISTRIBUTED", frozenset({"_any"}))
    (slurm.root / "sub").mkdir()
    out = slurm.root / "sub" / "student"
    recipe = next(p.stem for p in sorted((REPOSITORY / "recipes").glob("[a-z]*.py")))
    overrides = [f"out={out}", "note=$(rm -rf /) ; 'x'"]
    job = module.submit(
        recipe, overrides, name="student", out=out, after=["814"], nodes=4, gpus_per_node=8, time="1:00"
    )
    arguments = (slurm.root / "stubs" / "sbatch.args").read_text().split("\0")[:-1]
    assert job == "815"
    assert {"--dependency=afterok:814", "--kill-on-invalid-dep=yes", "--parsable", "--time=1:00"} <= set(arguments)
    assert arguments[-3:] == [recipe, *overrides]
    assert arguments[-4] == str(SCRIPT)
    assert f"--output={out}/slurm/%x-%j.out" in arguments
    assert (out / "slurm").is_dir(), "Slurm drops the log where its folder is missing"
    assert {"--nodes=1", "--gpus-per-node=1"} <= set(arguments), "one process needs one node and one GPU"
    assert Path((slurm.root / "stubs" / "root").read_text().strip()) == REPOSITORY


def test_the_code_of_a_first_start_that_failed_early_reaches_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that failed before any work leaves no trace of itself, but the batch job's own folders stay."""
    endings = tmp_path / "run" / "control" / "exit-4711-0"
    endings.mkdir(parents=True)
    (tmp_path / "run" / "slurm").mkdir()
    with pytest.raises(ValueError, match="no good"), runs.start(tmp_path / "run", "x", {}, runs.RunConfig()):
        raise ValueError("no good")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["control", "slurm"]
    assert endings.is_dir()


def test_the_script_and_the_submitter_agree_on_who_runs_on_many_nodes(module: ModuleType) -> None:
    line = next(line for line in SCRIPT.read_text().splitlines() if line.strip().startswith("distill |"))
    assert {name.strip(" )") for name in line.split("|")} == module.DISTRIBUTED


def test_a_stage_in_the_queue_is_not_submitted_again(slurm: Cluster, module: ModuleType) -> None:
    squeue = slurm.root / "stubs" / "squeue"
    squeue.write_text(f"#!/bin/bash\necho '77|/elsewhere'\necho '78|{slurm.root}/work'\n")
    squeue.chmod(0o755)
    recipe = next(p.stem for p in sorted((REPOSITORY / "recipes").glob("[a-z]*.py")))
    assert module.submit(recipe, [], name="work", out=slurm.root / "work") == "78"
    assert not (slurm.root / "stubs" / "sbatch.args").exists()


def test_a_dry_run_prints_and_submits_nothing(
    slurm: Cluster, module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = next(p.stem for p in sorted((REPOSITORY / "recipes").glob("[a-z]*.py")))
    out = slurm.root / "work"
    first = module.submit(recipe, ["a=b c"], name="one", out=out, dry_run=True)
    module.submit(recipe, [], name="two", out=out, after=[first], dry_run=True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("run.sbatch " + recipe + " 'a=b c'")
    assert "--dependency=afterok:dry-run-one" in printed[1]
    assert not (slurm.root / "stubs" / "sbatch.args").exists()
    assert not out.exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "a b"}, "name of a job"),
        ({"name": "a\n#SBATCH --x"}, "name of a job"),
        ({"name": "x" * 65}, "name of a job"),
        ({"after": "1;2"}, "after"),
        ({"out": Path("100%j")}, "%"),
        ({"time": "soon"}, "launcher.time"),
        ({"nodes": 0}, "launcher.nodes"),
        ({"gpus_per_node": -1}, "launcher.gpus_per_node"),
        ({"options": ["gpu"]}, "launcher.options"),
        ({"options": ["--wrap=rm"]}, "launcher.options"),
        ({"recipe": "_slurm"}, "recipe"),
        ({"recipe": "../x"}, "recipe"),
    ],
)
def test_what_slurm_must_not_get_is_refused(
    slurm: Cluster, module: ModuleType, wrong: dict[str, Any], message: str
) -> None:
    recipe = next(p.stem for p in sorted((REPOSITORY / "recipes").glob("[a-z]*.py")))
    arguments: dict[str, Any] = {"recipe": recipe, "overrides": [], "name": "ok", "out": slurm.root / "work"} | wrong
    with pytest.raises(ValueError, match=message):
        module.submit(**arguments)
    assert not (slurm.root / "stubs" / "sbatch.args").exists()


def test_a_refusal_of_sbatch_is_the_users_error(slurm: Cluster, module: ModuleType) -> None:
    recipe = next(p.stem for p in sorted((REPOSITORY / "recipes").glob("[a-z]*.py")))
    (slurm.root / "stubs" / "refuse").touch()
    with pytest.raises(ValueError, match="invalid partition"):
        module.submit(recipe, [], name="work", out=slurm.root / "work")
    (slurm.root / "stubs" / "sbatch").unlink()
    with pytest.raises(ValueError, match="needs sbatch"):
        module.submit(recipe, [], name="work", out=slurm.root / "work")


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_launcher_files_hold_settings_of_the_launcher(name: str, module: ModuleType) -> None:
    values = yaml.safe_load((REPOSITORY / "configs" / "launcher" / f"{name}.yaml").read_text())
    assert module.LauncherConfig(**values).kind == name
