"""What ``distill`` refuses before it reads a weight: models and data that cannot be trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from conftest import tiny_config
from llamita import storage
from llamita.distill import student
from llamita.distill.teachers import check_model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_position_embeddings": 32}, r"rows of 64 tokens, big=.* at most max_position_embeddings=32"),
        (
            {"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "a", "1": "b"}},
            r"big=.* is a token classifier of 2 output rows",
        ),
    ],
)
def test_a_model_that_cannot_read_the_rows_is_refused_by_its_configuration(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    config = {**tiny_config().to_dict(), "architectures": ["LlamaForCausalLM"]}
    storage.write_json(tmp_path / "config.json", config)
    check_model("big", tmp_path, 64)
    storage.write_json(tmp_path / "config.json", config | change)
    with pytest.raises(ValueError, match=message):
        check_model("big", tmp_path, 64)


def test_data_without_held_out_rows_say_how_to_train_without(
    recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    prepare, module = recipe("prepare"), recipe("distill")
    (tmp_path / "text").mkdir()
    for index in range(9):
        (tmp_path / "text" / f"{index}.txt").write_text(f"One line, {index} times. " * 20)
    prepare.run(
        prepare.Prepare(
            source=prepare.SourceConfig(path=str(tmp_path / "text"), suffixes=[".txt"]),
            tokenizer=prepare.TokenizerConfig(vocab_size=270),
            validation=prepare.ValidationConfig(fraction=0.0),
            sequence_length=32,
            num_proc=1,
            out=tmp_path / "data",
        )
    )
    shape = student.ShapeConfig(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    fields = {
        "data": module._training.DataConfig(path=tmp_path / "data"),
        "student": student.StudentConfig(shape=shape),
        "out": tmp_path / "out",
    }
    module.check(module.Distill(**fields, validation_rows=0))
    with pytest.raises(ValueError, match=r"no held-out rows: validation_rows=0 trains without, got 64"):
        module.run(module.Distill(**fields))
    assert not (tmp_path / "out").exists()
