"""Make a model directory of a training run's checkpoint, without training on; one process and no GPU are enough.

python recipes/publish.py training.path=outputs/killed training.step=4000 out=model
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import MISSING, OmegaConf
from transformers import LlamaConfig

import _dialogue_rows
from llamita import checkpoints, manifests, runs, storage
from llamita.data.shards import PackedData
from llamita.distill import lora, saved, state, student, teachers


@dataclass(kw_only=True)
class TrainingConfig:
    """The directory of a ``distill`` or ``sft`` run, finished or not."""

    path: Path = MISSING
    step: int | None = None
    """Unset: the newest checkpoint whose files are whole."""


@dataclass(kw_only=True)
class Publish:
    """Everything that this recipe can be told."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING


store("publish_schema", Publish)


def run(config: Publish) -> None:
    """Read weights and settings of the checkpoint, and publish them at the root of ``config.out``."""
    finished = (config.out / "DONE.json").is_file()
    settings, folder = ({}, Path()) if finished else check(config)
    with runs.start(config.out, "publish", storage.plain(config), config.run) as this:
        if not this.done and runs.is_main_process():
            publish(this, settings, folder)


def check(config: Publish) -> tuple[dict[str, Any], Path]:
    """The settings of the training run and the folder of its checkpoint.

    Raises:
        ValueError: it is no run of ``distill`` or ``sft``, or the checkpoint is missing or not whole.
    """
    path, step = config.training.path, config.training.step
    if not (path / "config.yaml").is_file():
        raise ValueError(f"training.path={path} is not the directory of a run: it has no config.yaml")
    written = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    recipe = written.get("recipe") if isinstance(written, dict) else None
    if recipe not in ("distill", "sft"):
        raise ValueError(f"training.path={path} must be a run of recipe 'distill' or 'sft', got {recipe!r}")
    steps = state.steps_in(path / "checkpoints")
    if step is None:
        step = state.newest_good(path / "checkpoints")
        if step < 0:
            raise ValueError(f"training.path={path} has no whole checkpoint, found steps {steps}")
    folder = path / "checkpoints" / f"step-{step}"
    if step not in steps:
        raise ValueError(f"training.step must be one of {steps}, got {step}")
    if reason := manifests.check_manifest(folder, hashes=True):
        raise ValueError(f"training.step={step}: {folder} is not whole: {reason}")
    return (written["settings"] if recipe == "distill" else as_distilled(written["settings"], path)), folder


def as_distilled(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of a run of ``sft`` with those of the student and the rows that it trained on in path."""
    student_settings = {"path": settings["model"]["path"], "lora": settings["lora"]}
    return settings | {"student": student_settings, "data": {"path": str(path / _dialogue_rows.FOLDER)}}


def student_of(settings: dict[str, Any]) -> student.StudentConfig:
    """The settings of the run's student."""
    schema = OmegaConf.structured(student.StudentConfig)
    made: Any = OmegaConf.to_object(OmegaConf.merge(schema, settings["student"]))
    assert isinstance(made, student.StudentConfig)
    return made


def llama_of(wanted: student.StudentConfig, data: PackedData) -> LlamaConfig:
    """The configuration of the run's student."""
    return student.llama_config(
        wanted,
        vocab_size=data.vocab_size,
        tokenizer_path=data.tokenizer_path,
        sequence_length=data.sequence_length,
    )


def check_parents(wanted: student.StudentConfig, data: PackedData, folder: Path, progress: dict[str, Any]) -> None:
    """Hold that student and data are those of the run: adapters correct no other weights.

    Raises:
        ValueError: naming what has changed.
    """
    if wanted.path and checkpoints.content_hash(wanted.path) != progress["parents"]["student"]:
        raise ValueError(f"student.path={wanted.path} is not what {folder} was trained from: its weights have changed")
    if data.split("train").content_hash != progress["data"]["data_hash"]:
        raise ValueError(f"data.path={data.path} is not what {folder} was trained on: its rows have changed")


def trained_of(
    wanted: student.StudentConfig, llama: LlamaConfig, found: saved.Saved, dtype: torch.dtype, *, rounded: bool
) -> student.Trained:
    """The student's weights: those of the checkpoint, or those that rested, with the checkpoint's adapters added.

    ``rounded``: adapters in the precision of the layers, as DeepSpeed holds them beside those that it saves.
    """
    if not wanted.lora.rank:
        found.check(list(checkpoints.stored_tensors(llama)), beside=False)
        return found
    cpu, attention = torch.device("cpu"), teachers.Attention.sdpa
    model = student.load(wanted, llama, seed=0, attention=attention, device=cpu, resting=dtype)
    found.check([name for name, _ in model.named_parameters() if lora.is_trained(name, wanted.lora)], beside=False)
    found.restore(model)
    for name, parameter in model.named_parameters():
        if rounded and lora.is_trained(name, wanted.lora):
            parameter.data = parameter.data.to(dtype).float()
    return lora.Merged(model)


def publish(this: runs.Run, settings: dict[str, Any], folder: Path) -> None:
    """Write the model in the precision that the run itself would have published."""
    data = PackedData.open(Path(settings["data"]["path"]))
    wanted = student_of(settings)
    llama, source = llama_of(wanted, data), wanted.path or data.tokenizer_path
    if (data.tokenizer_path / _dialogue_rows.GENERATION).is_file():  # of dialogues: it says where answers end
        source = data.tokenizer_path
        llama.eos_token_id = storage.read_mapping(source / _dialogue_rows.GENERATION)["eos_token_id"]
    progress = storage.read_json(folder / state.STATE)
    parents = progress["parents"] | {"data": data.content_hash}
    check_parents(wanted, data, folder, progress)
    dtype = checkpoints.dtype_named(progress["dtype"])
    files = student.publish(
        trained_of(wanted, llama, saved.Saved(folder), dtype, rounded=settings["deepspeed"]["stage"] > 0),
        llama,
        this.path,
        main=True,
        source=source,
        dtype=dtype,
        provenance={
            "recipe": "publish",
            "parents": {name: {"sha256": sha256} for name, sha256 in parents.items()},
            "settings": settings,
            "checkpoint": {"path": str(folder), "step": progress["step"]},
            "metrics": progress["last"],
        },
    )
    this.finish(files, parents=parents, summary={**progress["last"], "step": progress["step"]})


main = command("publish", Publish, run)

if __name__ == "__main__":
    exit_with(main)
