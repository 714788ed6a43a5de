"""Each of IFEval's 25 kinds on an answer that follows it and on one that does not; and as lm-eval judges them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llamita.align import ifeval, verifiers
from llamita.align.ifeval import Variant

FREQUENT = {"keyword": "war", "frequency": 2, "relation": "at least"}
FIRST = {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "president"}

EXAMPLES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["mom", "mother"]}, "Mom, my MOTHER", "mom only"),
    ("keywords:frequency", FREQUENT, "War and warriors", "war"),
    ("keywords:frequency", {**FREQUENT, "relation": "less than"}, "war", "war war"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocks", "a Rock."),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "#a #b", "#a"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Dr. No is in.",
        "A b. C d.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b-c", "a b"),
    ("length_constraints:nth_paragraph_first_word", FIRST, 'a\n\n"President, b', "a\n\nThe president"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. more", "PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S more", "P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a"),
    ("detectable_format:constrained_response", {}, "Well: My answer is maybe.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* ** **"),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1 a\nDay 2 b", "Day 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A tale>>\nOnce", "<< >>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, " say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "Anything else?"}, '"So. anything else?" ', "Anything else? No."),
    ("startend:quotation", {}, ' "a" ', '"a'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG 4", "BIG"),
    ("change_case:english_capital", {}, "THE CAT SITS ON THE MAT.", "The cat sits on the mat."),
    ("change_case:english_lowercase", {}, "the cat sits on the mat.", "The cat sits on the mat."),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("name", "given", "follows", "fails"), EXAMPLES)
def test_an_instruction_is_followed_by_what_follows_it(
    name: str, given: dict[str, Any], follows: str, fails: str
) -> None:
    others = {"num_words": None, "keywords": None} if not {"num_words", "keywords"} & given.keys() else {}
    ifeval.validate(name, {**given, **others})
    assert ifeval.follows(name, {**given, **others}, follows, Variant.strict) is True
    assert ifeval.follows(f"en:{name}", given, fails, Variant.strict) is False


def test_all_25_kinds_have_an_example() -> None:
    assert len(ifeval.KINDS) == 25
    assert {name for name, *_ in EXAMPLES} == set(ifeval.KINDS) - {"language:response_language"}


def test_an_empty_answer_follows_nothing() -> None:
    for name, given, _, _ in EXAMPLES:
        assert ifeval.follows(name, given, " \n", Variant.loose) is False


@pytest.mark.parametrize(
    ("strict", "answer"),
    [
        ((True, True), '"quoted"'),
        ((False, True), 'Sure:\n"quoted"'),
        ((False, True), '"quoted"\nHope it helps!'),
        ((False, True), 'Sure:\n**"quoted"**\nHope it helps!'),
        ((False, False), 'It is "quoted" here'),
    ],
)
def test_loose_forgives_a_greeting_a_farewell_and_marks(strict: tuple[bool, bool], answer: str) -> None:
    found = tuple(ifeval.follows("startend:quotation", {}, answer, variant) for variant in Variant)
    assert found == strict


def test_what_cannot_be_told_is_neither_followed_nor_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a library for languages one kind is not checkable, and a reward counts the others only."""
    monkeypatch.setattr(ifeval, "can_tell_languages", lambda: False)
    names = ["language:response_language", "punctuation:no_comma"]
    check = {"kind": "ifeval", "instruction_id_list": names, "kwargs": [{"language": "kn"}, {}]}
    verifiers.validate(check)
    assert verifiers.followed(check, "no marks", Variant.strict) == [None, True]
    assert verifiers.check(check, "no marks") == 1
    alone = {"kind": "ifeval", "instruction_id_list": names[:1], "kwargs": [{"language": "kn"}]}
    verifiers.validate(alone)
    assert not verifiers.is_checkable(alone)
    assert verifiers.is_checkable(check)
    assert verifiers.check(alone, "no marks") == 0
    assert ifeval.follows("change_case:english_lowercase", {}, "die katze schläft tief", Variant.strict) is True


def test_a_language_is_told_where_the_library_is() -> None:
    pytest.importorskip("langdetect", reason="langdetect is not installed")
    german = "die katze liegt auf dem sofa und schläft den ganzen tag"
    assert ifeval.follows("language:response_language", {"language": "de"}, german, Variant.strict) is True
    assert ifeval.follows("language:response_language", {"language": "fi"}, german, Variant.strict) is False
    assert ifeval.follows("change_case:english_lowercase", {}, german, Variant.strict) is False


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("keywords:frequency", {"keyword": "a"}, "needs the arguments ['frequency', 'keyword', 'relation']"),
        ("keywords:frequency", {**FREQUENT, "relation": "at most"}, "one of less than, at least"),
        ("keywords:frequency", {**FREQUENT, "frequency": "two"}, "of type int"),
        ("keywords:existence", {"keywords": []}, "a list of words"),
        ("length_constraints:nth_paragraph_first_word", {**FIRST, "nth_paragraph": 0}, "nth_paragraph is 0"),
        ("punctuation:no_comma", {"letter": "a"}, "needs the arguments []"),
    ],
)
def test_a_wrong_argument_is_named(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        ifeval.validate(name, given)
    assert message in str(caught.value)


def test_sentences_end_where_a_reader_ends_them() -> None:
    texts = {
        "One. Two! Three?": 3,
        "Wait... what? Yes.": 2,
        'He said "No." Then he left.': 2,
        "Mr. J. Smith (of Acme Inc. in the U.S.) paid $3.50.": 1,
        "1. First point.\n2. Second point.": 2,
        "no mark at all": 1,
        "": 0,
    }
    assert {text: ifeval.sentences(text) for text in texts} == texts


def test_every_published_prompt_is_a_valid_check() -> None:
    file = Path(__file__).resolve().parents[3] / "shared/data/ifeval/en_input_data.jsonl"
    if not file.is_file():
        pytest.skip("IFEval's input data is not on this machine")
    kinds = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        verifiers.validate({"kind": "ifeval", **{key: row[key] for key in ("instruction_id_list", "kwargs")}})
        kinds |= set(map(ifeval.name_of, row["instruction_id_list"]))
    assert kinds == set(ifeval.KINDS)


def test_lm_eval_judges_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind on each example's answers, altered in the ways that answers differ."""
    for module in ("nltk", "langdetect", "immutabledict"):
        pytest.importorskip(module, reason=f"lm-eval's IFEval needs {module}")
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    alone = [text for _, _, *both in EXAMPLES for text in both]
    answers = [*alone, *(f"{text}\n{end}" for text in alone for end in ("P.S. x", "******\nb", "* a, B"))]
    compared = 0
    for name, given, _, _ in EXAMPLES:
        instruction = INSTRUCTION_DICT[name](name)
        if given.get("letter") == "#":
            given = {**given, "letter": "t"}  # lm-eval draws a letter of its own where it is none
        instruction.build_description(**given)
        for answer in answers:
            try:
                expected = instruction.check_following(answer)
            except LookupError:
                continue  # the data of NLTK's splitter are not on this machine
            assert ifeval.follows(name, given, answer, Variant.strict) == bool(expected), (name, answer)
            compared += 1
    assert compared > 2000
    assert "lm_eval" in sys.modules
