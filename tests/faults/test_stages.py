"""The other stages: pruning, capture and submission are killed, and end in the same bytes without a second job."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import starts
from cases import Case

from llamita import runs

Made = Callable[..., Case]
Note = Callable[..., None]
PRUNE = (
    "target.num_hidden_layers=1",
    "target.hidden_size=8",
    "target.intermediate_size=16",
    "scores.mlp=norm_product",
    "scores.attention=norm_product",
    "scores.hidden=activation",
    "scores.layers=block_influence",
    "compensation.attention_steps=2",
    "compensation.layer_steps=2",
    "compensation.head_steps=2",
    "compensation.tied_steps=2",
)
POINTS = [
    *[f"mid_write:{number}" for number in (1, 2, 3, 4)],
    "after_scores:1",
    "after_model_shard:1",
    "before_rename:1",
    "mid_rename:1",
    "mid_rename:2",
    "before_done:1",
    "after_done:1",
]


@pytest.fixture(scope="module")
def model(zygote: starts.Zygote, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to prune, and a teacher to capture."""
    made = Case(zygote, tmp_path_factory.mktemp("model") / "model", data, 2)
    made.ends(0)
    return made.out


def results(out: Path) -> dict[str, str]:
    """Hashes of what a stage published, by name, but for what tells times and places."""
    done = runs.check_done(out)["files"]
    return {name: entry["sha256"] for name, entry in done.items() if Path(name).suffix in (".safetensors", ".bin")}


def prune(model: Path, data: Path, out: Path) -> list[str]:
    calibration = (f"calibration.path={data}", "calibration.tokens=512", "calibration.batch_rows=2")
    return [f"model.path={model}", *calibration, *PRUNE, f"out={out}"]


def test_f25_pruning_killed_at_every_point_of_writing_ends_in_the_same_model(
    zygote: starts.Zygote, model: Path, data: Path, tmp_path: Path, note: Note
) -> None:
    """The same plan, the same scores, the same weights; no part of a model under its final name is taken for one."""
    assert zygote.run("prune", *prune(model, data, tmp_path / "whole")).codes == {0: 0}
    for point in POINTS:
        start = zygote.run("prune", *prune(model, data, tmp_path / "run"), crash_at=point)
        assert start.codes == {0: -signal.SIGKILL}, f"{point}: {start.output()}"
        config = tmp_path / "run" / "config.json"
        assert not config.exists() or (tmp_path / "run" / "model.safetensors").exists(), "a model before its weights"
    assert zygote.run("prune", *prune(model, data, tmp_path / "run")).codes == {0: 0}
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "run").rglob(".*")] == []
    note(f"{len(POINTS)} kills of prune; the same plan, scores and weights")


def test_f25_pruning_killed_at_random_times_ends_in_the_same_model(
    zygote: starts.Zygote, model: Path, data: Path, tmp_path: Path, note: Note
) -> None:
    """In scoring, in compensation, wherever it is."""
    began = time.monotonic()
    assert zygote.run("prune", *prune(model, data, tmp_path / "whole")).codes == {0: 0}
    seconds, dice, kills = time.monotonic() - began, random.Random(1), 0
    for _ in range(8):
        start = zygote.start("prune", *prune(model, data, tmp_path / "run"))
        time.sleep(dice.uniform(0.3, 0.9) * seconds)
        start.kill()
        kills += start.wait() == [-signal.SIGKILL]
    assert kills, "every start came to its end before it was killed"
    assert zygote.run("prune", *prune(model, data, tmp_path / "run")).codes == {0: 0}
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    note(f"{kills} kills of prune at random times; the same bytes")


def test_f25_capture_killed_at_every_point_of_a_shard_ends_in_the_same_cache(
    zygote: starts.Zygote, model: Path, data: Path, tmp_path: Path, note: Note
) -> None:
    """Shards that are whole stay; the one at hand is made again."""
    told = [f"teacher.path={model}", f"data.path={data}", "samples_per_token=8", "shard_tokens=4096"]
    assert zygote.run("cache", *told, f"out={tmp_path / 'whole'}").codes == {0: 0}
    points = ["before_tmp:1", "mid_shard:1", "after_shards:1", "before_manifest:1", "before_rename:1", "after_rename:1"]
    for point in [*points, "mid_write:3", "before_done:1"]:
        start = zygote.run("cache", *told, f"out={tmp_path / 'run'}", crash_at=point)
        assert start.codes == {0: -signal.SIGKILL}, f"{point}: {start.output()}"
    assert zygote.run("cache", *told, f"out={tmp_path / 'run'}").codes == {0: 0}
    shards = [sorted(p.relative_to(out) for p in out.rglob("*.bin")) for out in (tmp_path / "run", tmp_path / "whole")]
    assert shards[0] == shards[1]
    for name in shards[0]:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    note(f"{len(points) + 2} kills of cache; the same shards")


SBATCH = """#!/bin/bash
directive() { sed -n "s/^#SBATCH --$1=\\"\\{0,1\\}\\([^\\"]*\\)\\"\\{0,1\\}$/\\1/p" "$2"; }
name=$(directive job-name "${!#}")
comment=$(directive comment "${!#}")
number=$((100 + $(wc -l < "$STUBS/queue")))
echo "$name $number|$comment" >> "$STUBS/queue"
[ "$name" = "$KILL_AT" ] && kill -9 "$PPID"
echo "$number"
"""
SQUEUE = """#!/bin/bash
for argument; do case $argument in --name=*) name=${argument#*=} ;; esac; done
sed -n "s/^$name //p" "$STUBS/queue"
"""


@pytest.mark.parametrize("stage", ["first", "second"])
def test_f25_a_pipeline_killed_while_it_submits_submits_no_job_twice(
    stage: str, zygote: starts.Zygote, tmp_path: Path, note: Note
) -> None:
    """Killed when Slurm has the job and before it knows: the next start finds the job in the queue."""
    (tmp_path / "queue").touch()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    told = {"STUBS": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    stages = "{first:{recipe:prepare},second:{recipe:distill,after:[first]}}"
    command = [f"+stages={stages}", "launcher=slurm", f"out={tmp_path / 'out'}"]
    start = zygote.run("pipeline", *command, KILL_AT=stage, **told)
    assert start.codes == {0: -signal.SIGKILL}, start.output()
    start = zygote.run("pipeline", *command, KILL_AT="", **told)
    assert start.codes == {0: 0}, start.output()
    queue = [line.split()[0] for line in (tmp_path / "queue").read_text().splitlines()]
    assert queue == ["first", "second"]
    assert set(json.loads((tmp_path / "out" / "pipeline.json").read_text())) == {"first", "second"}
    note("the job was found in the queue; none was submitted twice")
