"""Llama 3's dialogue format: the ids of a dialogue, and which of them the assistant says.

The format is that of llama-models, models/llama3/chat_format.py: each message is
``<|start_header_id|>role<|end_header_id|>\\n\\n content <|eot_id|>``, behind one ``<|begin_of_text|>``. A tokenizer
with a chat template of its own is written with that one, its date held fixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|finetune_right_pad_id|>"
HEADER = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
TURN_END = "<|eot_id|>"
MESSAGE_END = "<|eom_id|>"
CODE = "<|python_tag|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, HEADER, HEADER_END, MESSAGE_END, TURN_END, CODE)

DATE = "26 Jul 2024"
"""The date in templates that ask for one; fixed, because Llama 3.2's would else change the data every day."""

TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{%- generation %}"
    "{{- ('<|python_tag|>' if message['code'] else '') + (message['content'] | trim) }}"
    "{{- '<|eom_id|>' if message['code'] else '<|eot_id|>' }}"
    "{%- endgeneration %}{%- else %}{{- (message['content'] | trim) + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""The same format as a template with generation markers, for whoever loads a model that was made here."""

Messages = Sequence[Mapping[str, Any]]
"""Each with ``role`` and ``content``; ``code`` marks what the assistant writes for an interpreter, which ends in
``<|eom_id|>`` because it waits for the result."""


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Ids that stand around documents."""

    bos_id: int
    eos_id: int
    pad_id: int


def borders(tokenizer: PreTrainedTokenizerFast) -> Borders:
    """Begin, end and padding of a document.

    The end is ``<|end_of_text|>`` where there is one: the ``eos_token`` of Llama 3's instruct models ends a turn of a
    dialogue, not a document.

    Raises:
        ValueError: the tokenizer has no token for the begin or the end.
    """
    vocabulary = tokenizer.get_vocab()
    bos_id, eos_id = tokenizer.bos_token_id, vocabulary.get(EOS, tokenizer.eos_token_id)
    for name, value in (("BOS", bos_id), ("EOS", eos_id)):
        if value is None:
            raise ValueError(
                f"tokenizer.path={tokenizer.name_or_path} has no {name} token, which stands around every document"
            )
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else vocabulary.get(PAD, eos_id)
    return Borders(bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


def plain_backend(tokenizer: PreTrainedTokenizerFast, *, special: bool = False) -> Tokenizer:
    """A copy that neither cuts nor pads, as some published files ask for, and sees special tokens only if told."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special
    return backend


@dataclass(frozen=True)
class Encoded:
    """A dialogue as a model reads it."""

    ids: list[int]
    supervised: list[bool]
    """Per id: the assistant says it, or it ends the assistant's turn."""


class Encoder:
    """Dialogues to ids: only what the assistant says and the end of its turn are supervised."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, date: str = DATE) -> None:
        """Choose the format.

        Raises:
            ValueError: the tokenizer has neither a chat template nor Llama 3's header tokens, or its template writes
                special tokens that it does not have.
        """
        self._given = tokenizer
        self.borders = borders(tokenizer)
        self._plain = plain_backend(tokenizer)
        self._special = plain_backend(tokenizer, special=True)
        self._date = date
        self._vocabulary = tokenizer.get_vocab()
        ends = [self._vocabulary[token] for token in (EOS, MESSAGE_END, TURN_END) if token in self._vocabulary]
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids: list[int] = sorted({*ends, *own, self.borders.eos_id})
        """Ids at which an answer ends: those of Llama 3 that the vocabulary has, and the tokenizer's own end."""
        self._is_llama3 = tokenizer.chat_template in (None, "", TEMPLATE)
        if self._is_llama3:
            if lacking := [token for token in (HEADER, HEADER_END, TURN_END) if token not in self._vocabulary]:
                raise ValueError(
                    f"tokenizer.path={tokenizer.name_or_path} has no chat template and lacks {', '.join(lacking)} "
                    "of Llama 3's format: dialogues cannot be written with it"
                )
        else:
            names = [*tokenizer.all_special_tokens, *_added(tokenizer)]
            self._mention = re.compile("|".join(map(re.escape, names)))
            self._check_template(names)

    def dialogue(self, messages: Messages) -> Encoded:
        """The whole dialogue.

        Raises:
            ValueError: the template refuses the dialogue or rewrites earlier turns, or a message holds the text of a
                special token, which in the template's text could not be told from a real one.
        """
        return self._llama3(messages) if self._is_llama3 else self._templated(messages)

    def prompt(self, messages: Messages) -> list[int]:
        """The messages and the header of the answer that is to follow; ``ValueError`` as :meth:`dialogue`."""
        if self._is_llama3:
            return [*self._llama3(messages).ids, *self._head("assistant")]
        self._refuse_mentions(messages)
        ids: list[int] = self._special.encode(
            self._render(messages, add_generation_prompt=True), add_special_tokens=False
        ).ids
        return ids if ids[:1] == [self.borders.bos_id] else [self.borders.bos_id, *ids]

    def answer(self, messages: Messages, answer: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the answer with the end of its turn.

        Raises:
            ValueError: as :meth:`dialogue`, or the template writes the prompt differently where an answer follows.
        """
        prompt = self.prompt(messages)
        whole = self.dialogue([*messages, answer]).ids
        if whole[: len(prompt)] != prompt:
            raise ValueError(f"the chat template rewrites the prompt of the answer {answer['content'][:80]!r}")
        return prompt, whole[len(prompt) :]

    def text(self, ids: Sequence[int]) -> str:
        """What a model has said, up to the end of its turn."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        said: str = self._plain.decode(list(ids[:end]), skip_special_tokens=True)
        return said.strip()

    def _llama3(self, messages: Messages) -> Encoded:
        """Llama 3's own format, which trims what is said."""
        ids: list[int] = [self.borders.bos_id]
        supervised = [False]
        for message in messages:
            head = self._head(message["role"])
            said = [*self._ids(message["content"].strip()), self._vocabulary[TURN_END]]
            if message.get("code"):
                said = [self._vocabulary[CODE], *said[:-1], self._vocabulary[MESSAGE_END]]
            ids += head + said
            supervised += [False] * len(head) + [message["role"] == "assistant"] * len(said)
        return Encoded(ids, supervised)

    def _head(self, role: str) -> list[int]:
        return [self._vocabulary[HEADER], *self._ids(role), self._vocabulary[HEADER_END], *self._ids("\n\n")]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _templated(self, messages: Messages) -> Encoded:
        """The template's text; the assistant's part is what its message adds to the text before it."""
        self._refuse_mentions(messages)
        whole = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], add_generation_prompt=True)
                after = self._render(messages[: index + 1])
                if not (after.startswith(before) and whole.startswith(after.rstrip())):
                    raise ValueError(
                        "the chat template rewrites earlier turns, so the assistant's part cannot be found in "
                        f"{message['content'][:80]!r}"
                    )
                spans.append((len(before), len(after.rstrip())))
        encoded = self._special.encode(whole, add_special_tokens=False)
        supervised = [any(begin <= first < end for begin, end in spans) for first, _ in encoded.offsets]
        ids = list(encoded.ids)
        if ids[:1] != [self.borders.bos_id]:
            ids, supervised = [self.borders.bos_id, *ids], [False, *supervised]
        return Encoded(ids, supervised)

    def _refuse_mentions(self, messages: Messages) -> None:
        for message in messages:
            if found := self._mention.search(message["content"]):
                raise ValueError(f"a message holds the special token {found.group()}: {message['content'][:80]!r}")

    def _render(self, messages: Messages, **options: Any) -> str:
        if not messages and options.get("add_generation_prompt"):
            return self._render([{"role": "assistant", "content": "\0"}]).partition("\0")[0]
        try:
            text = self._given.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, date_string=self._date, **options
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses a dialogue: {error}: {str(messages)[:120]}") from error
        assert isinstance(text, str)
        return text

    def _check_template(self, known: Sequence[str]) -> None:
        """Refuse a template made for another tokenizer: its marks would be read as ordinary characters."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            text = self._render(probe)
        except ValueError:
            return  # a template that wants other dialogues refuses this one; so it will the ones it does not like
        if foreign := sorted(set(re.findall(r"<\|[^|<>\s]+\|>", text)) - set(known)):
            raise ValueError(
                f"the chat template of tokenizer.path={self._given.name_or_path} writes {', '.join(foreign)}, which "
                "the tokenizer does not have: the two do not belong together"
            )


def _added(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
