"""Two processes: data parallel and every ZeRO stage learn what one process learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from llamita import checkpoints, manifests, storage
from llamita.metrics import read_metrics

HERE = Path(__file__).resolve().parent / "processes"
TYPINGS = Path(__file__).resolve().parents[2] / "typings"
BFLOAT16 = ("zero1_bfloat16", "zero3_bfloat16")
NAN = ("ddp_nan", "zero1_bfloat16_nan", "zero2_nan", "zero3_nan")
SPREAD = ("zero0_spread", "zero1_spread", "zero2_spread", "zero3_spread")
"""Each kind of student beside a teacher in pieces."""
EXACT = ("ddp", "ddp_micro", *SPREAD, "zero1", "zero2", "zero3")
EXACT += ("zero2_offload", "zero3_offload", "zero2_resume", "zero3_resume")
FROZEN = ("zero2_frozen", "zero3_frozen")
PHASES = (*NAN[:1], *EXACT, *BFLOAT16, *NAN[1:], *FROZEN)
"""Those without DeepSpeed first: accelerate keeps it once it was there."""
PARTS = ("other_part", "zero1_part", "zero2_part", "zero3_part", "zero1_bfloat16_part")
PARTS += ("zero2_frozen_part", "zero3_frozen_part")
"""The first one is spread as stage 2, then by nothing, then as stage 3."""


def launch(*arguments: str, processes: int = 2, **environment: str) -> subprocess.Popen[str]:
    """``ranks.py`` on several processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = [str(TYPINGS), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": ":".join(paths), **environment}
    return subprocess.Popen(
        [*command, str(HERE / "ranks.py"), *arguments],
        env=env,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=520)
    assert process.returncode == 0, out + err
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the phases run."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """What both ranks say about each phase."""
    checkpoints.save_model(toy.model(2, hidden=24, tied=False), folder / "teacher", source=None, provenance={})
    finished(launch(str(folder), *PHASES, *PARTS, "compare", "uneven", "damaged"))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Rows of the log and final weights of the same problem on one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    job = toy.go(out)
    return read_metrics(out), torch.cat([tensor.flatten() for tensor in toy.weights(job.engine).values()])


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_ranks_hold_equal_parameters(phase: str, results: list[dict[str, Any]]) -> None:
    first, second = (result[phase] for result in results)
    assert first["equal_ranks"]
    assert first["digest"] == second["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", EXACT)
def test_two_processes_learn_what_one_learns(
    phase: str, results: list[dict[str, Any]], alone: tuple[list[dict[str, Any]], torch.Tensor]
) -> None:
    rows, weights = alone
    got = results[0][phase]
    for name in ("train/loss", "train/ce", "train/kd", "optim/grad_norm", "val/held/loss", "val/held/bits_per_byte"):
        curves = [{row["step"]: row[name] for row in lines if name in row} for lines in (got["rows"], rows)]
        assert curves[0].keys() == curves[1].keys()
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    torch.testing.assert_close(torch.tensor(got["weights"]), weights, rtol=1e-4, atol=1e-5)
    assert [row["data/tokens"] for row in got["rows"] if "data/tokens" in row] == [96 * step for step in range(1, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("phase", BFLOAT16)
def test_bfloat16_under_zero_stays_near(
    phase: str, results: list[dict[str, Any]], alone: tuple[list[dict[str, Any]], torch.Tensor]
) -> None:
    """Stage 3 with activation checkpointing too."""
    curves = [
        {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
        for rows in (results[0][phase]["rows"], alone[0])
    ]
    assert curves[0] == pytest.approx(curves[1], rel=0.03)
    assert results[0][phase]["rotary"] == "torch.float32"


@pytest.mark.slow
@pytest.mark.parametrize("phase", NAN)
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all_and_names_the_rows(
    phase: str, results: list[dict[str, Any]], folder: Path
) -> None:
    rows = [row for row in results[0][phase]["rows"] if "optim/lr" in row]
    assert [row["optim/skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["step"] for row in rows if "train/loss" not in row] == [3]
    assert all(torch.isfinite(torch.tensor(result[phase]["weights"])).all() for result in results)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    said = (folder / phase / "logs/rank-00000.log").read_text()
    assert "step 3 is skipped: no finite gradient; the loss of rows 20, 21, 22, 23 of the training data" in said
    assert "on rank 1" in said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["ddp", "zero2", "zero3"])
def test_each_rank_hashes_what_it_wrote_and_the_manifest_holds_all(
    phase: str, results: list[dict[str, Any]], folder: Path
) -> None:
    step = folder / phase / "checkpoints/step-6"
    names = [{name.removeprefix("6/") for name in r[phase]["hashed"] if name.startswith("6/")} for r in results]
    assert not names[0] & names[1]
    assert names[0] | names[1] == storage.read_json(step / "MANIFEST.json")["files"].keys()
    assert "random-00001.json" in names[1]
    for rank in (0, 1) if phase.startswith("zero") else ():
        assert {f"weights-0000{rank}.safetensors", f"optimizer-0000{rank}.safetensors"} <= names[rank]
    assert manifests.check_manifest(step, hashes=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_stage_3_alone_leaves_no_tensor_whole(phase: str, results: list[dict[str, Any]]) -> None:
    assert all(result[phase]["spread"] == phase.startswith("zero3") for result in results)


@pytest.fixture(scope="module")
def parts(folder: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is said at the end of runs of three steps on two processes, two on one, and one on two again."""
    finished(launch(str(folder), *PARTS, processes=1, TOY_AFTER="4"))
    finished(launch(str(folder), *PARTS, TOY_AFTER="99"))
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("phase", PARTS)
def test_other_numbers_of_processes_go_on_as_if_nothing_had_happened(
    phase: str,
    parts: dict[str, Any],
    results: list[dict[str, Any]],
    folder: Path,
    alone: tuple[list[dict[str, Any]], torch.Tensor],
) -> None:
    """Compared with one process, or, in bfloat16 and with a frozen layer, with the same run uninterrupted."""
    half = "bfloat16" in phase
    rows, weights = alone
    if (whole := phase.removesuffix("_part")) in (*BFLOAT16, *FROZEN):
        rows, weights = results[0][whole]["rows"], torch.tensor(results[0][whole]["weights"])
    worlds = [storage.read_json(folder / phase / f"checkpoints/step-{n}/state.json")["world_size"] for n in (5, 6)]
    assert worlds == [1, 2]
    curves = [
        {row["step"]: row["train/loss"] for row in lines if "train/loss" in row}
        for lines in (parts[phase]["rows"], rows)
    ]
    assert curves[0].keys() == curves[1].keys()
    assert curves[0] == pytest.approx(curves[1], rel=1e-2 if half else 1e-5)
    tolerance = {"rtol": 0.1, "atol": 0.02} if half else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.tensor(parts[phase]["weights"]), weights, **tolerance)


@pytest.mark.slow
def test_a_teacher_in_pieces_says_what_it_says_whole(results: list[dict[str, Any]]) -> None:
    assert all(result["compare"]["same"] for result in results)
    assert not any(result["compare"]["trainable"] for result in results)


@pytest.mark.slow
def test_processes_with_different_work_keep_each_other_company(results: list[dict[str, Any]]) -> None:
    """Five batches against three, then three against one that is stopped."""
    assert [result["uneven"] for result in results] == [
        {"same": [True] * 8, "stopped": False},
        {"same": [True] * 4, "stopped": True},
    ]


@pytest.mark.slow
def test_each_process_holds_half_of_a_teachers_layers(results: list[dict[str, Any]]) -> None:
    """All but the head and the last norm; pieces are rounded up to 64 values of 4 bytes for each of three gathers."""
    whole = sum(p.numel() * 4 for p in toy.model(2, hidden=24, tied=False).parameters())
    for result in results:
        held = result["compare"]["bytes"]
        assert held["whole"] == (toy.VOCABULARY + 1) * 24 * 4
        assert 0 <= held["pieces"] - (whole - held["whole"]) / 2 <= 3 * 64 * 4


@pytest.mark.slow
def test_a_piece_that_is_not_the_files_ends_the_run_on_every_process(results: list[dict[str, Any]]) -> None:
    """Two values in each other's place have the same sum."""
    for result in results:
        assert "1 parts gathered from all processes are not those of" in result["damaged"]["error"]
        assert "model.layers.1" in result["damaged"]["error"]


@pytest.mark.slow
def test_a_stop_on_one_rank_saves_on_both_and_one_process_goes_on(
    tmp_path: Path, alone: tuple[list[dict[str, Any]], torch.Tensor]
) -> None:
    """SIGTERM to one rank only; then the rest on one process with the same global batch."""
    process = launch(str(tmp_path), "stop")
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0, out + err  # torchrun itself ends with 1 when ranks do not end with 0
    codes = [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)]
    assert codes == ["75", "75"], out + err
    assert (tmp_path / "stop/checkpoints/LATEST").read_text() == "step-3\n"
    job = toy.go(tmp_path / "stop")
    rows = read_metrics(tmp_path / "stop")
    curves = [{r["step"]: r["train/loss"] for r in lines if "train/loss" in r} for lines in (rows, alone[0])]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    final = torch.cat([tensor.flatten() for tensor in toy.weights(job.engine).values()])
    torch.testing.assert_close(final, alone[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_f23_a_rank_that_hangs_ends_the_run_with_the_stacks_of_all(tmp_path: Path) -> None:
    begun = time.monotonic()
    out, err = (process := launch(str(tmp_path), "hang")).communicate(timeout=300)
    assert process.returncode != 0, out + err
    assert time.monotonic() - begun < 120, "torchrun's own limit for a process that hears nothing is 30 s"
    told = storage.read_json(tmp_path / "hang/ERROR.json")
    assert (told["rank"], told["type"]) == (1, "TimeoutError")
    assert "run.hang_seconds=4 ends it" in told["message"]
    logs = [(tmp_path / f"hang/logs/rank-0000{rank}.log").read_text() for rank in (0, 1)]
    assert "made no progress" in logs[1]
    assert "in states" in logs[1]
    assert (tmp_path / "hang/checkpoints/LATEST").read_text() == "step-2\n"


CRASHES = (
    "mid_checkpoint:2",
    "before_manifest:2",
    "before_rename:2",
    "after_rename:2",
    "before_pointer:2",
    "during_purge:1",
)


@pytest.mark.slow
def test_sigkill_anywhere_in_the_saver_costs_nothing(tmp_path: Path) -> None:
    """One helper process forks a child per crash point: importing torch anew each time would take minutes."""
    script = HERE / "crashes.py"
    env = {**os.environ, "PYTHONPATH": str(TYPINGS), "OMP_NUM_THREADS": "1"}
    got = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *CRASHES], env=env, text=True, capture_output=True, timeout=300
    )
    assert got.returncode == 0, got.stdout + got.stderr
    reports = json.loads((tmp_path / "report.json").read_text())
    assert [report["killed"] for report in reports] == [True] * len(CRASHES)
    for report in reports:
        assert report["digest"] == report["expected"], report
        assert report["curve"] == report["expected_curve"], report
        assert report["leftovers"] == [], report
