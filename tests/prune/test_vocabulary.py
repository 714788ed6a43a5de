"""Cutting a vocabulary: what a token is made of, which stay, and what the smaller tokenizer does with any text."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import vocabularies
from llamita.prune import remap
from llamita.prune.vocabulary import BYTES, Bpe, Counts, Kept, check_size, choose, count, lengths

KINDS = {"trained": vocabularies.trained, "like_llama3": vocabularies.like_llama3}
SIZES = (300, 600, 1100)
AWKWARD = "naïve 😀👩‍👩‍👧 漢字かな交じり文\r\n\tdef f(x):\n    return x**2  # ½ — “quoted”\u0000\ufffd <|eot_id|>"


class Cut:
    """A tokenizer and what is left of it."""

    def __init__(self, kind: str, size: int) -> None:
        definition = json.loads(KINDS[kind]())
        self.old = Tokenizer.from_str(KINDS[kind]())
        ids = self.old.encode(vocabularies.corpus(), add_special_tokens=False).ids
        self.bpe = Bpe.read(definition)
        self.counts = count([np.array(ids)], 1200)
        self.kept = choose(self.bpe, self.counts, size)
        self.new = Tokenizer.from_str(json.dumps(remap.tokenizer(definition, self.kept)))

    def words_that_stay(self, text: str) -> list[tuple[str, list[int]]]:
        """Words of a text whose old ids are all kept, with those ids moved."""
        pairs = [(word, vocabularies.tokens_of(self.old, word)) for word in vocabularies.words(self.old, text)]
        new = self.kept.new_ids
        return [(word, [new[index] for index in ids]) for word, ids in pairs if all(index in new for index in ids)]


CUTS = {(kind, size): Cut(kind, size) for kind in KINDS for size in SIZES}
every_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=[f"{kind}-{size}" for kind, size in CUTS])


def pieces() -> st.SearchStrategy[str]:
    """Pieces of real text and code, and any text at all."""
    text = vocabularies.corpus()
    begins = st.integers(0, len(text) - 400)
    real = st.builds(lambda begin, size: text[begin : begin + size], begins, st.integers(1, 400))
    return st.lists(st.one_of(real, st.text(max_size=20), st.just(AWKWARD)), max_size=4).map("".join)


@every_cut
@given(text=pieces())
def test_any_text_survives_the_smaller_vocabulary(cut: Cut, text: str) -> None:
    ids = cut.new.encode(text, add_special_tokens=False).ids
    assert all(0 <= index < len(cut.kept.old_ids) for index in ids)
    assert cut.new.decode(ids, skip_special_tokens=False) == text


@every_cut
@given(text=pieces())
def test_a_word_whose_tokens_all_stay_keeps_its_tokens(cut: Cut, text: str) -> None:
    for word, ids in cut.words_that_stay(text):
        assert vocabularies.tokens_of(cut.new, word) == ids


@every_cut
def test_a_text_of_words_that_stay_keeps_its_ids(cut: Cut) -> None:
    """The same of whole texts, special tokens and their template included."""
    lines = [*vocabularies.corpus().splitlines()[:3000], "a<|eot_id|>b"]
    old_ids = [cut.old.encode(text).ids for text in lines]
    stays = [(text, ids) for text, ids in zip(lines, old_ids, strict=True) if set(ids) <= cut.kept.new_ids.keys()]
    assert len({text for text, _ in stays}) > 2
    for text, ids in stays:
        assert cut.new.encode(text).ids == [cut.kept.new_ids[index] for index in ids]


@every_cut
def test_every_token_that_could_be_written_before_can_be_written_now(cut: Cut) -> None:
    """Whatever stays is made of what stays."""
    reachable = 0
    for old, new in cut.kept.new_ids.items():
        if old in cut.bpe.texts and vocabularies.tokens_of(cut.old, cut.bpe.texts[old]) == [old]:
            assert vocabularies.tokens_of(cut.new, cut.bpe.texts[old]) == [new]
            reachable += 1
    assert reachable == len(cut.kept.old_ids) - len(cut.bpe.added)
    assert cut.kept.new_ids.keys() >= cut.bpe.closure(cut.kept.old_ids)
    assert sorted(cut.new.get_vocab().values()) == list(range(len(cut.kept.old_ids)))


@every_cut
def test_a_token_that_goes_is_spelled_as_the_smaller_tokenizer_does(cut: Cut) -> None:
    for old, text in cut.bpe.texts.items():
        assert cut.kept.spelled(old) == vocabularies.tokens_of(cut.new, text)


def merged(word: list[int], merges: dict[tuple[int, int], tuple[int, int]], seen: Counts) -> list[int]:
    """BPE as its paper says it, counting every token that is formed."""
    np.add.at(seen, word, 1)
    while found := [(merges[both][0], place) for place, both in enumerate(itertools.pairwise(word)) if both in merges]:
        place = min(found)[1]
        word[place : place + 2] = [merges[word[place], word[place + 1]][1]]
        seen[word[place]] += 1
    return word


def test_a_token_is_counted_as_often_as_merging_the_corpus_forms_it() -> None:
    cut = CUTS["trained", 600]
    text = vocabularies.corpus()[:20_000]
    seen = np.zeros(1200, dtype=np.int64)
    alphabet = {character: index for index, character in cut.bpe.texts.items() if character in BYTES}
    ids = []
    for word in vocabularies.words(cut.old, text):
        ids += merged([alphabet[character] for character in word], dict(cut.bpe.merges), seen)
    assert ids == cut.old.encode(text, add_special_tokens=False).ids
    np.testing.assert_array_equal(cut.bpe.formed(count([np.array(ids)], 1200)), seen)


def small(*merges: str, vocabulary: tuple[str, ...] = ()) -> dict[str, Any]:
    """``tokenizer.json`` of all bytes and merges such as ``"a b"``."""
    texts = [*sorted(BYTES), *dict.fromkeys([merge.replace(" ", "") for merge in merges]), *vocabulary]
    model = {"type": "BPE", "vocab": {text: index for index, text in enumerate(texts)}, "merges": list(merges)}
    return {"model": model, "added_tokens": []}


def ids_of(bpe: Bpe, *texts: str) -> set[int]:
    by_text = {text: index for index, text in bpe.texts.items()}
    return {by_text[text] for text in texts}


def kept_texts(kept: Kept) -> set[str]:
    return {kept.bpe.texts[index] for index in kept.old_ids} - BYTES


def counts_of(bpe: Bpe, **counts: int) -> Counts:
    result = np.zeros(len(bpe.ids), dtype=np.int64)
    for text, value in counts.items():
        (index,) = ids_of(bpe, text)
        result[index] = value
    return result


def test_the_parts_are_those_of_the_merge_that_is_reached() -> None:
    """``a bc`` ranks above ``ab c``, but ``a b`` is merged before ``b c``, so ``bc`` never is there."""
    bpe = Bpe.read(small("a b", "b c", "a bc", "ab c", vocabulary=("xyz",)))
    by_text = {text: index for index, text in bpe.texts.items()}
    assert bpe.parts[by_text["abc"]] == (by_text["ab"], by_text["c"])
    assert bpe.parts[by_text["bc"]] == (by_text["b"], by_text["c"])
    assert bpe.parts[by_text["xyz"]] == tuple(by_text[character] for character in "xyz")
    assert bpe.parts[by_text["a"]] == ()
    assert bpe.closure({by_text["abc"]}) == ids_of(bpe, "abc", "ab", "a", "b", "c")


def test_a_rare_part_of_a_frequent_token_stays_and_an_idle_one_goes() -> None:
    """``ab`` is never seen by itself and ``cd`` often, yet ``abe`` needs the one and not the other."""
    bpe = Bpe.read(small("a b", "c d", "ab e"))
    counts = counts_of(bpe, abe=10, cd=9)
    assert kept_texts(choose(bpe, counts, 258)) == {"ab", "abe"}
    assert kept_texts(choose(bpe, counts, 257)) == {"ab"}
    summary = choose(bpe, counts, 257).summary()
    assert summary["growth_by_parts"] == 1 + (10 + 9) / 19
    assert summary["share_of_tokens_kept"] == 0


@given(st.lists(st.integers(0, 20), min_size=8, max_size=8), st.integers(1, 7))
def test_no_other_closed_choice_of_that_size_loses_less(values: list[int], size: int) -> None:
    """By trying all."""
    bpe = Bpe.read(small("a b", "b c", "ab c", "c d", "abc cd", "e f", "ab ab", "e b"))
    tokens = sorted(bpe.ids - bpe.bytes)
    counts = np.zeros(len(bpe.ids), dtype=np.int64)
    counts[tokens] = values
    counts[0] = 1
    formed = bpe.formed(counts)

    def loss(stays: set[int]) -> int:
        return int(sum(formed[token] for token in tokens if token not in stays))

    sets = map(set, itertools.combinations(tokens, size))
    closed = [stays for stays in sets if bpe.closure(stays) <= stays | bpe.bytes]
    kept = set(choose(bpe, counts, 256 + size).old_ids)
    assert kept >= bpe.closure(kept)
    assert loss(kept) == min(map(loss, closed))


def test_what_was_never_seen_stays_in_the_order_of_training() -> None:
    bpe = Bpe.read(small("a b", "c d", "ab cd", "e f"))
    assert kept_texts(choose(bpe, counts_of(bpe, a=1), 258)) == {"ab", "cd"}


def test_what_settings_name_stays_with_its_parts() -> None:
    bpe = Bpe.read(small("a b", "c d", "ab e"))
    counts = counts_of(bpe, cd=100)
    kept = choose(bpe, counts, 258, always=ids_of(bpe, "abe"))
    assert kept_texts(kept) == {"ab", "abe"}
    with pytest.raises(ValueError, match=r"vocab_size must be in 258\.\.259 .* 2 that the model's settings name .*257"):
        choose(bpe, counts, 257, always=ids_of(bpe, "abe"))


def test_a_size_below_bytes_and_added_tokens_or_above_all_is_refused() -> None:
    cut = CUTS["trained", 600]
    for size in (267, 1201):
        with pytest.raises(ValueError, match=rf"vocab_size must be in 268\.\.1200 \(256 bytes, 12 added .* got {size}"):
            check_size(cut.bpe, size, always=(), never=())
    assert len(choose(cut.bpe, cut.counts, 268).old_ids) == 268
    everything = choose(cut.bpe, cut.counts, 1200)
    assert everything.old_ids == tuple(range(1200))
    assert everything.summary()["growth_by_parts"] == everything.summary()["share_of_tokens_kept"] == 1


def test_counts_without_any_text_are_refused() -> None:
    cut = CUTS["trained", 600]
    counts = np.zeros(1200, dtype=np.int64)
    counts[list(cut.bpe.added)] = 5
    with pytest.raises(ValueError, match="hold no text"):
        choose(cut.bpe, counts, 600)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"type": "Unigram"}, "type 'Unigram'"),
        ({"byte_fallback": True}, "byte_fallback"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix='</w>'"),
        ({"vocab": {"a": 0}, "merges": []}, "lacks 255 of the 256 bytes"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(changes: dict[str, Any], match: str) -> None:
    definition = small("a b")
    definition["model"] |= changes
    with pytest.raises(ValueError, match=match):
        Bpe.read(definition)


def test_lengths_are_of_the_same_text_and_stop_at_the_limit() -> None:
    cut = CUTS["trained", 300]
    found = lengths(iter(["naïve ", "words", "never read"]), cut.old, cut.new, most_bytes=8)
    encoded = [
        [len(t.encode(text, add_special_tokens=False).ids) for text in ("naïve ", "words")] for t in (cut.old, cut.new)
    ]
    assert (found.utf8_bytes, found.before, found.after) == (12, sum(encoded[0]), sum(encoded[1]))
