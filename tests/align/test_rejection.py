"""Which answers are learnt, and that an unusable one never is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import assistants
from llamita.align import rejection
from llamita.align.dialogues import Dialogue, Task
from llamita.align.rejection import Asked, Pairs, Prompts, Sample, SelectionConfig, Status

PROMPT = Asked("p", assistants.user("How many?"), {"kind": "number", "answer": 3})


def sample(
    number: int, text: str = "", *, verified: float | None = None, reward: float | None = None, **more: Any
) -> Any:
    is_ranked = more.pop("is_ranked", reward is not None)
    fields = {"tokens": 5, "finished": True, "prompt": PROMPT, "is_ranked": is_ranked, **more}
    return Sample(number=number, text=text or f"answer {number}", verified=verified, reward=reward, **fields)


def test_the_best_reward_is_chosen_and_the_worst_rejected() -> None:
    samples = [sample(n, reward=reward) for n, reward in enumerate([0.5, 2.0, -1.0, 2.0])]
    found = rejection.choose(samples, SelectionConfig())
    assert found is not None
    assert (found.best.number, found.worse and found.worse.number) == (1, 2)


def test_a_verifier_gates_what_a_reward_model_ranks() -> None:
    samples = [
        sample(0, verified=0.0, reward=9.0),
        sample(1, verified=1.0, reward=1.0),
        sample(2, verified=1.0, reward=2.0),
    ]
    found = rejection.choose(samples, SelectionConfig())
    assert found is not None
    assert (found.best.number, found.worse and found.worse.number) == (2, 0)  # wrong, whatever its reward
    assert rejection.choose(samples, SelectionConfig(gate=0)).best.number == 0  # type: ignore[union-attr]
    assert rejection.choose(samples, SelectionConfig(min_score=3)) is None
    assert rejection.choose(samples[:1], SelectionConfig()) is None


@given(
    rewards=st.lists(st.sampled_from([None, 0.0, 0.1, 1.0, 5.0]), min_size=1, max_size=6),
    finished=st.lists(st.booleans(), min_size=6, max_size=6),
    empty=st.lists(st.booleans(), min_size=6, max_size=6),
    pairs=st.sampled_from(Pairs),
    margin=st.sampled_from([0.0, 0.5]),
)
def test_an_unusable_answer_is_neither_chosen_nor_rejected(
    rewards: list[float | None], finished: list[bool], empty: list[bool], pairs: Pairs, margin: float
) -> None:
    samples = [
        Sample(PROMPT, n, "" if empty[n] else f"a{n}", 1, finished[n], None, reward, is_ranked=True)
        for n, reward in enumerate(rewards)
    ]
    usable = [s for s in samples if s.text and s.finished and s.reward is not None]
    found = rejection.choose(samples, SelectionConfig(pairs=pairs, min_margin=margin))
    assert (found is None) == (not usable)
    if found is not None:
        assert found.best.reward == max(s.reward for s in usable if s.reward is not None)
        worse = [s for s in usable if s.reward < found.best.reward and found.best.reward - s.reward >= margin]
        assert (found.worse is None) == (pairs is Pairs.none or not worse)
        assert found.worse is None or found.worse in worse


def test_each_way_to_be_unusable_is_told() -> None:
    told = {
        sample(0, reward=1.0).status,
        Sample(PROMPT, 1, "", 1, True, None, None, True).status,
        sample(2, reward=1.0, finished=False).status,
        sample(3, is_ranked=True).status,
        sample(4).status,
    }
    assert told == set(Status)


def test_near_duplicates_are_left_out_of_the_dialogues_and_short_answers_are_not() -> None:
    long = "the cat sat on the mat and looked at the moon for a very long time until it was morning again"
    groups = []
    for place, text in enumerate([long, f"{long} today", "72", "72"]):
        asked = Asked(f"p{place}", assistants.user(f"Question {place}"), {})
        groups.append([Sample(asked, 0, text, 9, True, None, 1.0, True)])
    found = rejection.select(groups, SelectionConfig(duplicate_threshold=0.7))
    assert found.duplicates == {"p1/0": "p0/0"}
    assert [one.id for one in found.dialogues] == ["p0/0", "p2/0", "p3/0"]
    assert [row["use"] for row in found.rows("train")] == ["chosen", "duplicate", "chosen", "chosen"]
    assert not rejection.select(groups, SelectionConfig(duplicate_threshold=None)).duplicates


def test_figures_are_those_of_the_definitions() -> None:
    verified = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    groups = [[sample(n, verified=value) for n, value in enumerate(row)] for row in verified]
    groups[1][0] = sample(0, verified=1.0, finished=False)
    config = SelectionConfig()
    found = rejection.summary(rejection.select(groups, config), config)
    assert found["mean_reward"] == 3 / 8
    assert found["pass_at_1"] == (2 / 4 + 0) / 2  # a right answer that was cut off does not count
    assert found["pass_at_2"] == (1 - 1 / 6) / 2
    assert found["best_of_2"] == pytest.approx(((1 - 1 / 6) + 3 / 6) / 2)
    assert found["best_of_4"] == 1
    assert found["share_truncated"] == 1 / 8
    assert found["histogram"]["counts"][0] == 5
    assert (found["answered_prompts"], found["pairs"]) == (1, 1)


def test_prompts_are_asked_once_and_under_names_of_their_own() -> None:
    tasks = [Task("a", assistants.user("One?"), PROMPT.check), Task("a", assistants.user("Two?"), PROMPT.check)]
    given = [
        Dialogue("a", (*assistants.user("One?"), assistants.said("1"))),
        Dialogue("b", (*assistants.user("Three?"), assistants.said("3"))),
    ]
    both = rejection.asked(tasks, given, Prompts.both, most=None, is_ranked=True)
    assert [(one.name, one.messages[0]["content"]) for one in both] == [("a", "One?"), ("a'", "Two?"), ("b", "Three?")]
    assert both[0].check == PROMPT.check
    assert len(rejection.asked(tasks, given, Prompts.both, most=2, is_ranked=True)) == 2
    assert [one.name for one in rejection.asked(tasks, given, Prompts.dialogues, most=None, is_ranked=True)] == [
        "a",
        "b",
    ]


@given(rows=st.integers(0, 30), most=st.integers(0, 30))
def test_evenly_spaced_rows_are_as_many_as_asked_for_and_reach_every_part(rows: int, most: int) -> None:
    found = rejection.evenly(range(rows), most)
    assert len(found) == min(rows, most)
    assert found == sorted(set(found))
    gaps = [after - before for before, after in zip([*found, rows][:-1], [*found, rows][1:], strict=True)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert rejection.evenly(range(rows), None) == list(range(rows))


def test_a_prompt_that_nobody_can_judge_is_named() -> None:
    with pytest.raises(ValueError, match="a has no check: only a reward model"):
        rejection.asked([Task("a", assistants.user("One?"), {})], [], Prompts.tasks, most=None, is_ranked=False)
    wrong = Task("b", assistants.user("One?"), {"kind": "guess"})
    with pytest.raises(ValueError, match=r"b: check\.kind must be one of"):
        rejection.asked([wrong], [], Prompts.tasks, most=None, is_ranked=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gate": 2.0},
        {"min_margin": -1.0},
        {"min_score": float("nan")},
        {"duplicate_threshold": 0.0},
        {"shingle_words": 0},
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"selection\.{next(iter(wrong))} must be"):
        SelectionConfig(**wrong)
