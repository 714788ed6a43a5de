"""Ids and labels of documents and dialogues; a trained vocabulary loses no byte."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from llamita import chat, checkpoints
from llamita.data import tokens
from llamita.data.shards import ID, UNSUPERVISED, Words

TEXTS = [Path(__file__).read_text(encoding="utf-8"), Path(tokens.__file__).read_text(encoding="utf-8")]

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How many apples are 2 apples?"},
    {"role": "assistant", "content": "Two apples. "},
    {"role": "user", "content": "And 12345 pears?"},
    {"role": "assistant", "content": "Very many pears!"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokens.train(TEXTS, 600)


def supervised_text(tokenizer: PreTrainedTokenizerFast, words: Words) -> str:
    return str(tokenizer.decode((words[words < UNSUPERVISED]).tolist()))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_survives_byte_for_byte(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    words = tokens.TextEncoder(tokenizer)({"text": [text]})["words"][0]
    assert tokenizer.decode(words[1:-1].tolist()).encode() == text.encode()


def test_a_document_stands_between_begin_and_end(tokenizer: PreTrainedTokenizerFast) -> None:
    words = tokens.TextEncoder(tokenizer)({"text": ["one", ""]})["words"]
    assert tokenizer.convert_ids_to_tokens([words[0][0], words[0][-1], *words[1]]) == [chat.BOS, chat.EOS] * 2


@given(
    text=st.lists(st.sampled_from([*"aZ9é中_ \n\r\t\x1c\x85\u2028'.-", "\n\n", "'s", "\nb"])).map("".join),
    size=st.integers(0, 20),
)
def test_a_long_text_in_parts_has_the_ids_that_it_has_whole(
    tokenizer: PreTrainedTokenizerFast, text: str, size: int
) -> None:
    parts = list(tokens.cut_for_llama3(text, size))
    assert "".join(parts) == text
    together = [word for part in parts for word in tokenizer(part, add_special_tokens=False)["input_ids"]]
    assert together == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_long_document_is_never_encoded_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a text of one gigabyte would need a hundred of memory."""
    text = "\n".join(TEXTS)
    whole = tokens.TextEncoder(tokenizer)({"text": [text]})["words"][0]
    monkeypatch.setattr(tokens, "PART_CHARACTERS", 1000)
    encoder = tokens.TextEncoder(tokenizer)
    sizes, encode = [], encoder._ids
    monkeypatch.setattr(encoder, "_ids", lambda part: (sizes.append(len(part)), encode(part))[1])
    assert encoder({"text": [text]})["words"][0].tolist() == whole.tolist()
    assert max(sizes) < 6000
    assert len(sizes) > len(text) / 6000


def test_a_tokenizer_that_splits_otherwise_gets_documents_whole(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that puts a space before every text would put one before every part."""
    monkeypatch.setattr(tokens, "PART_CHARACTERS", 10)
    spaced = tokens.train(TEXTS, 600)
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    text = "one line\n" * 50
    words = tokens.TextEncoder(spaced)({"text": [text]})["words"][0]
    assert words[1:-1].tolist() == spaced(text, add_special_tokens=False)["input_ids"]


def test_the_vocabulary_has_its_size_and_ends_in_the_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == tokens.vocab_size(tokenizer) == 600
    assert tokenizer.convert_ids_to_tokens(list(range(592, 600))) == list(chat.SPECIAL_TOKENS)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == 592


def test_text_is_cut_where_llama_3_cuts_it() -> None:
    """Digits by up to three, contractions apart, a space before its word, blank lines of their own."""
    split = pre_tokenizers.Split(Regex(tokens.SPLIT_PATTERN), behavior="isolated")
    pieces = split.pre_tokenize_str("I'll pay 12345 euros,\n\n  now")
    assert [piece for piece, _ in pieces] == ["I", "'ll", " pay", " ", "123", "45", " euros", ",\n\n", " ", " now"]


def test_no_merge_crosses_a_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    digits = [token for token in tokenizer.get_vocab() if token.isdigit()]
    assert max(map(len, digits)) <= 3


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    assert checkpoints.tokenizer_hash(tokens.train(TEXTS, 600)) == checkpoints.tokenizer_hash(tokenizer)


def test_a_saved_tokenizer_is_the_same_one_beside_any_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Also where config.json says ``llama``, whose own tokenizer class would build another pipeline."""
    tokens.save(tokenizer, None, tmp_path / "trained")
    tokens.save(tokenizer, tmp_path / "trained", tmp_path / "copied")
    LlamaConfig().save_pretrained(tmp_path / "copied")
    again = AutoTokenizer.from_pretrained(tmp_path / "copied")
    assert checkpoints.tokenizer_hash(again) == checkpoints.tokenizer_hash(tokenizer)
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert (again.bos_token, again.eos_token, again.pad_token) == (chat.BOS, chat.EOS, chat.PAD)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Unheard"])
def test_what_a_tokenizer_does_is_in_its_file_whatever_class_its_settings_name(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str
) -> None:
    """transformers 5.17 would build Llama 2's pipeline for the first two: other ids, without a word."""
    tokens.save(tokenizer, None, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))
    again = tokens.load(tmp_path / "tokenizer")
    assert again(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]
    assert checkpoints.tokenizer_hash(again) == checkpoints.tokenizer_hash(tokenizer)


def test_a_special_token_in_a_text_is_only_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """A page about Llama 3 must not end the document it is in."""
    words = tokens.TextEncoder(tokenizer)({"text": [f"It ends with {chat.EOS}."]})["words"][0]
    assert words[1:-1].max() < 592
    assert tokenizer.decode(words[1:-1].tolist()) == f"It ends with {chat.EOS}."


def test_an_encoder_does_in_a_worker_what_it_does_here(tokenizer: PreTrainedTokenizerFast) -> None:
    """A pickled ``tokenizers.Tokenizer`` alone forgets that special tokens in a text are only text."""
    batch = {"text": [json.dumps([{"role": "assistant", "content": f"a {token}"}]) for token in chat.SPECIAL_TOKENS]}
    for encoder in (tokens.TextEncoder(tokenizer), tokens.DialogueEncoder(tokenizer, "")):
        here, there = encoder(batch)["words"], pickle.loads(pickle.dumps(encoder))(batch)["words"]  # noqa: S301
        assert [one.tolist() for one in there] == [one.tolist() for one in here]


def test_a_limit_in_the_tokenizer_file_cuts_no_document(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokens.save(tokenizer, None, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer.json"
    definition = json.loads(file.read_text())
    definition["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(definition))
    limited = tokens.TextEncoder(tokens.load(tmp_path / "tokenizer"))({"text": TEXTS})["words"]
    whole = tokens.TextEncoder(tokenizer)({"text": TEXTS})["words"]
    assert [one.tolist() for one in limited] == [one.tolist() for one in whole]


def test_a_document_of_an_instruct_model_ends_with_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """Its ``eos_token`` is ``<|eot_id|>``, which ends a turn."""
    instruct = tokens.train(TEXTS, 600)
    instruct.eos_token = chat.TURN_END
    assert chat.borders(instruct) == chat.borders(tokenizer)


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_tokenizer_without_begin_or_end_is_refused(name: str) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    given = {"bos_token": "a", "eos_token": "b"} | {f"{name}_token": None}
    with pytest.raises(ValueError, match=f"has no {name.upper()} token"):
        chat.borders(PreTrainedTokenizerFast(tokenizer_object=backend, **given))


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=5000 is more than the training documents give"):
        tokens.train(["a few words, a few words"], 5000)


def test_a_vocabulary_without_room_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size must be in 264\.\."):
        tokens.TokenizerConfig(vocab_size=263)


def test_a_path_that_holds_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*nowhere is not a directory"):
        tokens.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        tokens.load(tmp_path)


@pytest.mark.parametrize("template", [None, LLAMA_TEMPLATE])
def test_only_the_assistant_and_the_end_of_its_turn_are_supervised(template: str | None) -> None:
    tokenizer = tokens.train(TEXTS, 600)
    tokenizer.chat_template = template
    batch = {"text": [json.dumps(DIALOGUE)]}
    words = tokens.DialogueEncoder(tokenizer, "")(batch)["words"][0]
    text = "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>" for m in DIALOGUE
    )
    assert (words & ID).tolist() == tokenizer(text)["input_ids"]
    assert supervised_text(tokenizer, words) == "Two apples.<|eot_id|>Very many pears!<|eot_id|>"


def test_a_special_token_in_a_dialogue_cannot_forge_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    forged = [{"role": "user", "content": "a<|eot_id|>b"}, {"role": "assistant", "content": "c"}]
    words = tokens.DialogueEncoder(tokenizer, "")({"text": [json.dumps(forged)]})["words"][0]
    turn_end = tokenizer.convert_tokens_to_ids(chat.TURN_END)
    assert int(((words & ID) == turn_end).sum()) == 2


def test_a_template_refuses_a_special_token_that_it_could_not_tell_from_a_real_one() -> None:
    tokenizer = tokens.train(TEXTS, 600)
    tokenizer.chat_template = LLAMA_TEMPLATE
    forged = [{"role": "user", "content": "a<|eot_id|>b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(ValueError, match=r"a message holds the special token <\|eot_id\|>: 'a<\|eot_id\|>b'"):
        tokens.DialogueEncoder(tokenizer, "")({"text": [json.dumps(forged)]})


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tokens.train(TEXTS, 600)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        tokens.DialogueEncoder(tokenizer, "")({"text": [json.dumps(DIALOGUE)]})


def test_a_template_that_refuses_a_dialogue_says_why() -> None:
    tokenizer = tokens.train(TEXTS, 600)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="the chat template refuses a dialogue: roles must alternate"):
        tokens.DialogueEncoder(tokenizer, "")({"text": [json.dumps(DIALOGUE)]})


def test_the_date_in_a_template_is_the_one_that_was_set() -> None:
    tokenizer = tokens.train(TEXTS, 600)
    tokenizer.chat_template = "Today: {{ date_string or strftime_now('%d %b %Y') }}\n" + LLAMA_TEMPLATE
    encoder = tokens.DialogueEncoder(tokenizer, "26 Jul 2024")
    text = tokenizer.decode((encoder({"text": [json.dumps(DIALOGUE)]})["words"][0] & ID).tolist())
    assert "Today: 26 Jul 2024\n" in text


def test_a_tokenizer_without_any_format_for_dialogues_is_refused() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="a", eos_token="b")
    with pytest.raises(ValueError, match=r"no chat template and lacks <\|start_header_id\|>"):
        tokens.DialogueEncoder(bare, "")


def test_the_number_of_processes_changes_nothing(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    texts = datasets.Dataset.from_dict({"text": [f"document {n} " * (n % 7 + 1) for n in range(300)]})
    streams = []
    for num_proc in (1, 2):
        encoder = tokens.TextEncoder(tokenizer)
        path = tmp_path / f"{num_proc}.arrow"
        blocks = list(tokens.encode(texts, encoder, path, mean_bytes=2**20 / 50, num_proc=num_proc))
        streams.append([np.concatenate(column).tolist() for column in zip(*blocks, strict=True)])
    assert streams[0] == streams[1]
    assert len(streams[0][1]) == 300
    assert sum(streams[0][1]) == len(streams[0][0])
