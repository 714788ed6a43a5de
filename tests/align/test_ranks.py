"""Two processes: data parallel and DeepSpeed learn what one process learns, stop together, and fail together."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import preferred
from conftest import REPOSITORY
from llamita import chat, checkpoints, storage
from llamita.align import reward_model
from llamita.align.reward_trainer import with_score
from llamita.metrics import read_metrics

pytestmark = pytest.mark.timeout(900)  # the first test waits for all runs
SCRIPT = REPOSITORY / "tests/align/processes/ranks.py"


@pytest.fixture(scope="module")
def folder(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, and in ``one`` what this one makes of the same pairs."""
    folder = tmp_path_factory.mktemp("ranks")
    preferred.model(folder / "model")
    preferred.data(folder / "data", kind="letters")
    judge(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = ":".join(str(REPOSITORY / name) for name in ("typings", "tests", "recipes"))
    made = subprocess.run([*command, str(SCRIPT), str(folder)], env=env, capture_output=True, text=True, timeout=800)
    assert made.returncode == 0, made.stdout + made.stderr
    module = recipe("dpo")
    module.run(
        module.Dpo(
            model=module._aligning.ModelConfig(path=folder / "model"),
            data=module._aligning.DataConfig(path=folder / "data"),
            max_length=128,
            global_batch_rows=10,
            micro_batch_rows=10,
            steps=4,
            learning_rate=3e-3,
            out=folder / "one",
        )
    )
    return folder


def judge(folder: Path) -> None:
    """A reward model that reads text as the model does."""
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    made = with_score(checkpoints.load_model(folder / "model"), pad_id=encoder.borders.pad_id, seed=1)
    made.config.architectures = [reward_model.ARCHITECTURE]
    made.save_pretrained(folder / "judge")
    checkpoints.copy_tokenizer(folder / "model", folder / "judge")


def steps_of(path: Path, name: str) -> dict[int, Any]:
    return {row["step"]: row[name] for row in read_metrics(path) if name in row}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_two_processes_learn_what_one_learns(name: str, folder: Path) -> None:
    """``zero2`` was stopped on one rank after its third step, and gone on with."""
    one, two = folder / "one", folder / name
    for metric in ("train/loss", "optim/grad_norm", "dpo/margin", "val/held_out/dpo_margin"):
        assert steps_of(two, metric) == pytest.approx(steps_of(one, metric), rel=1e-4, abs=1e-5)
    for got, expected in zip(*(checkpoints.load_model(path).parameters() for path in (two, one)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_adapters_and_an_embedding_learn_the_same_however_their_moments_are_spread(folder: Path) -> None:
    """``lora_zero2`` was stopped and gone on with as well."""
    whole, spread = folder / "lora_ddp", folder / "lora_zero2"
    for metric in ("train/loss", "optim/grad_norm", "val/held_out/dpo_margin"):
        assert steps_of(spread, metric) == pytest.approx(steps_of(whole, metric), rel=1e-4, abs=1e-5)
    for got, expected in zip(*(checkpoints.load_model(path).parameters() for path in (spread, whole)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_stop_on_one_rank_is_heard_by_all(folder: Path) -> None:
    assert {(folder / f"zero2-{rank}.txt").read_text() for rank in (0, 1)} == {
        "stopped after step 3 of 4; start it again to go on"
    }
    assert storage.read_json(folder / "zero2/run.json")["restarts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp_nan", "zero2_nan"])
def test_a_loss_that_is_not_finite_on_one_rank_ends_the_run_on_all(name: str, folder: Path) -> None:
    said = {(folder / f"{name}-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert said.pop().startswith("1 steps in a row had no finite loss and gradient, the last was step 4")
    assert not (folder / name / "model.safetensors").exists()
    assert [path.name for path in (folder / name / "checkpoints").iterdir()] == ["checkpoint-2"]


@pytest.mark.slow
def test_answers_and_their_rewards_are_the_same_however_the_weights_are_spread(folder: Path) -> None:
    whole, spread = folder / "rl_ddp", folder / "rl_zero3"
    for metric in ("rl/reward", "val/held_out/reward", "val/held_out/kl_to_start"):
        assert steps_of(spread, metric) == pytest.approx(steps_of(whole, metric), rel=1e-3)
    assert len(steps_of(spread, "val/held_out/reward")) == 2


@pytest.mark.slow
def test_a_reward_model_is_whole_on_every_rank_where_the_policy_is_spread(folder: Path) -> None:
    whole, spread = folder / "judged_ddp", folder / "judged_zero3"
    for metric in ("rl/reward", "val/held_out/reward"):
        assert steps_of(spread, metric) == pytest.approx(steps_of(whole, metric), rel=1e-3)


@pytest.mark.slow
def test_a_policy_in_bfloat16_begins_at_its_reference(folder: Path) -> None:
    """DeepSpeed computes with bfloat16 weights, and so did who measured the reference."""
    for name in ("half_zero1", "half_zero1_whole"):
        assert steps_of(folder / name, "dpo/margin")[1] == pytest.approx(0, abs=1e-6)
        loss = steps_of(folder / name, "train/loss")[1] - 0.2 * steps_of(folder / name, "dpo/nll")[1]
        assert loss == pytest.approx(math.log(2), rel=1e-6)
        assert abs(steps_of(folder / name, "dpo/margin")[4]) > 1e-2


@pytest.mark.slow
def test_bfloat16_weights_go_on_from_their_float32_masters(folder: Path) -> None:
    """``half_zero1`` was stopped on one rank after its third step, and gone on with: the bytes are the same."""
    stopped, whole = (folder / name / "model.safetensors" for name in ("half_zero1", "half_zero1_whole"))
    assert stopped.read_bytes() == whole.read_bytes() != (folder / "model/model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric"),
    [("half_reward_zero1", "val/held_out/reward_margin"), ("half_rl_zero1", "val/held_out/reward")],
)
def test_every_recipe_trains_in_bfloat16(name: str, metric: str, folder: Path) -> None:
    before, after = steps_of(folder / name, metric).values()
    assert math.isfinite(after)
    assert after != before
    assert checkpoints.Weights(folder / name).dtype is torch.bfloat16
