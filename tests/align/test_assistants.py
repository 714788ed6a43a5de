"""What is said of an assistant follows from its answers and likelihoods, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import assistants as tiny
from llamita import chat, checkpoints
from llamita.align import assistants, ifeval
from llamita.align.assistants import Measure
from llamita.align.dialogues import Dialogue, Pair, Task
from llamita.align.generation import Answer


def said(text: str, *, finished: bool = True) -> Answer:
    return Answer(text, 1, finished)


def value(measure: Measure) -> float:
    return sum(measure.numerator) / sum(measure.denominator)


def test_each_kind_of_check_has_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ifeval, "can_tell_languages", lambda: False)
    no_comma, title = "punctuation:no_comma", "detectable_format:title"
    language = "language:response_language"
    checks = [
        ({"kind": "number", "answer": 3}, said("#### 3")),
        ({"kind": "number", "answer": 3}, said("#### 4", finished=False)),
        ({"kind": "python", "function": "f"}, said("def g(): pass")),
        ({"kind": "ifeval", "instruction_id_list": [no_comma, title], "kwargs": [{}, {}]}, said("<<a>>\nb")),
        ({"kind": "ifeval", "instruction_id_list": [no_comma, title], "kwargs": [{}, {}]}, said("Sure, ok:\nb")),
        (
            {"kind": "ifeval", "instruction_id_list": [no_comma, language], "kwargs": [{}, {"language": "de"}]},
            said("Yes, a\nb"),
        ),
        ({"kind": "ifeval", "instruction_id_list": [language], "kwargs": [{"language": "de"}]}, said("a")),
        ({"kind": "length", "max": 3}, said("a b")),
        ({}, said("anything")),
    ]
    tasks = [Task(f"t{place}", tiny.user("?"), check) for place, (check, _) in enumerate(checks)]
    found = assistants.verified(tasks, [answer for _, answer in checks])
    assert {name: value(measure) for name, measure in found.items()} == pytest.approx(
        {
            "truncated": 1 / 9,
            "number/exact": 1 / 2,
            "python/parses": 1,
            "python/score": 1 / 2,
            "ifeval/prompt_strict": 1 / 3,
            "ifeval/instruction_strict": 2 / 5,
            "ifeval/prompt_loose": 2 / 3,
            "ifeval/instruction_loose": 4 / 5,
            "ifeval/checkable": 5 / 7,
            "length/score": 1,
        }
    )


def test_likelihoods_are_those_of_the_model(tmp_path: Path) -> None:
    path = tiny.assistant(tmp_path / "model")
    model = checkpoints.load_model(path, dtype=torch.float64).train(False)
    encoder = chat.Encoder(checkpoints.load_tokenizer(path))
    messages = (*tiny.user("Hi"), tiny.said("Hello"), *tiny.user("What?"), tiny.said("No"))
    [(nats, tokens)] = assistants.losses(model, encoder, [Dialogue("d", messages)], batch_rows=2)
    encoded = encoder.dialogue(messages)
    log_shares = model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1).detach()
    places = [place for place, supervised in enumerate(encoded.supervised) if supervised]
    assert tokens == len(places)
    assert nats == pytest.approx(-sum(float(log_shares[p - 1, encoded.ids[p]]) for p in places))

    long, short = tiny.said("The answer is 7 and so on and on"), tiny.said("7")
    pair, swapped = (Pair("p", tiny.user("3 + 4?"), *both) for both in ((long, short), (short, long)))
    forth, back = assistants.preferences(model, encoder, [pair, swapped], batch_rows=3)
    assert forth[0] == 0  # whatever they say, the longer answer is the less likely whole
    assert [a + b for a, b in zip(forth, back, strict=True)] == [1, 1]


def test_wins_are_counted_row_by_row_and_equal_ones_half() -> None:
    mine, other = (
        Measure(["a", "b", "c"], [1.0, 2.0, 0.0], [1.0] * 3),
        Measure(["a", "b", "c"], [0.0, 2.0, 1.0], [1.0] * 3),
    )
    assert assistants.wins(mine, other).numerator == [1, 0.5, 0]
    with pytest.raises(ValueError, match="asked the same"):
        assistants.wins(mine, Measure(["a"], [0.0], [1.0]))


def test_refusals_and_listed_words_are_shares_of_the_answers() -> None:
    answers = {"a": said("I'm sorry."), "b": said("Darn it.")}
    assert value(assistants.refused("list", ["?", "?"], list(answers.values()))["refused/list"]) == 0.5
    assert assistants.toxic(answers, ["darn"])["listed_words"].numerator == [0, 1]
