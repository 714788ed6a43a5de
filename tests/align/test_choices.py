"""Questions with endings: read as they are published, and answered by likelihood."""

from __future__ import annotations

import bz2
import json
from pathlib import Path

import pytest
import torch

import assistants
from llamita import chat, checkpoints
from llamita.align import choices
from llamita.align.choices import Question

REAL = Path(__file__).resolve().parents[3] / "shared/data/hellaswag/hellaswag_val_full.txt.bz2"


def test_both_forms_are_read_and_fewer_are_evenly_spaced(tmp_path: Path) -> None:
    wanted = [Question(str(n), f"context {n}", ("a", "b", "c", "d"), n % 4) for n in range(9)]
    text = "".join("\n".join([q.context, str(q.right), *q.endings]) + "\n" for q in wanted)
    with bz2.open(tmp_path / "x.txt.bz2", "wt") as file:
        file.write(text)
    rows = [{"ctx": q.context, "endings": list(q.endings), "label": str(q.right)} for q in wanted]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert choices.read(tmp_path / "x.txt.bz2") == choices.read(tmp_path / "x.jsonl") == wanted
    assert [question.id for question in choices.read(tmp_path / "x.jsonl", most=3)] == ["0", "3", "6"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("x.csv", "a", "must be a .txt or .jsonl file"),
        ("x.txt", "c\n1\na\nb\nc\n", "line 1 begins a question of fewer than 6 lines"),
        ("x.txt", "c\n4\na\nb\nc\nd\n", "question 0: there is no ending 4"),
        ("x.txt", "c\none\na\nb\nc\nd\n", "does not hold questions with endings"),
        ("x.jsonl", '{"ctx": "c", "endings": ["a", "b"]}', "does not hold questions with endings: 'label'"),
    ],
)
def test_a_file_that_is_none_is_named(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        choices.read(tmp_path / name)


def test_the_likeliest_ending_counts_as_a_whole_and_per_byte(tmp_path: Path) -> None:
    """Against the logits of the model itself, one text at a time, in float64."""
    path = assistants.assistant(tmp_path / "model")
    model = checkpoints.load_model(path).double().eval()
    encoder = chat.Encoder(checkpoints.load_tokenizer(path))
    endings = ("yes", "The answer is 4.", "no no no", "x")
    sums = []
    for ending in endings:
        prompt, answer = encoder.answer(
            [{"role": "user", "content": "2 + 2?"}], {"role": "assistant", "content": ending}
        )
        ids = torch.tensor([prompt + answer[:-1]])
        logp = model(ids).logits[0].detach().log_softmax(-1)
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        sums.append(sum(float(logp[place, ids[0, place + 1]]) for place in places))
    by_byte = [value / len(ending) for value, ending in zip(sums, endings, strict=True)]
    for right in range(4):
        told = choices.right(model, encoder, [Question("q", "2 + 2?", endings, right)], batch_rows=3)
        assert told == [(float(sums.index(max(sums)) == right), float(by_byte.index(max(by_byte)) == right))]


@pytest.mark.skipif(not REAL.is_file(), reason="shared/data is not here")
def test_hellaswag_is_read_whole() -> None:
    found = choices.read(REAL)
    assert len(found) == 10_042
    assert found[0].right == 3
    assert found[0].endings[3] == "starts pulling up roofing on a roof."
