"""Hand the stages of a pipeline to Slurm: a snapshot of the code, a batch script for each stage, and its submission."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from llamita import redaction, storage

ROOT = Path(__file__).resolve().parent.parent
CODE = ("recipes", "src", "configs", "slurm", "tasks", "typings", "pyproject.toml")
"""What a job runs from: all of the repository that is code or settings, or that a recipe reads by default."""

DISTRIBUTED = frozenset({"distill", "cache", "sft", "reward", "dpo", "rl"})
"""Recipes that take all nodes, with one process per GPU."""
SHARING = frozenset({"sample", "assess", "evaluate", "prune"})
"""Recipes whose processes share the work on one node; every recipe that is in neither is one process."""

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
TIME = re.compile(r"(\d{1,3}-)?\d{1,3}(:\d{2}){0,2}", re.ASCII)
JOB = re.compile(r"\d+", re.ASCII)
# Hydra reads the folder as an override of the job, and refuses letters outside ASCII there.
FOLDER = re.compile(r"[\w./+@ -]+", re.ASCII)

SUBMIT = """
root=$1; shift
[ -r "$root/slurm/site.sh" ] && . "$root/slurm/site.sh" >&2
# sbatch lets these overrule its script, which says what the pipeline needs.
unset SBATCH_JOB_NAME SBATCH_COMMENT SBATCH_OUTPUT SBATCH_ERROR SBATCH_OPEN_MODE SBATCH_ARRAY_INX SBATCH_NO_REQUEUE
unset SBATCH_EXPORT SBATCH_GET_USER_ENV SBATCH_SIGNAL SBATCH_TIMELIMIT SBATCH_WAIT SBATCH_WAIT_ALL_NODES
unset SBATCH_GPUS SBATCH_GPUS_PER_NODE SBATCH_GPUS_PER_TASK SBATCH_CONTAINER
# From inside another job its whole state would reach this one, such as SLURM_MEM_PER_CPU, SLURM_ARRAY_TASK_ID and
# SLURM_RESTART_COUNT. What stays says which Slurm is asked, and by whom.
for name in $(compgen -v SLURM_); do
    case $name in SLURM_CONF | SLURM_CLUSTERS | SLURM_JWT) ;; *) unset "$name" ;; esac
done
exec sbatch "$@"
"""
_AFTER = "stages.NAME.after says what a job waits for"
_TASKS = "every node runs one launcher, and stages.NAME.processes says of how many processes"
_GPUS = "launcher.gpus_per_node says how many, and --constraint or --gres of which kind"
_LOG = "a stage's output is in its slurm/ folder"
_SHELL = "what a job's environment needs belongs into slurm/site.sh"
_AGAIN = "a job starts again by itself; LLAMITA_MAX_RESTARTS=0 in slurm/site.sh forbids it"
REFUSED = {
    "array": "stages.NAME.sweep, stages.NAME.workers and launcher.at_a_time make arrays",
    "chdir": "relative paths of a stage mean the folder that the pipeline is submitted from",
    "clusters": "squeue must ask the same one: export SLURM_CLUSTERS instead",
    "comment": "the pipeline finds its jobs in the queue by theirs; --wckey holds a note of yours",
    "container": "srun starts it inside the job: srun_arguments in slurm/site.sh",
    "dependency": _AFTER,
    "error": _LOG,
    "export": _SHELL,
    "export-file": _SHELL,
    "get-user-env": _SHELL,
    "gpus": _GPUS,
    "gpus-per-node": _GPUS,
    "gpus-per-socket": _GPUS,
    "gpus-per-task": _GPUS,
    "job-name": "a job has the name of its stage",
    "kill-on-invalid-dep": _AFTER,
    "no-requeue": _AGAIN,
    "nodes": "launcher.nodes says how many",
    "ntasks": _TASKS,
    "ntasks-per-core": _TASKS,
    "ntasks-per-gpu": _TASKS,
    "ntasks-per-node": _TASKS,
    "ntasks-per-socket": _TASKS,
    "open-mode": "the log of a job that starts again is appended to",
    "output": _LOG,
    "parsable": "the pipeline asks for it itself",
    "test-only": "launcher.dry_run=true submits nothing",
    "time": "launcher.time says how long",
    "wait": "the pipeline ends when all its jobs are submitted; squeue --me shows them",
    "wait-all-nodes": "a stage starts when all its nodes are up",
    "wrap": "a stage is a recipe of recipes/",
}
"""Options of sbatch, also abbreviated, that would undo what a pipeline relies on, and what to use instead."""


class Launcher(StrEnum):
    """Where a pipeline's stages run."""

    local = "local"
    """One after the other, in processes of this machine."""
    slurm = "slurm"
    """As Slurm jobs, each depending on the one before."""


@dataclass(kw_only=True)
class LauncherConfig:
    """How a pipeline's stages are started."""

    kind: Launcher = Launcher.local
    nodes: int = 1
    """Nodes of a stage that trains, or of ``cache``; every other stage takes one."""
    gpus_per_node: int = 0
    """GPUs of each node, one per process. A stage that does not train takes as many of them as it has processes."""
    time: str = "24:00:00"
    """Limit of one start, in Slurm's form days-hours:minutes:seconds. A stage that needs longer is started again."""
    at_a_time: int = 0
    """Points of a sweep, or workers, that run at the same time; 0: as many as Slurm has room for."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, one argument each, such as --partition=gpu; they overrule slurm/site.sh."""
    dry_run: bool = False
    """Print the scripts and the commands, and submit nothing."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what Slurm must not get."""
        if self.nodes < 1:
            raise ValueError(f"launcher.nodes must be at least 1, got {self.nodes}")
        for name in ("gpus_per_node", "at_a_time"):
            if getattr(self, name) < 0:
                raise ValueError(f"launcher.{name} must be at least 0, got {getattr(self, name)}")
        if not TIME.fullmatch(self.time):
            raise ValueError(f"launcher.time must be like 24:00:00 or 2-12:00:00, got {self.time!r}")
        for option in self.options:
            _check_option(option)


def _check_option(option: str) -> None:
    """Raise ``ValueError`` for what is no option of sbatch, or one that the pipeline decides."""
    if not re.fullmatch(r"--[a-z][a-z0-9-]*(=[^\x00-\x1f\x7f]*)?", option):
        raise ValueError(f"launcher.options must be long options of sbatch such as --partition=gpu, got {option!r}")
    name, _, value = option.removeprefix("--").partition("=")
    # sbatch takes any beginning of a name that only one has; none of the other options begins one of these.
    if meant := next((refused for refused in REFUSED if refused.startswith(name)), None):
        raise ValueError(f"launcher.options must not hold --{meant}, got {option!r}: {REFUSED[meant]}")
    if "signal".startswith(name) and not re.fullmatch(r"B:(SIG)?(USR1|TERM)(@[0-9]+)?", value):
        raise ValueError(
            f"launcher.options must send a signal to the batch shell only, as --signal=B:USR1@900 does, got {option!r}"
        )


@dataclass(frozen=True)
class Layout:
    """What a stage takes of Slurm; each of its nodes is the same."""

    nodes: int
    processes_per_node: int
    gpus_per_node: int

    @property
    def processes(self) -> int:
        """Over all nodes."""
        return self.nodes * self.processes_per_node


def layout(recipe: str, processes: int, launcher: LauncherConfig) -> Layout:
    """Where a stage runs that has ``processes`` on one machine."""
    gpus = launcher.gpus_per_node
    if recipe in DISTRIBUTED:
        if gpus:
            return Layout(launcher.nodes, gpus, gpus)
        nodes = max(n for n in range(1, launcher.nodes + 1) if processes % n == 0)
        return Layout(nodes, processes // nodes, 0)
    each = processes if recipe in SHARING else 1
    return Layout(1, min(each, gpus), min(each, gpus)) if gpus else Layout(1, each, 0)


@dataclass(frozen=True, kw_only=True)
class BatchStage:
    """One stage as one job, or as an array of them."""

    name: str
    recipe: str
    overrides: Sequence[str]
    """``out`` apart."""
    out: Path
    """The run directory; of a sweep the folder of its points'."""
    processes: int = 1
    """On one machine; :func:`layout` says what Slurm makes of it."""
    workers: int = 1
    """Jobs that share the stage's directory."""
    points: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Overrides of each point of a sweep, by its folder."""
    left: Sequence[int] = (0,)
    """Which points are not finished."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what Slurm, or the shell, must not get."""
        if not (ROOT / "recipes" / f"{self.recipe}.py").is_file() or not re.fullmatch(r"[a-z][a-z_]*", self.recipe):
            raise ValueError(f"recipe must be the name of a file in recipes/, got {self.recipe!r}")
        for name in (self.name, *self.points):
            if not NAME.fullmatch(name):
                raise ValueError(f"name of a job must be 1 to 64 characters of A-Z a-z 0-9 . _ -, got {name!r}")
        if not FOLDER.fullmatch(str(self.out)):
            raise ValueError(
                f"out must hold the letters A-Z a-z, digits, spaces and . _ - + @ / only, got {str(self.out)!r}"
            )
        if any("\0" in word for word in self._words()):
            raise ValueError(f"stages.{self.name}: an override must hold no zero byte")

    def _words(self) -> list[str]:
        return [*self.overrides, *(word for words in self.points.values() for word in words)]

    def layout(self, launcher: LauncherConfig) -> Layout:
        """What the stage takes."""
        return layout(self.recipe, self.processes, launcher)

    def array(self, launcher: LauncherConfig) -> str | None:
        """Indices of the array's jobs, and how many run at a time."""
        if not self.points and self.workers == 1:
            return None
        indices = ",".join(map(str, self.left)) if self.points else f"0-{self.workers - 1}"
        return indices + (f"%{launcher.at_a_time}" if launcher.at_a_time else "")

    def options(self, launcher: LauncherConfig) -> list[str]:
        """What stands behind ``#SBATCH``."""
        takes = self.layout(launcher)
        array = self.array(launcher)
        return [
            f"--job-name={self.name}",
            f"--comment={self.out}",
            f"--chdir={Path.cwd()}",
            f"--output={self.out}/slurm/{'%x-%A_%a' if array else '%x-%j'}.out",
            "--open-mode=append",
            f"--nodes={takes.nodes}",
            "--ntasks-per-node=1",
            *([f"--gpus-per-node={takes.gpus_per_node}"] if takes.gpus_per_node else []),
            "--exclusive",
            "--mem=0",
            "--wait-all-nodes=1",
            f"--time={launcher.time}",
            "--signal=B:USR1@300",
            "--requeue",
            *([f"--array={array}"] if array else []),
            *launcher.options,
        ]

    def script(self, launcher: LauncherConfig, code: Path) -> str:
        """The batch script, which runs the code in ``code``."""
        lines = [
            "#!/bin/bash",
            f"# Stage {self.name}, written by recipes/pipeline.py. docs/slurm.md explains every line.",
            *(f"#SBATCH {directive(option)}" for option in self.options(launcher)),
            "",
            f"export LLAMITA_ROOT={quoted(str(code))}",
            f"export LLAMITA_PYTHON={quoted(sys.executable)}",
            # Not left to SLURM_GPUS_ON_NODE: an exclusive job is given every GPU of its node, however few it asked for.
            f"export LLAMITA_PROCESSES_PER_NODE={self.layout(launcher).processes_per_node}",
        ]
        if self.points:
            lines.append('case "$SLURM_ARRAY_TASK_ID" in')
            for index, (name, words) in enumerate(self.points.items()):
                folder = self.out / name
                lines.append(f"    {index})")
                lines.append(f"        export LLAMITA_OUT={quoted(str(folder))}")
                lines.append("        point=(")
                lines += [f"            {quoted(word)}" for word in [*words, f"out={folder}"]]
                lines.append("        ) ;;")
            lines.append('    *) echo "there is no point $SLURM_ARRAY_TASK_ID" >&2; exit 64 ;;')
            lines.append("esac")
            lines.append("# A run of its own, not one of several workers that share a directory.")
            lines.append('export LLAMITA_TASK="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"')
            lines.append("unset SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT")
            own = ['"${point[@]}"']
        else:
            lines.append(f"export LLAMITA_OUT={quoted(str(self.out))}")
            own = [quoted(f"out={self.out}")]
        call = ['exec bash "$LLAMITA_ROOT/slurm/run.sbatch" ' + self.recipe, *map(quoted, self.overrides), *own]
        return "\n".join(lines) + "\n" + " \\\n    ".join(call) + "\n"


def quoted(word: str) -> str:
    """A word for bash, on one line whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(
        {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\t": "\\t"}.get(c)
        or (c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in c.encode()))
        for c in word
    )
    return f"$'{escaped}'"


def directive(option: str) -> str:
    """An option as sbatch reads it from a script, where a backslash keeps a quote but no space."""
    name, is_given, value = option.partition("=")
    if re.fullmatch(r"[\w./:@%,+=&-]*", value):
        return option
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{is_given}"{escaped}"'


class Snapshot:
    """The code as it is now, in a folder of the pipeline that is named by its content.

    A job that waits, or is started again, runs what was there when it was submitted, whatever is edited meanwhile.
    """

    def __init__(self, out: Path) -> None:
        self._out = out

    @functools.cached_property
    def path(self) -> Path:
        """Where it lies; the same for the same code."""
        digest = hashlib.sha256()
        for file in _code():
            content = os.readlink(file).encode() if file.is_symlink() else file.read_bytes()
            digest.update(f"{file.relative_to(ROOT)}\0{len(content)}\0".encode() + content)
        return self._out / f"code-{digest.hexdigest()[:12]}"

    def check(self) -> None:
        """Raise ``ValueError`` where a file that people edit for their site holds a key: it would be copied."""
        edited = [file for file in _code() if file.relative_to(ROOT).parts[0] in ("configs", "slurm")]
        found = [
            f"{file.relative_to(ROOT)}: {secret}"
            for file in edited
            if file.is_file()
            for secret in redaction.secrets_in_lines(file.read_text(encoding="utf-8", errors="replace"))
        ]
        if found:
            raise ValueError(
                f"{'; '.join(found)}; the code is copied into {self._out}: keys belong into the environment that "
                "submits, which jobs inherit, or into the tool's own login file"
            )

    def write(self) -> None:
        """Copy the code, unless it is there already.

        Raises:
            ValueError: as :meth:`check`, before anything is written.
        """
        self.check()
        if self.path.is_dir():
            return
        temporary = self._out / f".code-{secrets.token_hex(4)}"
        try:
            for file in _code():
                target = temporary / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target, follow_symlinks=False)
                if not target.is_symlink():
                    storage.fsync(target)
            temporary.rename(self.path)
            storage.fsync(self._out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _code() -> list[Path]:
    """Files of the code in order; the link ``typings/llamita`` as it is."""
    found = []
    for name in CODE:
        for folder, folders, files in os.walk(ROOT / name):
            folders[:] = [each for each in folders if each != "__pycache__" and each[0] != "."]
            links = [each for each in folders if Path(folder, each).is_symlink()]
            found += [Path(folder, each) for each in [*files, *links] if each[0] != "."]
        if (ROOT / name).is_file():
            found.append(ROOT / name)
    return sorted(found)


def submit(stage: BatchStage, launcher: LauncherConfig, snapshot: Snapshot, *, after: Sequence[str] = ()) -> str:
    """Write the stage's batch script, submit it and return the job's number.

    The job starts when the jobs ``after`` have ended with 0, and is cancelled when that cannot happen any more. A stage
    that is already queued or running in the same directory is not submitted a second time. A dry run prints what would
    be written and called, and the number is none.

    Raises:
        ValueError: sbatch refused, or is not here.
    """
    if wrong := [job for job in after if not JOB.fullmatch(job) and not launcher.dry_run]:
        raise ValueError(f"after must hold numbers of jobs, got {wrong}")
    file = stage.out.parent / "slurm" / f"{stage.name}.sbatch"
    arguments = [
        "--parsable",
        *([f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []),
        *launcher.options,
        str(file),
    ]
    text = stage.script(launcher, snapshot.path)
    if launcher.dry_run:
        print(f"# {file}\n{text}\n{shlex.join(['sbatch', *arguments])}\n")
        return f"<{stage.name}>"
    if job := queued(stage.name, stage.out):
        return job
    (stage.out / "slurm").mkdir(parents=True, exist_ok=True)  # Slurm drops the log, in silence, without its folder
    (stage.out / "control" / "stop").unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    storage.write_atomically(file, text)
    return _sbatch(snapshot.path, arguments)


def queued(name: str, out: Path) -> str | None:
    """The job of that name and directory that Slurm still has, if any: a second submission is a second owner.

    Raises:
        ValueError: Slurm does not say.
    """
    query = ["squeue", "--me", "--noheader", f"--name={name}", "--format=%F|%k"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except FileNotFoundError as error:
        raise ValueError("launcher=slurm needs squeue and sbatch on this machine; there are none") from error
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or error
        raise ValueError(f"squeue does not say whether stage {name} is in the queue: {said}") from error
    for line in answer.splitlines():
        job, _, comment = line.strip().partition("|")
        if comment == str(out) and JOB.fullmatch(job):
            return job
    return None


def _sbatch(code: Path, arguments: Sequence[str]) -> str:
    command = ["bash", "-c", SUBMIT, "submit", str(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    job = done.stdout.strip().partition(";")[0]
    if done.returncode == 127:
        raise ValueError("launcher=slurm needs sbatch on this machine; there is none")
    if done.returncode or not JOB.fullmatch(job):
        raise ValueError(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    return job
