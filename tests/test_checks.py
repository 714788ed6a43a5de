"""Every mistake that can be seen beforehand is one line that names setting, value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llamita import checkpoints, checks, redaction, runs, storage
from llamita.shapes import PUBLISHED

CANARIES = {
    "hub": "hf_" + "Q" * 34,
    "wandb": "0123456789abcdef" * 2 + "01234567",
    "github": "ghp_" + "a1" * 18,
    "aws": "AKIA" + "A1B2" * 4,
    "key": "-----BEGIN RSA PRIVATE KEY-----",
    "address": "https://me:secret@example.org/data",
}


@pytest.mark.parametrize("kind", CANARIES)
def test_a_secret_in_any_setting_is_found_and_never_repeated(kind: str) -> None:
    settings = {"run": {"seed": 1}, "list": [{"deep": CANARIES[kind]}]}
    found = redaction.secrets_in(settings)
    assert len(found) == 1
    assert found[0].startswith("list[0].deep looks like")
    assert CANARIES[kind] not in found[0]
    assert CANARIES[kind] not in redaction.redacted(f"list.deep={CANARIES[kind]}")


@pytest.mark.parametrize(
    "value",
    [
        "meta-llama/Llama-3.1-8B",
        "/cache/models--x/snapshots/0123456789abcdef0123456789abcdef01234567/",
        "hf_model",
        "/data/sk-learn",
        "s3://bucket/key",
        "AKIA",
        7,
        None,
    ],
)
def test_paths_and_names_are_no_secrets(value: Any) -> None:
    assert redaction.secrets_in({"x": value}) == []


@pytest.mark.parametrize("name", ["a/b", "", "x" * 65, "a\nb", "a b", "..", "$(id)", "ä"])
def test_a_name_that_could_escape_is_refused(name: str) -> None:
    assert len(runs.names({"run.project": name})) == 1
    assert runs.names({"run.project": "llama3.2_1b-v2"}) == []


def test_a_typo_gets_the_setting_that_was_meant() -> None:
    known = ["loss.temperature", "loss.ce_weight", "optim.learning_rate", "steps"]
    assert checks.suggestion("loss.temprature", known) == "; did you mean loss.temperature?"
    assert checks.suggestion("step", known) == "; did you mean steps?"
    assert checks.suggestion("optim.temperature", known) == "", "only settings of the same block are meant"


def test_a_global_batch_that_cannot_be_shared_gets_the_nearest_that_can() -> None:
    assert checks.division(64, 2, 8) == []
    assert checks.division(60, 2, 8) == [
        "global_batch_rows must be a multiple of micro_batch_rows=2 times processes=8: nearest are 48 and 64, got 60"
    ]
    assert "nearest are 8, got 3" in checks.division(3, 1, 8)[0]


def test_rows_longer_than_the_model_can_count_are_refused() -> None:
    assert checks.positions(8192, "student", 8192) == []
    assert "8193" in checks.positions(8193, "student", 8192)[0]


def test_a_small_disk_is_seen_before_anything_is_written(tmp_path: Path) -> None:
    assert checks.space(tmp_path / "new" / "run", 1.0, str) == []
    problem = checks.space(tmp_path / "new" / "run", 1e18, lambda size: f"{size:.0f} B")
    assert "needs 1000000000000000000 B" in problem[0]


@pytest.fixture
def directory(tmp_path: Path, tiny: LlamaForCausalLM) -> Path:
    """A whole model directory, but for its tokenizer."""
    (tmp_path / "model").mkdir()
    checkpoints.save_model(tiny, tmp_path / "model", source=None, provenance={})
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def test_a_whole_model_directory_has_no_mistakes(directory: Path) -> None:
    assert checks.model("model.path", directory) == []


def test_a_published_name_stands_for_its_shape() -> None:
    name = Path("meta-llama/Llama-3.1-8B")
    assert checks.model("model.path", name) == []
    assert checks.model_shape(name) == PUBLISHED[str(name)]
    assert "no directory" in checks.model("model.path", Path("meta-llama/Llama-9"))[0]


def test_a_configuration_alone_is_enough_to_plan_with(directory: Path, tiny: LlamaForCausalLM) -> None:
    (directory / "model.safetensors").unlink()
    assert checks.model("model.path", directory) == []
    assert not checks.has_weights(directory)
    assert checks.model_shape(directory) == checkpoints.shape_of(tiny.config)


def cut_short(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def without_a_tensor(path: Path) -> None:
    tensors, metadata = checkpoints.read_tensors(path / "model.safetensors")
    del tensors["model.norm.weight"]
    checkpoints.write_tensors(path / "model.safetensors", tensors, metadata)


def other_shape(path: Path) -> None:
    tensors, metadata = checkpoints.read_tensors(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    checkpoints.write_tensors(path / "model.safetensors", tensors, metadata)


def foreign_code(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "x.y"}}))


def other_family(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "cut short"),
        (without_a_tensor, "lacks 1 tensors: model.norm.weight"),
        (other_shape, "model.norm.weight has shape"),
        (foreign_code, "auto_map"),
        (other_family, "mistral"),
        (lambda path: (path / "config.json").unlink(), "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda path: storage.write_json(path / "run.json", {}), "unfinished"),
    ],
)
def test_a_damaged_model_directory_is_seen_by_its_headers(directory: Path, damage: Any, message: str) -> None:
    damage(directory)
    problems = checks.model("model.path", directory)
    assert len(problems) == 1, problems
    assert message in problems[0]
    assert "model.path" in problems[0]
    assert "\n" not in problems[0]


def test_a_directory_that_was_changed_after_it_was_finished_is_seen(directory: Path) -> None:
    files = {"config.json": {"bytes": 1, "sha256": ""}}
    storage.write_json(directory / "DONE.json", {"files": files})
    assert "was changed" in checks.unfinished("model.path", directory)[0]
    assert "does not exist" in checks.finished_stage("runs", directory / "no")[0]
