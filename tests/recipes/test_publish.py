"""A model directory from the checkpoint of a run that was killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import invented
from llamita import checkpoints, runs, storage
from llamita.adapters import LoraConfig
from llamita.distill import optim, student
from llamita.precision import Precision


@pytest.fixture(scope="module")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred short documents of invented words in rows of 64 tokens."""
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("publish"), documents=100)


@pytest.fixture(scope="module")
def trained(recipe: Callable[[str], ModuleType], data: Path) -> Path:
    """A finished run of four steps in bfloat16 with checkpoints of the second and the fourth."""
    module, out = recipe("distill"), data.parent / "trained"
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    shape = student.ShapeConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    module.run(
        module.Distill(
            student=student.StudentConfig(shape=shape),
            data=module._training.DataConfig(path=data),
            steps=4,
            global_batch_rows=4,
            micro_batch_rows=4,
            checkpoint_every=2,
            validation_rows=4,
            precision=Precision.bfloat16,
            optim=optim.OptimConfig(learning_rate=1e-2, warmup_steps=1),
            out=out,
        )
    )
    return out


@pytest.fixture
def killed(trained: Path, tmp_path: Path) -> Path:
    """The same, before it could publish anything."""
    out = tmp_path / "killed"
    shutil.copytree(trained, out)
    for name in ("DONE.json", "model.safetensors", "config.json", "llamita.json", "tokenizer.json"):
        (out / name).unlink()
    return out


def publish(recipe: Callable[[str], ModuleType], killed: Path, out: Path, step: int | None = None) -> None:
    module = recipe("publish")
    module.run(module.Publish(training=module.TrainingConfig(path=killed, step=step), out=out))


def test_the_last_checkpoint_is_the_model_that_the_run_would_have_published(
    recipe: Callable[[str], ModuleType], trained: Path, killed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    publish(recipe, killed, out)
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == len(AutoTokenizer.from_pretrained(out))
    done = runs.check_done(out)
    assert done["summary"]["step"] == 4
    assert checkpoints.Weights(out).dtype is torch.bfloat16
    assert done["parents"] == runs.check_done(trained)["parents"]
    provenance = storage.read_json(out / "llamita.json")
    assert provenance["checkpoint"] == {"path": str(killed / "checkpoints/step-4"), "step": 4}
    assert provenance["metrics"]["train/loss"] == runs.check_done(trained)["summary"]["train/loss"]


def test_a_step_can_be_chosen_and_is_another_model(
    recipe: Callable[[str], ModuleType], trained: Path, killed: Path, tmp_path: Path
) -> None:
    publish(recipe, killed, tmp_path / "model", step=2)
    assert runs.check_done(tmp_path / "model")["summary"]["step"] == 2
    published, last = (checkpoints.Weights(path)["model.embed_tokens.weight"] for path in (tmp_path / "model", trained))
    assert not published.equal(last)


def adapted(module: ModuleType, base: Path, data: Path, out: Path) -> Path:
    """A run of two steps that trained adapters of ``base``."""
    module.run(
        module.Distill(
            student=student.StudentConfig(path=base, lora=LoraConfig(rank=2)),
            data=module._training.DataConfig(path=data),
            steps=2,
            global_batch_rows=4,
            micro_batch_rows=4,
            validation_rows=0,
            precision=Precision.bfloat16,
            optim=optim.OptimConfig(learning_rate=1e-2, warmup_steps=1),
            out=out,
        )
    )
    return out


def test_adapters_of_a_checkpoint_are_added_to_the_weights_that_rested(
    recipe: Callable[[str], ModuleType], trained: Path, data: Path, tmp_path: Path
) -> None:
    out = adapted(recipe("distill"), trained, data, tmp_path / "adapted")
    publish(recipe, out, tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert (tmp_path / "model/model.safetensors").read_bytes() != (trained / "model.safetensors").read_bytes()


def test_adapters_are_not_added_to_other_weights_than_they_were_trained_on(
    recipe: Callable[[str], ModuleType], trained: Path, data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in [*trained.glob("*token*.json"), *(trained / name for name in ("config.json", "model.safetensors"))]:
        shutil.copy(file, base)
    out = adapted(recipe("distill"), base, data, tmp_path / "adapted")
    tensors, metadata = checkpoints.read_tensors(base / "model.safetensors")
    checkpoints.write_tensors(base / "model.safetensors", {n: 2 * t for n, t in tensors.items()}, metadata)
    with pytest.raises(ValueError, match=r"student.path=.* is not what .*step-2 was trained from"):
        publish(recipe, out, tmp_path / "model")
    assert not (tmp_path / "model" / "model.safetensors").exists()


def damaged(killed: Path) -> None:
    file = killed / "checkpoints/step-4/weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(
    recipe: Callable[[str], ModuleType], killed: Path, tmp_path: Path
) -> None:
    damaged(killed)
    with pytest.raises(ValueError, match=r"training.step=4: .* weights.safetensors has another content"):
        publish(recipe, killed, tmp_path / "model", step=4)
    assert not (tmp_path / "model").exists()
    publish(recipe, killed, tmp_path / "model")
    assert runs.check_done(tmp_path / "model")["summary"]["step"] == 2


def other_recipe(killed: Path) -> None:
    (killed / "config.yaml").write_text(yaml.safe_dump({"recipe": "prune", "settings": {}}))


def no_checkpoints(killed: Path) -> None:
    shutil.rmtree(killed / "checkpoints")


def no_run(killed: Path) -> None:
    (killed / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("change", "step", "message"),
    [
        (None, 3, r"training.step must be one of \[4, 2\], got 3"),
        (no_run, None, "is not the directory of a run"),
        (other_recipe, None, "must be a run of recipe 'distill' or 'sft', got 'prune'"),
        (no_checkpoints, None, "has no whole checkpoint"),
    ],
)
def test_what_holds_no_checkpoint_is_refused(
    change: Any, step: int | None, message: str, recipe: Callable[[str], ModuleType], killed: Path, tmp_path: Path
) -> None:
    if change:
        change(killed)
    with pytest.raises(ValueError, match=message):
        publish(recipe, killed, tmp_path / "model", step)
    assert not (tmp_path / "model").exists()
