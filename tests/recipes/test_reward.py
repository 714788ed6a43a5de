"""Reward models: the loss against a dense one in float64, and a stock directory with one number for a dialogue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import preferred
from llamita import chat, checkpoints, runs
from llamita.adapters import LoraConfig
from llamita.align import reward_trainer, watch
from llamita.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and ten pairs to train on with six held out."""
    folder = tmp_path_factory.mktemp("reward")
    preferred.model(folder / "model")
    preferred.data(folder / "data")
    return folder


def settings(module: ModuleType, folder: Path, out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "model": module._aligning.ModelConfig(path=folder / "model"),
        "data": module._aligning.DataConfig(path=folder / "data"),
        "max_length": 128,
        "global_batch_rows": 10,
        "micro_batch_rows": 5,
        "steps": 8,
        "checkpoint_every": 4,
        "learning_rate": 3e-3,
        "out": out,
    }
    return module.Reward(**{**fields, **changes})


@pytest.fixture(scope="module")
def finished(recipe: Callable[[str], ModuleType], folder: Path) -> Path:
    """Eight steps without a stop."""
    out = folder / "finished"
    recipe("reward").run(settings(recipe("reward"), folder, out))
    return out


def oracle(folder: Path, center: float) -> float:
    """Loss of all ten pairs before the first step, one dialogue at a time, in float64."""
    base = checkpoints.load_model(folder / "model", dtype=torch.float32)
    model = torch.nn.Module.double(reward_trainer.with_score(base, pad_id=0, seed=0))
    encoder = chat.Encoder(checkpoints.load_tokenizer(folder / "model"))
    total = 0.0
    for pair in preferred.pairs(0, 10):
        won, lost = (
            (model.model(torch.tensor([encoder.dialogue([*pair.prompt, side]).ids]))[0][0, -1] @ model.score.weight[0])
            for side in (pair.chosen, pair.rejected)
        )
        total += (-torch.nn.functional.logsigmoid(won - lost) + center * (won + lost) ** 2).item()
    return total / 10


@pytest.mark.parametrize("micro", [1, 10])
def test_the_loss_is_a_dense_float64_loss_for_every_split(
    micro: int, recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path
) -> None:
    module, out = recipe("reward"), tmp_path / "out"
    module.run(settings(module, folder, out, micro_batch_rows=micro, steps=1, center_weight=0.5, validation_pairs=0))
    row = next(row for row in read_metrics(out) if "train/loss" in row)
    assert row["train/loss"] == pytest.approx(oracle(folder, 0.5), rel=1e-5)


def test_the_preferred_of_held_out_answers_has_the_higher_reward(finished: Path) -> None:
    summary = runs.check_done(finished)["summary"]
    assert summary["before/val/held_out/reward_accuracy"] < 1
    assert summary["val/held_out/reward_accuracy"] == 1
    assert summary["val/held_out/reward_margin"] > summary["before/val/held_out/reward_margin"]
    assert [row["step"] for row in read_metrics(finished) if "val/held_out/reward_accuracy" in row] == [0, 8]


def test_the_result_is_a_stock_classifier_whose_reward_is_at_the_last_token(finished: Path) -> None:
    """In a padded batch as for the dialogue alone."""
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 1
    encoder = chat.Encoder(checkpoints.load_tokenizer(finished))
    assert model.config.pad_token_id == encoder.borders.pad_id
    assert {path.suffix for path in finished.glob("model*")} == {".safetensors"}
    rows = [encoder.dialogue([*pair.prompt, pair.chosen]).ids for pair in preferred.pairs(10, 16)]
    batch = torch.full((6, max(map(len, rows))), encoder.borders.pad_id)
    for place, ids in enumerate(rows):
        batch[place, : len(ids)] = torch.tensor(ids)
    hidden = [model.model(torch.tensor([ids]))[0][0, -1] for ids in rows]
    alone = torch.stack(hidden) @ model.score.weight.T
    together = model(batch, attention_mask=(batch != encoder.borders.pad_id).long()).logits
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_reward_model_is_opened_as_weights_and_refused_as_a_language_model(finished: Path) -> None:
    weights = checkpoints.Weights(finished)
    assert tuple(weights.head().shape) == (1, 64)
    assert checkpoints.is_reward_model(weights.config)
    with pytest.raises(ValueError, match="is a reward model, which gives one number for a dialogue"):
        checkpoints.load_model(finished)


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(), LoraConfig(rank=2), LoraConfig(rank=2, embeddings=True)],
    ids=("all", "adapters", "embedding"),
)
def test_a_stopped_run_gives_the_bytes_of_one_that_was_not(
    lora: LoraConfig,
    recipe: Callable[[str], ModuleType],
    folder: Path,
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With adapters, the head is trained whole, perhaps the embedding, and all else but the projections rests."""
    module, out = recipe("reward"), tmp_path / "out"
    config = settings(module, folder, out, lora=lora)
    listen = watch.Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 3:
            self.run.stop._flag.set()
        listen(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(watch.Watch, "on_step_end", on_step_end)
        with pytest.raises(runs.Stopped, match="stopped after step 3 of 8"):
            module.run(config)
    module.run(config)
    if not lora.rank:
        assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
        return
    before, after = (checkpoints.Weights(path) for path in (folder / "model", out))
    changed = {name for name in after.files if name not in before.files or not torch.equal(before[name], after[name])}
    whole = {"score.weight"} | ({"model.embed_tokens.weight"} if lora.embeddings else set())
    assert changed == {name for name in after.files if "proj" in name} | whole
    assert runs.check_done(out)["summary"]["val/held_out/reward_margin"] > 0


def test_the_dropout_of_adapters_is_there_in_training(
    recipe: Callable[[str], ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("reward")
    shares: set[float] = set()
    train = watch.train

    def trained(trainer: Any, listener: watch.Watch) -> dict[str, float]:
        shares.update(layer.p for layer in trainer.model.modules() if isinstance(layer, torch.nn.Dropout))
        return train(trainer, listener)

    monkeypatch.setattr(watch, "train", trained)
    module.run(settings(module, folder, tmp_path / "out", lora=LoraConfig(rank=2, dropout=0.5), steps=1))
    assert shares == {0.5}


def test_what_cannot_be_is_said_before_anything_is_written(
    recipe: Callable[[str], ModuleType], folder: Path, finished: Path, tmp_path: Path
) -> None:
    module = recipe("reward")
    with pytest.raises(ValueError, match="center_weight must be >= 0 and finite, got -1"):
        settings(module, folder, tmp_path / "out", center_weight=-1.0)
    with pytest.raises(ValueError, match=r"trainer\.center_rewards_coefficient=1 is decided by this recipe's own"):
        module.run(settings(module, folder, tmp_path / "out", trainer={"center_rewards_coefficient": 1}))
    model = module._aligning.ModelConfig(path=finished)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification.*, not a language model"):
        module.run(settings(module, folder, tmp_path / "out", model=model))
    assert not (tmp_path / "out").exists()
