"""Every place of a model directory that names a token id follows the cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig

import vocabularies
from conftest import tiny_config
from llamita import chat
from llamita.prune import remap
from llamita.prune.vocabulary import Bpe, Kept, choose, count

SIZE = 400


def source(folder: Path, definition: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A model directory without weights."""
    path = vocabularies.write(folder, json.dumps(definition) if definition else None)
    tiny_config(**{"vocab_size": 1200, "bos_token_id": 1188, "eos_token_id": [1189, 1194], **settings}).save_pretrained(
        path
    )
    return path


def definition() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(vocabularies.trained())
    return loaded


def cut(path: Path, *, drop: tuple[str, ...] = ()) -> Kept:
    bpe = Bpe.read(json.loads((path / "tokenizer.json").read_text()))
    named = remap.named(path, bpe)
    return choose(bpe, vocabularies.counts(), SIZE, always=named, never=remap.dropped(drop, bpe, named))


def written(path: Path, out: Path, **options: Any) -> Kept:
    kept = cut(path, **options)
    out.mkdir()
    remap.write(path, out, kept)
    return kept


def test_the_written_tokenizer_says_what_the_old_one_said(tmp_path: Path) -> None:
    """Begin, end, padding, every special token, the template and the chat template: same text, new ids."""
    path, out = source(tmp_path / "old"), tmp_path / "new"
    kept = written(path, out)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (path, out))
    assert len(new) == SIZE == len(kept.old_ids)
    assert old.special_tokens_map == new.special_tokens_map
    assert old.all_special_tokens == new.all_special_tokens
    assert {str(t): kept.new_ids[i] for i, t in old.added_tokens_decoder.items()} == {
        str(t): i for i, t in new.added_tokens_decoder.items()
    }
    chat = [{"role": "user", "content": "return 1"}, {"role": "assistant", "content": "the value"}]
    before, after = (t.apply_chat_template(chat, tokenize=True, return_dict=False) for t in (old, new))
    assert new.apply_chat_template(chat, tokenize=False) == old.apply_chat_template(chat, tokenize=False)
    assert new.decode(after) == old.decode(before)
    specials = [index for index in before if index in kept.bpe.added]
    assert [index for index in after if index >= SIZE - len(kept.bpe.added)] == [
        kept.new_ids[index] for index in specials
    ]
    assert new("x").input_ids[0] == new.bos_token_id == kept.new_ids[old.bos_token_id]


@pytest.mark.parametrize("eos", [1189, [1189, 1194], None])
def test_configuration_and_generation_settings_follow(tmp_path: Path, eos: int | list[int] | None) -> None:
    path, out = source(tmp_path / "old"), tmp_path / "new"
    kept = cut(path)
    gone = next(i for i in sorted(kept.bpe.texts, reverse=True) if i not in kept.new_ids)
    stays = next(i for i in kept.old_ids if len(kept.bpe.texts[i]) > 2)
    fields: dict[str, Any] = {
        "bos_token_id": 1188,
        "eos_token_id": eos,
        "pad_token_id": -1,
        "suppress_tokens": [gone, stays],
        "begin_suppress_tokens": [gone],
        "bad_words_ids": [[gone, 1194], [stays]],
        "sequence_bias": [[[gone], -10], [[stays], 1.5]],
        "temperature": 0.6,
        "top_k": 50,
    }
    (path / "generation_config.json").write_text(json.dumps(fields))
    remap.write(path, (out.mkdir(), out)[1], kept)
    new, spelled = kept.new_ids, kept.spelled(gone)
    assert len(spelled) > 1
    assert json.loads((out / "generation_config.json").read_text()) == fields | {
        "bos_token_id": new[1188],
        "eos_token_id": [new[i] for i in eos] if isinstance(eos, list) else eos and new[eos],
        "suppress_tokens": [new[stays]],
        "begin_suppress_tokens": [],
        "bad_words_ids": [[*spelled, new[1194]], [new[stays]]],
        "sequence_bias": [[spelled, -10], [[new[stays]], 1.5]],
    }
    assert GenerationConfig.from_pretrained(out).bos_token_id == new[1188]
    config = remap.settings(tiny_config(bos_token_id=1188, eos_token_id=eos, pad_token_id=1190).to_dict(), kept)
    assert (config["bos_token_id"], config["pad_token_id"]) == (new[1188], new[1190])
    assert config["hidden_size"] == 64


def test_an_ordinary_token_that_a_setting_names_stays(tmp_path: Path) -> None:
    """The rarest of all, with what it is made of."""
    path = source(tmp_path / "old")
    rare = next(i for i in sorted(cut(path).bpe.texts, reverse=True) if i not in cut(path).new_ids)
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1189, rare], "forced_decoder_ids": [[1, rare]]})
    )
    kept = written(path, tmp_path / "new")
    assert kept.new_ids.keys() >= kept.bpe.closure({rare})
    generation = json.loads((tmp_path / "new/generation_config.json").read_text())
    assert generation["eos_token_id"] == [kept.new_ids[1189], kept.new_ids[rare]]
    assert generation["forced_decoder_ids"] == [[1, kept.new_ids[rare]]]


def test_an_id_that_is_no_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no token 4000, but config.json names it"):
        cut(source(tmp_path / "old", vocab_size=5000, eos_token_id=4000))


def test_merges_in_the_older_form_stay_in_it(tmp_path: Path) -> None:
    pairs, spaces = definition(), definition()
    spaces["model"]["merges"] = [" ".join(both) for both in spaces["model"]["merges"]]
    kept = cut(source(tmp_path / "old", pairs))
    new = [remap.tokenizer(form, kept)["model"]["merges"] for form in (pairs, spaces)]
    assert new[1] == [" ".join(both) for both in new[0]]
    assert len(new[0]) == SIZE - 256 - len(kept.bpe.added)


def test_the_post_processor_and_the_padding_of_the_tokenizer_follow(tmp_path: Path) -> None:
    form = definition()
    form["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    form["padding"] |= {"pad_id": 1190, "pad_type_id": 0, "pad_token": chat.PAD}
    roberta = {"type": "RobertaProcessing", "sep": [chat.EOS, 1189], "cls": [chat.BOS, 1188]}
    roberta |= {"trim_offsets": True, "add_prefix_space": False}
    form["post_processor"] = {"type": "Sequence", "processors": [form["post_processor"], roberta]}
    kept = cut(source(tmp_path / "old", form))
    result, new = remap.tokenizer(form, kept), kept.new_ids
    template, moved = result["post_processor"]["processors"]
    assert template["special_tokens"][chat.BOS]["ids"] == [new[1188]]
    assert moved == roberta | {"sep": [chat.EOS, new[1189]], "cls": [chat.BOS, new[1188]]}
    assert result["padding"]["pad_id"] == new[1190]
    assert form["padding"]["pad_id"] == 1190, "the source's own mapping stays as it was"
    form["post_processor"] = {"type": "Unheard"}
    with pytest.raises(ValueError, match="post_processor of type 'Unheard'"):
        remap.tokenizer(form, kept)


def test_reserved_tokens_go_where_they_are_named_and_nowhere_else(tmp_path: Path) -> None:
    path, out = source(tmp_path / "old"), tmp_path / "new"
    kept = written(path, out, drop=("<|reserved_special_token_[1-3]|>",))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == SIZE
    assert vocabularies.RESERVED[0] in tokenizer.get_vocab()
    assert not set(vocabularies.RESERVED[1:]) & tokenizer.get_vocab().keys()
    assert len([index for index in kept.old_ids if index in kept.bpe.added]) == 9
    assert (
        tokenizer.decode(tokenizer(vocabularies.RESERVED[1], add_special_tokens=False).input_ids)
        == vocabularies.RESERVED[1]
    )


@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("<|no_such*", r"drop_added='<\|no_such\*' names no added token"),
        (chat.BOS, "id 1188"),
        (chat.EOS, "config.json names it"),
        ("<|start_header_id|>", "the chat template writes it"),
        (chat.PAD, "begin, end, padding"),
    ],
)
def test_a_token_that_is_needed_cannot_be_dropped(tmp_path: Path, pattern: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cut(source(tmp_path / "old"), drop=(pattern,))


def test_a_dropped_token_that_the_data_holds_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "old")
    bpe = Bpe.read(definition())
    with pytest.raises(ValueError, match=r"reserved_special_token_3.*in the data 2 times"):
        choose(bpe, count([np.array([5, 1199, 1199])], 1200), SIZE, always=remap.named(path, bpe), never={1199})


def test_an_added_token_that_is_in_the_vocabulary_too_is_cut_and_kept_like_the_others(tmp_path: Path) -> None:
    """As in files that list special tokens in both places."""
    form = definition()
    form["model"]["vocab"] |= {token["content"]: token["id"] for token in form["added_tokens"]}
    path, plain = source(tmp_path / "old", form), source(tmp_path / "plain")
    kept = written(path, tmp_path / "new")
    assert kept.old_ids == cut(plain).old_ids
    assert json.loads((tmp_path / "new/tokenizer.json").read_text())["model"]["vocab"][chat.BOS] == kept.new_ids[1188]


def test_a_second_file_of_the_tokenizer_in_another_format_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = source(tmp_path / "old")
    (path / "tokenizer.model").write_text("old ids")
    written(path, tmp_path / "new")
    assert not (tmp_path / "new/tokenizer.model").exists()
    assert "would tell the old ids" in caplog.text
