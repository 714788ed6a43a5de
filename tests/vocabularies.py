"""Tokenizers for the tests of cutting a vocabulary: trained on the interpreter's own source, and in Llama 3's form."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llamita import chat, stdlib
from llamita.data import tokens
from llamita.prune.vocabulary import Counts, count

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}"
)
RESERVED = [f"<|reserved_special_token_{index}|>" for index in range(4)]


@cache
def corpus() -> str:
    """Half a megabyte of real text and code."""
    files = [file.read_text(encoding="utf-8") for file in stdlib.files()[:40]]
    return "\n".join(files)[: 2**19]


@cache
def trained() -> str:
    """``tokenizer.json`` of 1,200 tokens, reserved ones among them."""
    tokenizer = tokens.train([corpus()], 1196).backend_tokenizer
    tokenizer.add_special_tokens(RESERVED)
    return str(tokenizer.to_str())


@cache
def like_llama3() -> str:
    """As Llama 3's: every split of a token into two is a merge, whole words are looked up, some have no merge."""
    definition = json.loads(trained())
    vocabulary = definition["model"]["vocab"]
    merges = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        splits = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [both for both in splits if both[0] in vocabulary and both[1] in vocabulary]
        merges += sorted(known, key=lambda both: (vocabulary[both[0]], vocabulary[both[1]]))
    unreachable = {token for token, index in vocabulary.items() if index > 900 and index % 37 == 0}
    assert any(len(token) > 4 for token in unreachable)
    definition["model"]["merges"] = [list(both) for both in merges if "".join(both) not in unreachable]
    definition["model"]["ignore_merges"] = True
    return json.dumps(definition)


@cache
def counts() -> Counts:
    """How often the tokens of :func:`trained` occur in the corpus."""
    ids = Tokenizer.from_str(trained()).encode(corpus(), add_special_tokens=False).ids
    return count([np.array(ids)], 1200)


def write(folder: Path, definition: str | None = None, **config: Any) -> Path:
    """A tokenizer's directory with a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(definition or trained(), encoding="utf-8")
    added = {
        t["id"]: {k: v for k, v in t.items() if k != "id"} for t in json.loads(definition or trained())["added_tokens"]
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": chat.BOS,
        "eos_token": chat.TURN_END,
        "pad_token": chat.PAD,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": RESERVED,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": chat.BOS}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def words(backend: Tokenizer, text: str) -> list[str]:
    """The words into which a text is split before anything is merged."""
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def tokens_of(backend: Tokenizer, word: str) -> list[int]:
    """Ids of one word."""
    return [token.id for token in backend.model.tokenize(word)]
