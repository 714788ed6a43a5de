"""A check gives what its definition says, tells every wrong check, and is never slow nor led to run an answer."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamita.align import verifiers

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("She has 3 and 4.\n#### 18", 18),
        ("#### $70,000", 70000),
        ("#### 18\n\nLet me know if you have 2 more questions.", 18),
        ("The answer is $1,234.50, not 7.", Fraction(2469, 2)),
        ("The answer is 5 + 3 = 8 apples.", 8),
        ("**Answer:** 42 days", 42),
        (r"the answer is \(\boxed{\frac{1}{2}}\). I took 3 steps", Fraction(1, 2)),
        (r"\boxed{3} no, \boxed{4}", 4),
        ("5 - 3 = 2", 2),
        ("5-3", 3),
        ("x = -3/4", Fraction(-3, 4)),
        ("it is −5.0", -5),
        ("2.5e3 grams", 2500),
        ("12/0", 12),
        ("about .5", Fraction(1, 2)),
        ("18.", 18),
        ("1, 2, 3", 3),
        (r"1{,}234", 1234),
        ("the answer is unknown, perhaps 9", 9),
        ("Answer\n- 72 apples", 72),
        ("**Answer** - 72", 72),
        ("The total is – 72.", 72),
        ("### Final answer\n- $18", 18),
        ("#### -72", -72),
        (r"it is -$18, or -\$18", -18),
        (r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)),
        ("Answer: Janet has 16 - 3 - 4 = 9 eggs left.\nShe makes 9 * 2 = $18 a day.", 18),
        ("To find the answer: first compute 16 - 7 = 9.\nThen 9 x 2 = 18.", 18),
        ("Answer: She eats 3 of 16, and 16 - 3 = 13. Then 13 x 2 = 26.", 26),
        ("Answer: 16 bars for 8 children are 16/8 = 2 each", 2),
        ("Answer: 18 (9 eggs, price = $2)", 18),
        ("The answer is 10 because x = 3", 10),
        ("The final answer is 72 = 6*12", 72),
        ("The answer is 2 * 3 + 4 = 6 + 4 = 10", 10),
        ("The answer is 5 apples + 3 pears = 8 fruits", 8),
        ("The answer is 5 + 3 = ?", 5),
        (r"\boxed{\frac{1}{2} + \frac{1}{2} = 1}", 1),
        (r"\boxed{f(2) = 5}", 5),
        ("**Answer:**\n\n42 = 6 * 7", 42),
        ("#### 18\nIs the answer: 3?\nNo, 4.", 18),
        ("no number", None),
        ("9" * 70, None),
    ],
)
def test_the_final_number_is_the_marked_one_and_else_the_last(answer: str, number: Fraction | int | None) -> None:
    assert verifiers.final_number(answer) == number


@pytest.mark.skipif(not REAL.is_file(), reason="shared/data is not here")
def test_the_worked_answers_of_gsm8k_earn_their_reward_however_the_last_line_is_written() -> None:
    rows = [json.loads(line)["answer"].rpartition("####") for line in REAL.read_text().splitlines()]
    assert len(rows) == 1319
    for last in ("#### {}", "Answer\n- {}", "**Answer** - {}", "**Answer:**\n- {}", "The answer is {}.", "Answer: ${}"):
        for worked, _, number in rows:
            answer = worked + last.format(number.strip())
            assert verifiers.check({"kind": "number", "answer": number.strip()}, answer) == 1, answer


@given(top=st.integers(-(10**9), 10**9), places=st.integers(0, 4), comma=st.booleans())
def test_a_number_is_equal_however_it_is_written(top: int, places: int, comma: bool) -> None:
    """Exactly, not by rounding: 0.1 + 0.2 of a program is not 0.3."""
    value = Fraction(top, 10**places)
    written = f"{top:,}" if comma and not places else f"{'-' * (top < 0)}{abs(top) // 10**places}"
    written += f".{abs(top) % 10**places:0{places}d}00" if places else ".0"
    assert verifiers.numbers(f"so {written} apples") == [value]
    check = {"kind": "number", "answer": str(value)}
    verifiers.validate(check)
    assert verifiers.check(check, f"#### {written}") == 1
    assert verifiers.check({**check, "answer": str(value + Fraction(1, 10**9))}, f"#### {written}") == 0


def test_an_unmarked_number_does_not_count_where_a_mark_is_asked_for() -> None:
    check = {"kind": "number", "answer": 18, "marked": True}
    verifiers.validate(check)
    assert verifiers.check(check, "It costs 18") == 0
    assert verifiers.check(check, "#### 18") == 1
    assert verifiers.check(check, "The answer is 18.\nLet me know if you have 2 more questions.") == 1


@pytest.mark.parametrize(
    ("check", "rewards"),
    [
        ({"kind": "regex", "pattern": r"\d+ cats?"}, {"3 cats": 1, " 3 cats\n": 1, "3 cats!": 0, "": 0}),
        ({"kind": "format", "pattern": "a.*b"}, {"a\nb": 1, "a": 0}),
        (
            {"kind": "format", "tags": ["think", "answer"]},
            {
                "<think>hm</think>\n<answer>3</answer>": 1,
                "<think>hm</think> so <answer>3</answer>": 0,
                "<answer>3</answer><think>hm</think>": 0,
                "<think> </think><answer>3</answer>": 0,
                "<think>a<think>b</think><answer>3</answer>": 0,
            },
        ),
        ({"kind": "contains", "all": ["Ada", "Bo"], "none": ["Cy"]}, {"Ada": 2 / 3, "Ada Bo": 1, "Ada Bo Cy": 2 / 3}),
        ({"kind": "contains", "any": ["yes", "no"], "ignore_case": True}, {"Yes": 1, "maybe": 0}),
        ({"kind": "length", "min": 2, "max": 4}, {"a": 0.5, "a b": 1, "a b c d": 1, "a b c d e": 0.75, "a " * 9: 0}),
        ({"kind": "length", "max": 3, "unit": "characters"}, {"abc": 1, "abcdef": 0}),
        ({"kind": "length", "min": 2, "unit": "sentences"}, {"One. Two.": 1, "Dr. Who.": 0.5}),
    ],
)
def test_a_check_gives_what_its_definition_says(check: dict[str, Any], rewards: dict[str, float]) -> None:
    verifiers.validate(check)
    assert {answer: verifiers.check(check, answer) for answer in rewards} == pytest.approx(rewards)


CODE = 'def area(w, h):\n    """Width times height."""\n    return w * h\n'


@pytest.mark.parametrize(
    ("extra", "answer", "reward"),
    [
        ({}, CODE, 1),
        ({}, f"Here it is:\n\n```python\n{CODE}```\nIt multiplies.", 1),
        ({}, f"```python\n{CODE}```\nIt prints\n```\n6 square metres\n```", 1),
        ({}, f"```Python3\n{CODE}```\n```\n6 square metres", 1),
        ({}, f"Here it is:\n\n```python\n{CODE}", 1),
        ({}, "```\nx = 1\n```\nand\n```\ny = 2", 1),
        ({}, f"```\n{CODE}", 1),  # cut before the fence was closed
        ({}, "Here it is.", 0),
        ({}, "Sure", 0),
        ({}, '"a sentence in quotes"', 0),
        ({}, "def f(:", 0),
        ({}, f"```json\n{{}}\n```\n{CODE}", 0),  # the only block is none of Python
        ({"function": "area"}, CODE, 1),
        ({"function": "volume"}, CODE, 0.5),
        ({"function": "area", "arguments": ["w", "h"], "docstring": True}, CODE, 1),
        ({"function": "area", "arguments": ["h", "w"], "docstring": False}, CODE, 0.5),
        ({"function": "area", "arguments": [], "docstring": True}, "x = 1", 0.25),
        ({"docstring": False}, "async def f(): pass", 1),
        ({"function": "m", "arguments": ["x"]}, "class A:\n    def m(self, x): ...", 1),
        ({"function": "m", "arguments": ["self", "x"]}, "def m(self, x): ...", 1),
    ],
)
def test_python_earns_the_share_of_demands_that_hold(extra: dict[str, Any], answer: str, reward: float) -> None:
    check = {"kind": "python", **extra}
    verifiers.validate(check)
    assert verifiers.check(check, answer) == reward


def test_nothing_of_an_answer_is_ever_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w').close()\n"
    assert verifiers.check({"kind": "python"}, f"{code}def f(x=open({str(mark)!r}, 'w')): pass") == 1
    assert not mark.exists()


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "numbre", "answer": 1}, "must be one of number, regex, format, python, ifeval, contains, length"),
        ({}, "got None"),
        ({"kind": "number"}, "check number lacks answer"),
        ({"kind": "number", "answer": 1, "tolerance": 2}, "has no tolerance; allowed are answer, marked"),
        ({"kind": "number", "answer": "none"}, "must hold one number"),
        ({"kind": "number", "answer": "1 or 2"}, "must hold one number"),
        ({"kind": "number", "answer": True}, "must be a number"),
        ({"kind": "number", "answer": 1, "marked": "yes"}, "marked must be true or false"),
        ({"kind": "regex", "pattern": "("}, "is not a regular expression"),
        ({"kind": "format"}, "either tags or pattern"),
        ({"kind": "format", "tags": ["a b"]}, "tags must be names"),
        ({"kind": "format", "tags": "think"}, "tags must be a list"),
        ({"kind": "python", "arguments": ["x"]}, "give its name too"),
        ({"kind": "python", "function": "1x"}, "must be a name"),
        ({"kind": "python", "function": "f", "arguments": ["1x"]}, "arguments must be names"),
        ({"kind": "python", "docstring": 1}, "docstring must be true or false"),
        ({"kind": "contains"}, "give all, any or none"),
        ({"kind": "contains", "all": []}, "must be a list of texts"),
        ({"kind": "length"}, "give min, max or both"),
        ({"kind": "length", "min": 5, "max": 3}, "min 5 is above max 3"),
        ({"kind": "length", "min": 0}, "at least 1"),
        ({"kind": "length", "min": 1, "unit": "tokens"}, "unit must be one of words, characters, sentences"),
        ({"kind": "ifeval", "instruction_id_list": [], "kwargs": []}, "must be a list of ids"),
        ({"kind": "ifeval", "instruction_id_list": ["a"], "kwargs": []}, "one mapping for each of the 1"),
        ({"kind": "ifeval", "instruction_id_list": ["a:b"], "kwargs": [{}]}, "'a:b' is unknown; known are keywords:"),
    ],
)
def test_a_wrong_check_is_refused_with_what_is_allowed(check: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        verifiers.validate(check)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        "<",
        "[",
        "*",
        "#",
        ".",
        "```\n",
        "```x\n",
        "answer is ",
        "answer: 1 = ",
        "5 + 3 a ",
        "\\boxed{",
        "-",
        "(",
        "\n\n",
        "1,234",
    ],
)
def test_an_answer_that_repeats_itself_is_judged_in_linear_time(answer: str) -> None:
    """A model that got stuck must not hold up the run: ten times the answer, about ten times the time."""
    checks: list[dict[str, Any]] = [
        {"kind": "number", "answer": 1},
        {"kind": "python"},
        {
            "kind": "ifeval",
            "instruction_id_list": [f"detectable_format:{name}" for name in ("title", "json_format")]
            + ["length_constraints:number_sentences"],
            "kwargs": [{}, {}, {"num_sentences": 2, "relation": "at least"}],
        },
    ]
    begin = time.process_time()
    for check in checks:
        verifiers.check(check, (answer * verifiers.MAX_CHARACTERS)[: verifiers.MAX_CHARACTERS])
    assert time.process_time() - begin < 5  # measured: 0.02 to 0.5 s; quadratic would be minutes
    assert verifiers.check({"kind": "length", "min": 1}, "a" * (verifiers.MAX_CHARACTERS + 1)) == 0


def test_a_fence_whose_line_never_ends_is_read_in_linear_time() -> None:
    begin = time.process_time()
    for unit in ("-", " "):
        assert verifiers.check({"kind": "python"}, f"```{unit * (verifiers.MAX_CHARACTERS - 4)}x") == 0
    assert time.process_time() - begin < 2  # quadratic it was 25 s each


def test_a_pattern_that_needs_exponential_time_earns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifiers, "REGEX_SECONDS", 0.05)
    assert verifiers.check({"kind": "regex", "pattern": "(?:a|a)+(?:a|a)+c"}, "a" * 5000 + "b") == 0
