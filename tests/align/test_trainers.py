"""Our settings as TRL's, and what counts as a checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch

from conftest import tiny_model
from llamita import checkpoints, manifests
from llamita.adapters import LoraConfig, Projection
from llamita.align import reward_trainer, trainers, watch


@dataclass
class Foreign:
    learning_rate: float = 0.0
    weight_decay: float = 0.0


def test_settings_pass_through_as_they_are() -> None:
    assert trainers.arguments(Foreign, {"weight_decay": 0.5}, {"learning_rate": 2.0}) == Foreign(2.0, 0.5)


def test_every_pass_of_an_order_holds_each_row_once_and_a_longer_run_begins_with_the_shorter() -> None:
    whole = trainers.order(7, 21, seed=3)
    assert [sorted(whole[first : first + 7]) for first in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert trainers.order(7, 11, seed=3) == whole[:11]
    assert trainers.order(7, 21, seed=4) != whole


def test_micro_batches_are_what_is_left_of_the_global_batch() -> None:
    config = trainers.TrainingConfig(global_batch_rows=24, micro_batch_rows=2)
    assert config.micro_batches(4) == 3
    with pytest.raises(ValueError, match=r"multiple of micro_batch_rows \* processes = 2 \* 5, got 24"):
        config.micro_batches(5)


def test_steps_are_those_of_whole_batches_or_as_told() -> None:
    config = trainers.TrainingConfig(global_batch_rows=4, epochs=3)
    assert config.num_steps(9) == 6
    assert dataclasses.replace(config, steps=11).num_steps(9) == 11
    with pytest.raises(ValueError, match="global_batch_rows=4 is more than the data has: 3 rows"):
        config.num_steps(3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("steps", 0),
        ("max_length", 1),
        ("checkpoint_every", 0),
        ("warmup_steps", -1),
        ("keep_checkpoints", -1),
    ],
)
def test_a_setting_without_meaning_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be.*{value}"):
        trainers.TrainingConfig(**{name: value})


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # peft asks by the older name
def test_what_peft_trains_is_what_is_counted(tied: bool, embeddings: bool) -> None:
    """A tied matrix once."""
    model = tiny_model(tie_word_embeddings=tied)
    lora = LoraConfig(rank=2, targets=[Projection.o_proj, Projection.down_proj], embeddings=embeddings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted: Any = peft.get_peft_model(model, trainers.adapters(lora, model))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert trained == lora.num_parameters(checkpoints.shape_of(model.config))
    assert (adapted.get_input_embeddings().weight is adapted.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # peft asks by the older name
def test_a_reward_model_trains_its_head_beside_the_adapters(embeddings: bool) -> None:
    model = reward_trainer.with_score(tiny_model(tie_word_embeddings=True), pad_id=0, seed=0)
    lora = LoraConfig(rank=2, targets=[Projection.o_proj], embeddings=embeddings)
    adapted: Any = peft.get_peft_model(model, trainers.adapters(lora, model))
    whole = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad and "lora" not in name}
    assert whole == {"score", "embed_tokens"} if embeddings else {"score"}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_cast_for_a_while_and_are_what_they_were_again(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with trainers.weights_in(model, torch.bfloat16):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.model.rotary_emb.inv_freq.dtype is torch.float32  # as DeepSpeed leaves it
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_without_adapters_peft_is_told_nothing() -> None:
    assert trainers.adapters(LoraConfig(), tiny_model()) is None


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_text(f"weights of step {step}")
    if whole:
        manifests.write_manifest(path)
    return path


def test_a_checkpoint_that_is_not_whole_is_removed_and_the_newest_whole_one_is_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, damaged, half = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4), checkpoint(tmp_path, 10, whole=False)
    (damaged / "weights").write_text("weights of step 9")  # as many bytes
    with caplog.at_level(logging.WARNING):
        assert watch.newest(tmp_path) == good
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert f"{half} is not whole and is removed" in caplog.text
    assert f"{damaged} is not whole and is removed: weights has another content" in caplog.text


def test_the_newest_by_step_stay(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        checkpoint(tmp_path, step)
    watch.prune(tmp_path, 2)
    assert watch.steps_in(tmp_path) == [4, 10]
    watch.prune(tmp_path, 0)
    assert watch.steps_in(tmp_path) == []


def told(run: Any, family: str, logs: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a run of three steps that logs each and saves the second."""
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=iter(range(0, 100, 2)).__next__))
    listener = watch.Watch(
        run,
        steps=3,
        family=family,
        names={"reward": "rl/reward", "rewards/accuracies": "dpo/accuracy"},
        parents={},
        keep=2,
        max_skipped_in_a_row=2,
        rows_of=lambda step: [],
    )
    state = SimpleNamespace(global_step=0)
    listener.on_train_begin(None, state, None)
    for step, line in enumerate(logs, 1):
        state.global_step = step
        listener.on_step_end(None, state, SimpleNamespace())
        listener.on_log(None, state, None, logs=line)
        if step == 2:
            (listener.folder / f"checkpoint-{step}").mkdir(parents=True)
            listener.on_save(None, state, None)
    listener.on_train_end(None, state, None)
    return list(run.lines())


def test_who_watches_is_told_what_the_trainer_logs_with_speed_and_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SimpleNamespace(
        path=tmp_path / "polished",
        log=lambda values, step: None,
        stop=SimpleNamespace(is_set=lambda: False),
        watchdog=SimpleNamespace(beat=lambda: None),
        lines=lambda: [line.partition("  0 s left")[0] for line in capsys.readouterr().out.splitlines()],
    )
    common = {"loss": 0.5, "learning_rate": 1e-5, "grad_norm": 1.0}
    rl = [{**common, "reward": 0.25, "kl": 1e-3, "num_tokens": 100.0 + 3000 * step} for step in range(3)]
    assert told(run, "rl", rl, monkeypatch) == [
        "polished: step 1/3  loss 0.5000  reward 0.2500  KL 0.0010  lr 1.00e-05  checkpoint -",
        "polished: step 2/3  loss 0.5000  reward 0.2500  KL 0.0010  lr 1.00e-05  tokens/s 1,500  checkpoint -",
        "polished: step 3/3  loss 0.5000  reward 0.2500  KL 0.0010  lr 1.00e-05  tokens/s 1,500  checkpoint 2",
    ]
    run.path = tmp_path / "preferred"
    lines = told(run, "dpo", [{**common, "loss": math.nan, "rewards/accuracies": 1.0}, common], monkeypatch)
    assert lines == [
        "preferred: step 1/3  accuracy 1.000  lr 1.00e-05  checkpoint -",
        "preferred: step 2/3  loss 0.5000  lr 1.00e-05  checkpoint -",
    ]
