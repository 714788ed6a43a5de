"""Refusals by their phrases, listed words as whole words, and lists that are read or refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llamita.align import refusals

SAFETY = Path(__file__).resolve().parents[3] / "shared" / "data" / "safety"


@pytest.mark.parametrize(
    ("answer", "is_refusal"),
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("Unfortunately, I cannot\nassist.", True),
        ("Sure! First, you need a pan.", False),
        ("A cannot-opener is a tool.", False),
        ("Aloe cools: use it as an aid.", False),
        ("Lufthansa, as an airline, flies there.", False),
        ("As a responsible pet owner, you should vaccinate your dog.", False),
        ("I can't wait to help! First, boil water.", False),
        ("I cannot stress enough how good it is.", False),
        ("I'm sorry to hear that you are ill. Tea helps.", False),
        ("I'm sorry to hear that, but I can't help with it.", True),
        ("As an AI, I do not do that.", True),
        ("As a responsible AI assistant, I do not do that.", True),
        ("I won't do that.", True),
        ("", False),
        ("Here is how. " * 40 + "I'm sorry", False),  # only the beginning counts
    ],
)
def test_a_refusal_is_told_by_how_it_begins(answer: str, is_refusal: bool) -> None:
    assert refusals.is_refusal(answer) is is_refusal


def test_a_listed_word_is_found_whole_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "words").write_text("# a remark\nDarn\nbad egg  # two\n\n")
    words = refusals.read_words(tmp_path / "words")
    assert words == ["darn", "bad egg"]
    assert [refusals.holds(text, words) for text in ("DARN!", "darning", "a bad egg.", "bad  eggs")] == [1, 0, 1, 0]
    (tmp_path / "words").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no words"):
        refusals.read_words(tmp_path / "words")


def test_prompts_are_read_from_each_kind_of_file(tmp_path: Path) -> None:
    csv, jsonl = 'id,prompt\n1,"a, b"\n2,c\n', '{"prompt": "a, b"}\n{"prompt": "c"}\n'
    (tmp_path / "list.csv").write_text(csv, encoding="utf-8-sig")
    (tmp_path / "list.jsonl").write_text(jsonl)
    (tmp_path / "list.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    for path in tmp_path.iterdir():
        assert refusals.read_prompts(path, "prompt") == ["a, b", "c"]
        assert refusals.read_prompts(path, "prompt", most=1) == ["a, b"]


def test_a_labelled_file_gives_the_prompts_of_one_label(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,bad\nb,good\nc,bad\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "H": 1}\n{"text": "b", "H": 0}\n{"text": "unknown"}\n')
    for name, where, wanted in (
        ("a.csv", {"label": "bad"}, ["a", "c"]),
        ("a.jsonl", {"H": "1"}, ["a"]),
        ("a.jsonl", {"H": "0"}, ["b"]),
    ):
        assert refusals.read_prompts(tmp_path / name, "text", where=where) == wanted
        assert refusals.read_prompts(tmp_path / name, "text", where=where, most=1) == wanted[:1]
    with pytest.raises(ValueError, match=r"a.csv has no row where label=ugly"):
        refusals.read_prompts(tmp_path / "a.csv", "text", where={"label": "ugly"})


@pytest.mark.skipif(not SAFETY.is_dir(), reason="shared/data is not here")
def test_the_labels_of_the_real_files_part_them() -> None:
    moderation, surge = SAFETY / "openai-moderation/samples-1680.jsonl.gz", SAFETY / "surge-toxicity/toxicity_en.csv"
    counts = [len(refusals.read_prompts(moderation, "prompt", where={"V": label})) for label in "01"]
    counts += [len(refusals.read_prompts(surge, "text", where={"is_toxic": label})) for label in ("Toxic", "Not Toxic")]
    assert counts == [1356, 94, 501, 499]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "id,text\n1,b\n", "row 1 has no text in 'prompt'; it has id, text"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "row 2 has no text in 'prompt'"),
        ("a.jsonl", "{", "not JSON lines"),
        ("a.txt", "a", r"must be a \.csv or \.jsonl file"),
        ("a.csv", "prompt\n", "has no rows"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        refusals.read_prompts(tmp_path / name, "prompt")
    with pytest.raises(ValueError, match="does not exist"):
        refusals.read_prompts(tmp_path / "none.csv", "prompt")
