"""Whether an answer follows instructions that a program can check: the 25 kinds of IFEval.

Zhou et al., 2023, arXiv:2311.07911: table 4 describes the instructions, section 3.1 the two measures. Strict: the
answer as it is. Loose: the answer or one of the seven that come of taking away markdown's ``*``, the first line, the
last line, or several of these. The ids and arguments are those of the published input data, with or without ``en:``.

Three kinds need to know a language. ``language:response_language`` is judged where ``langdetect`` is installed and is
otherwise not checkable. ``change_case:*`` asks for English and for a case: without ``langdetect`` the case alone
decides. Sentences and words are told by the rules of this file, not by NLTK's trained splitter, which is not at hand on
a machine without a network; the two differ where a sentence ends in an abbreviation.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""Of ``constrained_response``; the answer must hold one of them."""
_SHORT = """
    mr mrs ms dr prof rev gen col capt lt sgt st jr sr vs inc ltd co corp etc e.g i.e cf al fig vol p pp approx
    dept est jan feb mar apr jun jul aug sep sept oct nov dec u.s u.k a.m p.m ph.d
"""
ABBREVIATIONS = frozenset(_SHORT.split())
# Possessive and behind no other mark: a run of a thousand full stops is looked at once, not a thousand times.
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*+(?=\s++(\S))")
_LONGEST_WORD = 60
_CAPITAL_WORD = re.compile(r"[^\W_][\w'’.\-]*")


class Variant(StrEnum):
    """How much is forgiven."""

    strict = "strict"
    loose = "loose"


def can_tell_languages() -> bool:
    """Whether the library is there that tells languages apart."""
    return importlib.util.find_spec("langdetect") is not None


def sentences(text: str) -> int:
    """Sentences of a text: it is cut behind ``.``, ``!`` or ``?`` where white space and no small letter follows.

    An abbreviation, a single initial and the number of a list's item end none.
    """
    count = 1 if text.strip() else 0
    for found in _SENTENCE_END.finditer(text):
        before, word = _last_word(text[max(0, found.start() - _LONGEST_WORD) : found.start()])
        bare = word.lstrip("\"'“‘([*_")
        last = bare.lower()
        only_full_stop = found.group() == "."
        is_item = last.isdigit() and before.rstrip(" \t")[-1:] in ("", "\n")
        is_short = last in ABBREVIATIONS or (len(bare) == 1 and bare.isupper() and bare != "I") or is_item
        if not (only_full_stop and is_short) and not found.group(1).islower():
            count += 1
    return count


def _last_word(text: str) -> tuple[str, str]:
    word = (text.rsplit(None, 1) or [""])[-1] if text and not text[-1].isspace() else ""
    return text[: len(text) - len(word)], word


def words(text: str) -> int:
    """Words of a text: runs of letters, digits and ``_``."""
    return len(re.findall(r"\w+", text))


@cache
def _detector() -> Any:
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws at random, and would else answer now so, now so
    return langdetect


def _is_language(text: str, language: str) -> bool | None:
    """Whether a text is in a language; None where nothing here can tell."""
    if not can_tell_languages():
        return None
    langdetect = _detector()
    try:
        return bool(langdetect.detect(text) == language)
    except langdetect.LangDetectException:
        return True  # nothing that has a language: digits, marks; the paper's authors count it as followed


def _in_english(text: str) -> bool:
    return _is_language(text, "en") is not False


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _occurrences(text: str, keyword: str) -> int:
    return text.lower().count(keyword.lower())


def _parts(text: str, divider: str) -> list[str] | None:
    """What stands between dividers, without an empty begin or end; None where one between two dividers is empty."""
    parts = [part.strip() for part in text.split(divider)]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return parts if all(parts) else None


def _existence(text: str, keywords: Sequence[str]) -> bool:
    return all(_occurrences(text, keyword) for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(_occurrences(text, keyword), relation, frequency)


def _forbidden(text: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letters(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(_occurrences(text, letter), let_relation, let_frequency)


def _num_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(sentences(text), relation, num_sentences)


def _num_words(text: str, num_words: int, relation: str) -> bool:
    return _compare(words(text), relation, num_words)


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _parts(text, "***")
    return parts is not None and len(parts) == num_paragraphs


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = text.split("\n\n")
    if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    begin = paragraphs[nth_paragraph - 1].split()[:1]
    return bool(begin) and re.split(r"[.,?!'\"]", begin[0].lstrip("'\""))[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = re.sub(r"[^a-z]", "", postscript_marker.lower())
    if letters in ("ps", "pps"):
        # The dots and spaces of P.S. are written in many ways; the one after the last letter may be missing in P.P.S.
        last = r"\." if letters == "ps" else ""
        pattern = r"\.\s?".join(letters) + last
    else:
        pattern = re.escape(postscript_marker.lower())
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    lines = [line.strip() for line in text.split("\n")]
    return sum(bool(re.match(r"\*[^*]|-", line)) for line in lines) == num_bullets


def _one_of_options(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def _highlights(text: str, num_highlights: int) -> bool:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in [*single, *double]) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", text)) >= num_sections


def _json(text: str) -> bool:
    inside = text.strip().removesuffix("```")
    for opening in ("```json", "```Json", "```JSON", "```"):
        if inside.startswith(opening):
            inside = inside.removeprefix(opening)
            break
    try:
        json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    for line in text.split("\n"):
        _, opened, rest = line.partition("<<")
        inside, closed, _ = rest.rpartition(">>")
        if opened and closed and inside.strip("<> \t"):
            return True
    return False


def _two_responses(text: str) -> bool:
    parts = _parts(text, "******")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in _CAPITAL_WORD.findall(text))
    return _compare(count, capital_relation, capital_frequency)


def _capital(text: str) -> bool:
    return text.isupper() and _in_english(text)


def _lowercase(text: str) -> bool:
    return text.islower() and _in_english(text)


def _no_comma(text: str) -> bool:
    return "," not in text


def _quoted(text: str) -> bool:
    stripped = text.strip()
    return len(stripped) > 1 and stripped[0] == stripped[-1] == '"'


def _language(text: str, language: str) -> bool | None:
    return _is_language(text, language)


@dataclass(frozen=True)
class Kind:
    """A check and the arguments that it needs."""

    follows: Callable[..., bool | None]
    arguments: Mapping[str, type]


KINDS: Mapping[str, Kind] = {
    "keywords:existence": Kind(_existence, {"keywords": list}),
    "keywords:frequency": Kind(_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": Kind(_forbidden, {"forbidden_words": list}),
    "keywords:letter_frequency": Kind(_letters, {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": Kind(_language, {"language": str}),
    "length_constraints:number_sentences": Kind(_num_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": Kind(_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": Kind(_num_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": Kind(
        _first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Kind(_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": Kind(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Kind(_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": Kind(_one_of_options, {}),
    "detectable_format:number_highlighted_sections": Kind(_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": Kind(_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": Kind(_json, {}),
    "detectable_format:title": Kind(_title, {}),
    "combination:two_responses": Kind(_two_responses, {}),
    "combination:repeat_prompt": Kind(_repeats, {"prompt_to_repeat": str}),
    "startend:end_checker": Kind(_ends, {"end_phrase": str}),
    "startend:quotation": Kind(_quoted, {}),
    "change_case:capital_word_frequency": Kind(_capital_words, {"capital_frequency": int, "capital_relation": str}),
    "change_case:english_capital": Kind(_capital, {}),
    "change_case:english_lowercase": Kind(_lowercase, {}),
    "punctuation:no_comma": Kind(_no_comma, {}),
}
RELATIONS = ("less than", "at least")


def name_of(instruction_id: str) -> str:
    """The kind that an id names, without its language."""
    return instruction_id.removeprefix("en:")


def arguments_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are set: some copies of the data write every other kind's as null."""
    return {name: value for name, value in given.items() if value is not None}


def validate(instruction_id: str, given: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for an unknown kind, and for arguments that are not its own."""
    if (kind := KINDS.get(name_of(instruction_id))) is None:
        raise ValueError(f"instruction {instruction_id!r} is unknown; known are {', '.join(KINDS)}")
    arguments = arguments_of(given)
    if arguments.keys() != kind.arguments.keys():
        raise ValueError(f"{instruction_id} needs the arguments {sorted(kind.arguments)}, got {sorted(arguments)}")
    for name, wanted in kind.arguments.items():
        value: Any = arguments[name]
        is_of_type = isinstance(value, wanted) and not isinstance(value, bool)
        if not is_of_type:
            raise ValueError(f"{instruction_id}: {name} must be of type {wanted.__name__}, got {value!r}")
        if wanted is list and not (value and all(isinstance(item, str) and item for item in value)):
            raise ValueError(f"{instruction_id}: {name} must be a list of words, got {value!r}")
        if wanted is str and not value:
            raise ValueError(f"{instruction_id}: {name} is empty")
        if wanted is int and value < (1 if name == "nth_paragraph" else 0):
            raise ValueError(f"{instruction_id}: {name} is {value}")
        if name.endswith("relation") and value not in RELATIONS:
            raise ValueError(f"{instruction_id}: {name} must be one of {', '.join(RELATIONS)}, got {value!r}")


def is_checkable(instruction_id: str) -> bool:
    """Whether this machine can tell if the instruction was followed."""
    return name_of(instruction_id) != "language:response_language" or can_tell_languages()


def loosened(answer: str) -> list[str]:
    """The answer, and those that come of it by taking away ``*``, the first line, the last line."""
    found = []
    for first, last, marks in itertools.product((False, True), repeat=3):
        lines = answer.split("\n")[1 if first else 0 :]
        text = "\n".join(lines[:-1] if last else lines)
        text = text.strip() if first or last else text
        found.append(text.replace("*", "") if marks else text)
    return found


def follows(instruction_id: str, given: Mapping[str, Any], answer: str, variant: Variant) -> bool | None:
    """Whether an answer follows an instruction; None where this machine cannot tell. An empty answer follows none."""
    if not is_checkable(instruction_id):
        return None
    kind, arguments = KINDS[name_of(instruction_id)], arguments_of(given)
    tried = [answer] if variant is Variant.strict else loosened(answer)
    return any(text.strip() and kind.follows(text, **arguments) for text in tried)
