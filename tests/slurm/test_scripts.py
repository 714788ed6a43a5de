"""The scripts that a pipeline hands to Slurm: compared to the letter, run for what they pass on, submitted once."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from llamita import runs

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = [
    "note=two words",
    "note='single' \"double\"",
    "note=$(touch pwned) `touch pwned`",
    "note=a; touch pwned & touch pwned | touch pwned",
    "note=line one\n#SBATCH --job-name=pwned\nline three",
    "note=100%j\t\\n \\",
    "note=*?[a-z]{b,c} ~ !x #y",
    "note=naïve \u2028 \x07 ü",
    "",
]

SQUEUE = """#!/bin/bash
cat "$STUBS/queue" 2> /dev/null
[ ! -e "$STUBS/squeue-fails" ] || { echo "Unable to contact slurm controller" >&2; exit 1; }
"""
SBATCH = """#!/bin/bash
printf '%s\\0' "$@" > "$STUBS/sbatch.args"
env > "$STUBS/environment"
[ -e "$STUBS/refuse" ] && { echo "sbatch: error: invalid partition" >&2; exit 1; }
echo "815;cluster"
"""


@pytest.fixture
def module(recipe: Callable[[str], ModuleType]) -> ModuleType:
    recipe("pipeline")
    return sys.modules["_slurm"]


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the commands of Slurm, which note what they are called with."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in (("squeue", SQUEUE), ("sbatch", SBATCH)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("STUBS", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def arguments(stubs: Path) -> list[str]:
    return (stubs / "sbatch.args").read_text().split("\0")[:-1]


def stage(module: ModuleType, out: Path, **changes: Any) -> Any:
    return module.BatchStage(**{"name": out.name, "recipe": "prune", "overrides": ["a=b"], "out": out, **changes})


OUT = Path("/scratch/me/small llama")
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "distill": (
        {"recipe": "distill", "overrides": ["student.path=/scratch/me/pruned", "deepspeed=zero2"], "processes": 8},
        {"nodes": 4, "gpus_per_node": 8, "options": ["--partition=gpu", "--constraint=h100&ib"]},
    ),
    "one_process": ({"overrides": HOSTILE}, {"nodes": 4, "gpus_per_node": 8, "time": "2-00:00:00"}),
    "sharing": ({"recipe": "sample", "processes": 2}, {"nodes": 4, "gpus_per_node": 8}),
    "cpu": ({"recipe": "distill", "processes": 6}, {"nodes": 4}),
    "workers": ({"recipe": "cache", "workers": 16}, {"gpus_per_node": 8, "at_a_time": 4}),
    "sweep": (
        {
            "recipe": "distill",
            "points": {"learning_rate_0.1": ["optim.learning_rate=0.1"], "x-0badcafe": ["note=$(x) 'y'"]},
            "left": [1],
        },
        {"gpus_per_node": 8},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_script_is_what_it_was(name: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """``LLAMITA_GOLDEN=write`` writes them anew, to be read before they are committed."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me/llamita"))
    monkeypatch.setattr(sys, "executable", "/home/me/llamita/.venv/bin/python")
    changes, launcher = CASES[name]
    text = stage(module, OUT / name, **changes).script(
        module.LauncherConfig(kind="slurm", **launcher), OUT / "code-0123456789ab"
    )
    file = GOLDEN / f"{name}.sbatch"
    if os.environ.get("LLAMITA_GOLDEN") == "write":
        file.write_text(text)
    assert text == file.read_text()


def passed_on(script: str, folder: Path, **environment: str) -> tuple[list[str], str]:
    """What a script calls ``run.sbatch`` with, and the directory it names; ``folder`` stands for the snapshot."""
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "run.sbatch").write_text('printf "%s\\0" "$@" > args; printf %s "$LLAMITA_OUT" > out\n')
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "pwned").exists()
    return (folder / "args").read_text().split("\0")[:-1], (folder / "out").read_text()


def test_every_override_arrives_as_it_is_and_none_is_run(module: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "my run" / "pruned"
    script = stage(module, out, overrides=HOSTILE).script(module.LauncherConfig(kind="slurm"), tmp_path)
    assert passed_on(script, tmp_path) == (["prune", *HOSTILE, f"out={out}"], str(out))
    assert len([line for line in script.split("\n") if "note=" in line]) == len(HOSTILE) - 1, "one line each"
    directives = [line for line in script.split("\n") if line.startswith("#SBATCH")]
    assert not [line for line in directives if "pwned" in line]
    last = script.split("\n").index(directives[-1])
    assert [line for line in script.split("\n")[:last] if not line.startswith("#")] == [], "sbatch stops reading there"


def test_each_point_of_a_sweep_has_its_overrides_and_folder_and_is_no_worker(
    module: ModuleType, tmp_path: Path
) -> None:
    points = {f"point{index}": [word] for index, word in enumerate(HOSTILE)}
    out = tmp_path / "sweep"
    script = stage(module, out, points=points).script(module.LauncherConfig(kind="slurm"), tmp_path)
    for index, word in enumerate(HOSTILE):
        told = passed_on(script, tmp_path, SLURM_ARRAY_TASK_ID=str(index), SLURM_ARRAY_TASK_COUNT="9")
        assert told == (["prune", "a=b", word, f"out={out / f'point{index}'}"], str(out / f"point{index}"))
    assert "unset SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT" in script
    done = subprocess.run(["bash", "-c", script], env={"SLURM_ARRAY_TASK_ID": "99"}, capture_output=True, text=True)
    assert done.returncode == runs.EXIT_USER


@pytest.mark.parametrize(
    ("processes", "nodes", "per_node"), [(8, 4, 2), (6, 4, 2), (1, 4, 1), (7, 4, 7), (2, 1, 2), (4, 4, 1)]
)
def test_without_gpus_a_stage_has_as_many_processes_as_locally(
    module: ModuleType, processes: int, nodes: int, per_node: int
) -> None:
    launcher = module.LauncherConfig(kind="slurm", nodes=nodes)
    made = stage(module, OUT, name="x", recipe="distill", processes=processes)
    script = made.script(launcher, OUT)
    assert made.layout(launcher).nodes * per_node == processes
    assert f"export LLAMITA_PROCESSES_PER_NODE={per_node}\n" in script
    assert f"#SBATCH --nodes={processes // per_node}\n" in script


def test_a_stage_waits_for_the_one_before_and_dies_with_it(stubs: Path, module: ModuleType, tmp_path: Path) -> None:
    out, launcher = tmp_path / "run" / "student", module.LauncherConfig(kind="slurm", options=["--qos=high"])
    snapshot = module.Snapshot(tmp_path)
    job = module.submit(stage(module, out), launcher, snapshot, after=["813", "814"])
    script = tmp_path / "run" / "slurm" / "student.sbatch"
    assert job == "815"
    wanted = ["--parsable", "--dependency=afterok:813:814", "--kill-on-invalid-dep=yes", "--qos=high", str(script)]
    assert arguments(stubs) == wanted
    assert script.read_text() == stage(module, out).script(launcher, snapshot.path)
    assert (out / "slurm").is_dir(), "Slurm drops the log where its folder is missing"


def test_site_settings_reach_sbatch_and_what_the_pipeline_decides_stays(
    stubs: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = module.Snapshot(tmp_path)
    monkeypatch.setattr(snapshot, "path", tmp_path / "code")
    (tmp_path / "code" / "slurm").mkdir(parents=True)
    site = "echo loading modules\nexport SBATCH_PARTITION='gpu long' SBATCH_JOB_NAME=mine SBATCH_OUTPUT=/dev/null\n"
    (tmp_path / "code" / "slurm" / "site.sh").write_text(site)
    assert module.submit(stage(module, tmp_path / "a"), module.LauncherConfig(kind="slurm"), snapshot) == "815"
    environment = dict(line.partition("=")[::2] for line in (stubs / "environment").read_text().splitlines())
    assert environment["SBATCH_PARTITION"] == "gpu long"
    assert not {"SBATCH_JOB_NAME", "SBATCH_OUTPUT"} & environment.keys()


def test_a_submission_from_inside_another_job_is_as_one_from_outside(
    stubs: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what says which Slurm is asked goes on; sbatch would obey the rest, or pass it to the job."""
    told = "SLURM_MEM_PER_CPU SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT SLURM_JOB_ID SLURM_EXPORT_ENV SBATCH_EXPORT"
    told += " SBATCH_GET_USER_ENV SBATCH_SIGNAL SBATCH_WAIT SBATCH_TIMELIMIT SBATCH_GPUS SBATCH_CONTAINER"
    kept = "SLURM_CONF SLURM_CLUSTERS SLURM_JWT SBATCH_ACCOUNT"
    for name in (told + " " + kept).split():
        monkeypatch.setenv(name, "7")
    snapshot = module.Snapshot(tmp_path)
    monkeypatch.setattr(snapshot, "path", tmp_path / "code")
    (tmp_path / "code" / "slurm").mkdir(parents=True)
    (tmp_path / "code" / "slurm" / "site.sh").write_text("export SLURM_HINT=nomultithread SBATCH_GPUS_PER_NODE=1\n")
    assert module.submit(stage(module, tmp_path / "a"), module.LauncherConfig(kind="slurm"), snapshot) == "815"
    names = {line.partition("=")[0] for line in (stubs / "environment").read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SBATCH_"))} == set(kept.split())


def test_nothing_about_any_site_is_on_by_default() -> None:
    lines = (REPOSITORY / "slurm" / "site.sh").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == []


def test_a_stage_in_the_queue_is_not_submitted_again(stubs: Path, module: ModuleType, tmp_path: Path) -> None:
    (stubs / "queue").write_text(f"77|/elsewhere\n78|{tmp_path}/work\n")
    made = stage(module, tmp_path / "work")
    assert module.submit(made, module.LauncherConfig(kind="slurm"), module.Snapshot(tmp_path)) == "78"
    assert not (stubs / "sbatch.args").exists()


def test_nothing_is_submitted_while_slurm_does_not_say_what_it_has(
    stubs: Path, module: ModuleType, tmp_path: Path
) -> None:
    (stubs / "squeue-fails").touch()
    with pytest.raises(ValueError, match="squeue does not say whether stage work is in the queue: Unable to contact"):
        module.submit(stage(module, tmp_path / "work"), module.LauncherConfig(kind="slurm"), module.Snapshot(tmp_path))
    assert not (stubs / "sbatch.args").exists()


def test_a_refusal_of_sbatch_is_the_users_error(stubs: Path, module: ModuleType, tmp_path: Path) -> None:
    made, launcher, snapshot = (
        stage(module, tmp_path / "work"),
        module.LauncherConfig(kind="slurm"),
        module.Snapshot(tmp_path),
    )
    (stubs / "refuse").touch()
    with pytest.raises(ValueError, match="sbatch refused the job: sbatch: error: invalid partition"):
        module.submit(made, launcher, snapshot)


@pytest.mark.parametrize("command", ["squeue", "sbatch"])
def test_a_machine_without_slurm_says_so(
    stubs: Path, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (stubs / command).unlink()
    for name in ("bash",):
        (stubs / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(stubs))
    if command == "sbatch":
        (stubs / "squeue").write_text("#!/bin/bash\n")
    with pytest.raises(ValueError, match=r"launcher=slurm needs (squeue and )?sbatch"):
        module.submit(stage(module, tmp_path / "work"), module.LauncherConfig(kind="slurm"), module.Snapshot(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "a b"}, "name of a job"),
        ({"name": "a\n#SBATCH --x"}, "name of a job"),
        ({"name": "x" * 65}, "name of a job"),
        ({"points": {"../up": []}}, "name of a job"),
        ({"out": Path("100%j")}, "out must hold"),
        ({"out": Path("a\n#SBATCH --x")}, "out must hold"),
        ({"out": Path("$(touch pwned)")}, "out must hold"),
        ({"out": Path("it's")}, "out must hold"),
        ({"out": Path("/scratch/müller/run")}, "out must hold the letters A-Z a-z, .*müller"),
        ({"out": Path("/scratch/實驗")}, "out must hold the letters A-Z a-z"),
        ({"recipe": "_slurm"}, "recipe"),
        ({"recipe": "../x"}, "recipe"),
        ({"overrides": ["a=\0"]}, "no zero byte"),
    ],
)
def test_what_slurm_must_not_get_is_refused(module: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.BatchStage(**{"name": "ok", "recipe": "prune", "overrides": [], "out": OUT, **wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"time": "soon"}, "launcher.time"),
        ({"nodes": 0}, "launcher.nodes"),
        ({"gpus_per_node": -1}, "launcher.gpus_per_node"),
        ({"at_a_time": -1}, "launcher.at_a_time"),
        ({"options": ["gpu"]}, "launcher.options"),
        ({"options": ["--wrap=rm"]}, "launcher.options"),
        ({"options": ["--comment=a\n#SBATCH --x"]}, "launcher.options"),
        ({"options": ["--qos=high", "--nodes=3"]}, r"must not hold --nodes, got '--nodes=3': launcher\.nodes"),
        ({"options": ["--gpus-per-node=4"]}, r"launcher\.gpus_per_node"),
        ({"options": ["--time=60"]}, r"launcher\.time"),
        ({"options": ["--array=0-3"]}, r"launcher\.at_a_time"),
        ({"options": ["--test-only"]}, r"launcher\.dry_run"),
        ({"options": ["--depend=afterok:1"]}, r"must not hold --dependency, .*stages\.NAME\.after"),
        ({"options": ["--wai"]}, "must not hold --wait"),
        ({"options": ["--no"]}, "must not hold --no"),
        ({"options": ["--cluster=other"]}, "SLURM_CLUSTERS"),
        ({"options": ["--signal=USR1@900"]}, "to the batch shell only"),
        ({"options": ["--sig=B:KILL@9"]}, "to the batch shell only"),
    ],
)
def test_settings_of_the_launcher_have_limits(module: ModuleType, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.LauncherConfig(**wrong)


def test_no_option_undoes_what_the_pipeline_decides(module: ModuleType) -> None:
    for name in module.REFUSED:
        for option in (f"--{name}", f"--{name}=x", f"--{name[:-1]}"):
            with pytest.raises(ValueError, match=rf"must not hold --[a-z-]+, got '{option}': \S"):
                module.LauncherConfig(options=[option])


def test_options_that_only_a_site_or_a_queue_cares_for_are_passed_on(module: ModuleType) -> None:
    """Also those that begin as a refused one does, or the other way round."""
    options = ["--signal=B:USR1@900", "--partition=gpu", "--nodelist=n[1-4]", "--nice=100", "--mem=900G", "--hold"]
    options += ["--exclude=n7", "--wckey=mine", "--time-min=60", "--requeue", "--gres=gpu:h100:8", "--cpus-per-gpu=12"]
    assert module.LauncherConfig(options=options).options == options


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_launcher_files_hold_settings_of_the_launcher(name: str, module: ModuleType) -> None:
    values = yaml.safe_load((REPOSITORY / "configs" / "launcher" / f"{name}.yaml").read_text())
    assert module.LauncherConfig(**values).kind == name


@pytest.mark.parametrize(
    ("recipe_name", "processes", "gpus", "expected"),
    [
        ("distill", 1, 8, (4, 8, 8)),
        ("cache", 2, 8, (4, 8, 8)),
        ("evaluate", 2, 8, (1, 2, 2)),
        ("sample", 8, 8, (1, 8, 8)),
        ("assess", 8, 2, (1, 2, 2)),
        ("prune", 1, 8, (1, 1, 1)),
        ("prune", 3, 0, (1, 3, 0)),
        ("average", 8, 8, (1, 1, 1)),
        ("report", 8, 0, (1, 1, 0)),
    ],
)
def test_a_stage_takes_what_its_recipe_can_use(
    module: ModuleType, recipe_name: str, processes: int, gpus: int, expected: tuple[int, int, int]
) -> None:
    """Whole nodes for training, as many GPUs as processes where these share the work of a node, one otherwise."""
    launcher = module.LauncherConfig(kind="slurm", nodes=4, gpus_per_node=gpus)
    made = stage(module, OUT, name="x", recipe=recipe_name, processes=processes)
    takes = made.layout(launcher)
    assert (takes.nodes, takes.processes_per_node, takes.gpus_per_node) == expected
    assert takes.processes == expected[0] * expected[1]
    script = made.script(launcher, OUT)
    assert f"export LLAMITA_PROCESSES_PER_NODE={expected[1]}\n" in script, "an exclusive job sees all GPUs of its node"
    assert (f"#SBATCH --gpus-per-node={expected[2]}\n" in script) == (gpus > 0)


def test_the_script_and_the_submitter_agree_on_who_runs_on_many_nodes_and_who_shares_one(module: ModuleType) -> None:
    script = (REPOSITORY / "slurm" / "run.sbatch").read_text()
    for first, recipes in (("distill |", module.DISTRIBUTED), ("sample |", module.SHARING)):
        line = next(line for line in script.splitlines() if line.strip().startswith(first))
        assert {name.strip(" );") for name in line.split("|")} == recipes


def test_recipes_that_can_share_their_work_are_those_that_ask_who_else_runs(module: ModuleType) -> None:
    """What a recipe and the modules of recipes that it imports ask; a new one must be put into a class."""
    folder = REPOSITORY / "recipes"

    def text(name: str, seen: set[str]) -> str:
        seen.add(name)
        own = (folder / f"{name}.py").read_text()
        parts = [
            part for part in re.findall(r"^(?:from|import) (_\w+)", own, re.M) if (folder / f"{part}.py").is_file()
        ]
        return own + "".join(text(part, seen) for part in parts if part not in seen)

    # A plan only names the others, and a search starts processes of its own.
    names = {file.stem for file in folder.glob("[a-z]*.py")} - {"plan", "search"}
    asks = re.compile("PartialState|WORLD_SIZE|Accelerator")
    able = {name for name in names if asks.search(text(name, set()))}
    assert able == module.DISTRIBUTED | module.SHARING


def test_a_snapshot_is_the_code_named_by_its_content_and_wins_over_what_is_installed(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "repository"
    for name in module.CODE[:-1]:
        shutil.copytree(REPOSITORY / name, root / name, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    monkeypatch.setattr(module, "ROOT", root)
    first = module.Snapshot(tmp_path / "run")
    (tmp_path / "run").mkdir()
    first.write()
    first.write()
    assert (first.path / "recipes" / "pipeline.py").is_file()
    assert not list(first.path.rglob("__pycache__"))
    assert not (first.path / "tests").exists()
    (root / "src" / "__pycache__").mkdir(exist_ok=True)
    (root / "src" / "__pycache__" / "x.pyc").touch()
    assert module.Snapshot(tmp_path / "run").path == first.path
    with (root / "src" / "runs.py").open("a") as file:
        file.write("# edited\n")
    second = module.Snapshot(tmp_path / "run")
    second.write()
    assert second.path != first.path
    assert not (first.path / "src" / "runs.py").read_text().endswith("# edited\n")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name[0] == "."] == []
    code = "import llamita.runs; print(llamita.runs.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(first.path / "typings")},
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()).resolve() == (first.path / "src" / "runs.py").resolve()


def test_whatever_of_the_repository_a_recipe_reads_is_in_a_snapshot(module: ModuleType, tmp_path: Path) -> None:
    """Recipes look beside their own folder: what is missing there is missing on Slurm only."""
    files = [*(REPOSITORY / "recipes").glob("*.py"), *(REPOSITORY / "src").rglob("*.py")]
    named = {name for file in files for name in re.findall(r'(?:\.parent\.parent|ROOT) / "([^"]+)"', file.read_text())}
    assert named >= {"tasks", "configs", "recipes"}
    snapshot = module.Snapshot(tmp_path)
    snapshot.write()
    for name in named:
        found, wanted = (
            {str(file.relative_to(root)) for file in (root / name).rglob("*") if "__pycache__" not in file.parts}
            for root in (snapshot.path, REPOSITORY)
        )
        assert found == wanted, name


def test_a_dry_run_tells_of_a_key_too(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = sys.modules["recipe_pipeline"]
    root = small_repository(module, tmp_path / "repository", monkeypatch)
    (root / "slurm" / "site.sh").write_text("export WANDB_API_KEY=0123abcd\n")
    config = pipeline.Pipeline(
        stages={"report": pipeline.Stage(recipe="report")},
        launcher=module.LauncherConfig(kind=module.Launcher.slurm, dry_run=True),
        out=tmp_path / "run",
    )
    with pytest.raises(ValueError, match="line 1 sets WANDB_API_KEY"):
        pipeline.run(config)
    assert capsys.readouterr().out == ""


def small_repository(module: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("slurm", "configs"):
        shutil.copytree(REPOSITORY / name, root / name)
    monkeypatch.setattr(module, "ROOT", root)
    return root


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("slurm/site.sh", "export WANDB_API_KEY=0123abcd", "sets WANDB_API_KEY"),
        ("slurm/site.sh", "export A=1 HF_TOKEN='something'", "sets HF_TOKEN"),
        ("slurm/site.sh", "export MLFLOW_TRACKING_PASSWORD=$'some\\tthing'", "sets MLFLOW_TRACKING_PASSWORD"),
        ("slurm/site.sh", "# export KEY=hf_" + "a" * 20, "holds a Hugging Face token"),
        ("slurm/other.sh", "AWS_SECRET_ACCESS_KEY=abc", "sets AWS_SECRET_ACCESS_KEY"),
        ("configs/mine.yaml", "  note: " + "0123456789" * 4, "holds a wandb key"),
        ("configs/mine.yaml", '  "WANDB_API_KEY": abc', "sets WANDB_API_KEY"),
    ],
)
def test_a_key_in_a_file_that_would_be_copied_is_refused_before_anything_is_written(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, line: str, told: str
) -> None:
    root = small_repository(module, tmp_path / "repository", monkeypatch)
    with (root / file).open("a") as opened:
        opened.write("\n" + line + "\n")
    number = (root / file).read_text().splitlines().index(line) + 1
    with pytest.raises(ValueError, match=rf"^{file}: line {number} {told}; the code is copied") as caught:
        module.Snapshot(tmp_path / "run").write()
    assert not any(secret in str(caught.value) for secret in ("0123", "something", "aaaa", "abc"))
    assert not (tmp_path / "run").exists()


def test_a_file_may_say_where_a_key_is_and_none_of_the_repository_holds_one(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.Snapshot(tmp_path).check()
    root = small_repository(module, tmp_path / "repository", monkeypatch)
    lines = ["export WANDB_API_KEY=$(cat ~/.key)", 'export HF_TOKEN="$MINE"', "# export WANDB_API_KEY=...", "HF_TOKEN="]
    lines += ["export HF_TOKEN_PATH=~/.token", "unset HF_TOKEN", "max_new_tokens=7", "export HF_TOKEN=`cat token`"]
    lines += [": ${HF_TOKEN:?is not set}", '[ "$HF_TOKEN" = x ]']
    (root / "slurm" / "site.sh").write_text("\n".join(lines))
    (root / "configs" / "mine.yaml").write_text("shard_tokens: 1024\neos_token: end\n")
    module.Snapshot(tmp_path).check()


def test_a_copy_that_failed_half_way_leaves_no_snapshot(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, count = module.shutil.copy2, []

    def full(*words: Any, **options: Any) -> None:
        count.append(words)
        if len(count) > 5:
            raise OSError(28, "No space left on device")
        copy(*words, **options)

    monkeypatch.setattr(module.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        module.Snapshot(tmp_path).write()
    assert list(tmp_path.iterdir()) == []
