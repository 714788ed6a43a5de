"""The batch script, run for real with stand-ins for Slurm's own commands: signals, exit codes, requeue."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

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
    assert not (cluster.root / "work" / "control" / "stop-4711-0").exists(), "it is of no use to any other start"


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


def test_a_crash_that_left_nothing_ends_the_job_at_once_only_on_its_first_start(cluster: Cluster) -> None:
    """A node that dies in the eleventh start is no reason to end a weekend; two such starts in a row are."""
    requeued = []
    for start, body in enumerate(
        ["save(); tell(75)", "raise RuntimeError", "save(); tell(75)", *["raise RuntimeError"] * 2]
    ):
        cluster.recipe("prune", body)
        (cluster.root / "stubs" / "scontrol.log").unlink(missing_ok=True)
        _, output = cluster.run("prune", "out=work", SLURM_RESTART_COUNT=str(start))
        requeued.append(cluster.requeued)
    assert requeued == [True, True, True, True, False]
    assert "it crashed, and two starts in a row left nothing new" in output


def test_hidden_folders_and_logs_are_no_progress(cluster: Cluster) -> None:
    litter = """
names = ("logs/rank-00000.log", f".model-{time.time_ns()}/shard-0", "metrics.jsonl", "run.json", "ERROR.json")
for name in (*names, f"tensorboard/events.{time.time_ns()}"):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(str(time.time_ns()))
raise RuntimeError"""
    cluster.recipe("prune", litter)
    code, output = cluster.run("prune", "out=work")
    assert (code, cluster.requeued) == (1, False), output
    assert "before anything new was saved" in output
    assert "the first error of this start: work/ERROR.json" in output


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


@pytest.mark.parametrize(("recipe", "reason"), [("average", "one process"), ("prune", "shares its work on one node")])
def test_a_recipe_of_one_node_refuses_many(cluster: Cluster, recipe: str, reason: str) -> None:
    cluster.recipe(recipe, "tell(0)")
    code, output = cluster.run(recipe, "out=work", SLURM_NNODES="2", LLAMITA_PROCESSES_PER_NODE="2")
    assert (code, reason in output) == (64, True), output


@pytest.mark.parametrize(
    ("recipe", "told", "expected"),
    [
        ("prune", {"LLAMITA_PROCESSES_PER_NODE": "2"}, "2"),
        ("sample", {"SLURM_GPUS_ON_NODE": "2"}, "2"),
        ("evaluate", {"SLURM_GPUS_ON_NODE": "2", "LLAMITA_PROCESSES_PER_NODE": "1"}, None),
        ("assess", {}, None),
        ("average", {"LLAMITA_PROCESSES_PER_NODE": "2"}, None),
    ],
)
def test_processes_share_the_work_of_a_node_and_one_alone_is_the_plain_run(
    cluster: Cluster, recipe: str, told: dict[str, str], expected: str | None
) -> None:
    body = "(out / ('seen-' + os.environ.get('RANK', 'alone'))).write_text(os.environ.get('WORLD_SIZE', '')); tell(0)"
    cluster.recipe(recipe, body)
    smi = cluster.root / "stubs" / "nvidia-smi"
    smi.write_text("#!/bin/bash\necho 'GPU 0: a'; echo 'GPU 1: b'\n")
    smi.chmod(0o755)
    code, output = cluster.run(recipe, "out=work", SLURM_JOB_ID=str(free_port() - 20000), **told)
    assert code == 0, output
    seen = {path.name: path.read_text() for path in (cluster.root / "work").glob("seen-*")}
    assert seen == ({"seen-alone": ""} if expected is None else {"seen-0": expected, "seen-1": expected})


@pytest.mark.parametrize("wrong", ["0", "many"])
def test_a_number_of_processes_that_is_none_is_refused(cluster: Cluster, wrong: str) -> None:
    cluster.recipe("distill", "tell(0)")
    code, output = cluster.run("distill", "out=work", LLAMITA_PROCESSES_PER_NODE=wrong)
    assert (code, f"must be at least 1, got '{wrong}'" in output) == (64, True), output


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


@pytest.mark.parametrize("body", ["sleep 300", "echo 'GPU 0: a'; echo 'GPU 1: b'; exit 9"])
def test_a_node_whose_gpus_do_not_answer_is_left_out_of_the_next_start(cluster: Cluster, body: str) -> None:
    """A driver that hangs must not hold the whole job until its time limit."""
    cluster.recipe("prune", "save(); tell(0)")
    patience = '#!/bin/bash\n[ "$1 $2 $3" = \'-k 5 60\' ] && shift 3\nexec /usr/bin/timeout -k 1 1 "$@"\n'
    for name, text in (("nvidia-smi", f"#!/bin/bash\n{body}\n"), ("timeout", patience)):
        (cluster.root / "stubs" / name).write_text(text)
        (cluster.root / "stubs" / name).chmod(0o755)
    code, output = cluster.run("prune", "out=work", SLURM_GPUS_ON_NODE="2")
    assert (code, cluster.requeued) == (70, True), output
    assert f"ExcNodeList={os.uname().nodename}" in cluster.calls("scontrol")


def test_a_site_may_read_what_nobody_has_set_and_only_the_site(cluster: Cluster) -> None:
    """Modules and conda do; the rest of the script keeps its guards."""
    (cluster.root / "slurm").mkdir()
    (cluster.root / "slurm" / "site.sh").write_text(
        "conda=$LLAMITA_TEST_UNSET/bin\n"
        "false | true || exit 3\n"
        "trap 'case $- in *u*) set -o | grep pipefail > guards ;; esac' EXIT\n"
    )
    cluster.recipe("prune", "tell(0)")
    code, output = cluster.run("prune", "out=work")
    assert code == 0, output
    assert (cluster.root / "guards").read_text().split() == ["pipefail", "on"]


def test_a_site_does_not_say_how_many_processes_a_stage_has(cluster: Cluster) -> None:
    (cluster.root / "slurm").mkdir()
    (cluster.root / "slurm" / "site.sh").write_text("export LLAMITA_PROCESSES_PER_NODE=2\n")
    cluster.recipe("prune", "(out / 'seen').write_text(os.environ.get('LLAMITA_PROCESSES_PER_NODE', 'unset')); tell(0)")
    code, output = cluster.run("prune", "out=work", LLAMITA_PROCESSES_PER_NODE="1")
    assert code == 0, output
    assert "torch.distributed.run" not in cluster.calls("srun")
    assert (cluster.root / "work" / "seen").read_text() == "unset"


def test_every_process_gets_the_environment_of_the_batch_shell(cluster: Cluster) -> None:
    """``SBATCH_EXPORT=NONE`` at the submission becomes ``SLURM_EXPORT_ENV=NONE`` in the job, which srun would obey."""
    cluster.recipe("prune", "tell(0)")
    code, output = cluster.run("prune", "out=work", SLURM_EXPORT_ENV="NONE")
    assert code == 0, output
    assert cluster.calls("srun").startswith("--export=ALL ")


def free_port() -> int:
    """A port of those that jobs get, below those that Linux gives away by itself, that nobody here listens on."""
    for number in range(12_000):
        port = 20_000 + (os.getpid() + number) % 12_000
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("", port))
            return port
    raise AssertionError("no port is free")


def test_a_node_that_was_left_out_once_stays_out(cluster: Cluster) -> None:
    """An update of the list of nodes replaces it."""
    cluster.recipe("prune", "Path(os.environ['LLAMITA_EXIT_DIR'], 'node-gpu' + sys.argv[1]).touch(); tell(70)")
    for start in ("0", "1"):
        code, output = cluster.run("prune", start, "out=work", SLURM_RESTART_COUNT=start)
        assert code == 70, output
    assert [call for call in cluster.calls("scontrol").splitlines() if "ExcNodeList" in call] == [
        "update JobId=4711 ExcNodeList=gpu0",
        "update JobId=4711 ExcNodeList=gpu0,gpu1",
    ]


def test_a_process_that_died_of_the_signal_of_a_preemption_is_no_crash(cluster: Cluster) -> None:
    """Slurm sends TERM to all processes, those of a library that knows nothing of saving among them."""
    cluster.recipe("prune", "(out / 'control' / 'up').touch()\nwhile not started.exists(): time.sleep(0.02)\ntell(1)")
    process = cluster.start("prune", "out=work")
    wait_for(cluster.root / "work" / "control" / "up")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode, cluster.requeued) == (75, True), output


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
def test_a_job_that_was_cancelled_does_not_start_itself_again(cluster: Cluster, state: str, requeued: bool) -> None:
    stub = cluster.root / "stubs" / "squeue"
    stub.write_text(f"#!/bin/bash\necho {state}\n")
    stub.chmod(0o755)
    cluster.recipe("prune", "save(); tell(75)")
    code, output = cluster.run("prune", "out=work")
    assert (code, cluster.requeued) == (75, requeued), output


def test_one_job_of_an_array_asks_for_itself_and_not_for_all(cluster: Cluster) -> None:
    cluster.recipe("prune", "save(); tell(75)")
    for changes in ({**worker(1), "SLURM_ARRAY_JOB_ID": "4712"}, {"LLAMITA_TASK": "4712_1", "SLURM_JOB_ID": "4712"}):
        (cluster.root / "stubs" / "scontrol.log").unlink(missing_ok=True)
        code, output = cluster.run("prune", "out=work", **changes)
        assert code == 75, output
        assert cluster.calls("scontrol").splitlines()[-1] == "requeue 4712_1"


def test_a_job_that_slurm_has_put_back_already_is_not_an_error(cluster: Cluster) -> None:
    stub = cluster.root / "stubs" / "scontrol"
    stub.write_text(
        SCONTROL.replace("exit 0", "[ $1 = requeue ] && { echo Job is pending execution >&2; exit 1; }; exit 0")
    )
    cluster.recipe("prune", "save(); tell(75)")
    code, output = cluster.run("prune", "out=work")
    assert (code, "Slurm has put the job back" in output, "could not" in output) == (75, True, False)


def test_a_node_whose_name_is_no_hosts_is_met_at_its_address(cluster: Cluster) -> None:
    told = """#!/bin/bash
[ "$2" = hostnames ] && echo no-such-host.invalid
[ "$2" = node ] && echo "NodeName=$3 NodeAddr=$ADDRESS NodeHostName=x"
exit 0
"""
    (cluster.root / "stubs" / "scontrol").write_text(told)
    cluster.recipe("prune", "tell(0)")
    code, output = cluster.run("prune", "out=work", ADDRESS="127.0.0.1")
    assert (code, "head 127.0.0.1:" in output) == (0, True), output
    code, output = cluster.run("prune", "out=work", ADDRESS="no-such-address.invalid")
    assert (code, "has no address that this node can look up" in output) == (64, True), output


def test_the_code_that_a_job_names_wins_over_what_is_installed(cluster: Cluster) -> None:
    cluster.recipe("prune", "(out / 'seen').write_text(os.environ['PYTHONPATH']); tell(0)")
    for extra, expected in (({}, ""), ({"PYTHONPATH": "/more"}, ":/more")):
        code, output = cluster.run("prune", "out=work", **extra)
        assert code == 0, output
        assert (cluster.root / "work" / "seen").read_text() == f"{cluster.root}/typings{expected}"


def test_a_pipeline_says_where_and_with_which_python_and_no_job_inside_inherits_it(cluster: Cluster) -> None:
    cluster.recipe(
        "prune",
        "(out / 'seen').write_text(repr([k for k in os.environ if k in ('LLAMITA_OUT', 'LLAMITA_PYTHON')])); tell(0)",
    )
    where = cluster.root / "a folder"
    code, output = cluster.run("prune", f"out={where}", LLAMITA_OUT=str(where), LLAMITA_PYTHON=sys.executable)
    assert code == 0, output
    assert (where / "seen").read_text() == "[]"


def worker(number: int) -> dict[str, str]:
    """What Slurm tells one job of an array of two."""
    return {"SLURM_JOB_ID": str(4711 + number), "SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_TASK_COUNT": "2"}


@pytest.mark.parametrize(("own", "requeued"), [(True, True), (False, False)])
def test_what_the_others_of_an_array_publish_is_no_progress_of_a_worker_that_crashes(
    cluster: Cluster, own: bool, requeued: bool
) -> None:
    body = f"""
(out / "shards").mkdir()
(out / "shards" / "train-00000").touch()
mine = out / "workers" / "0000{int(not own)}-of-00002"
mine.mkdir(parents=True)
(mine / "metrics.jsonl").write_text('{{"cache/tokens_per_s": 1}}')
raise RuntimeError"""
    cluster.recipe("prune", body)
    code, output = cluster.run("prune", "out=work", **worker(0))
    assert (code, "requeue 4711_0" in cluster.calls("scontrol")) == (1, requeued), output


def test_jobs_of_an_array_in_one_directory_stop_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster
) -> None:
    """One that starts does not take away what another one was told, or all of them by hand."""
    control = tmp_path / "run" / "control"
    control.mkdir(parents=True)
    for name in ("stop", "stop-4711-0"):
        (control / name).touch()
    for key, value in worker(1).items():
        monkeypatch.setenv(key, value)
    with runs.start(tmp_path / "run", "cache", {}, runs.RunConfig()) as run:
        assert run.stop.is_set()
        (control / "stop").unlink()
        assert not run.stop.is_set()
    assert (control / "stop-4711-0").exists()


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
