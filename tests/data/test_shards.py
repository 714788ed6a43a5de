"""Rows on disk are the documents that were packed; a model sees each alone; a damaged shard is refused by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers import modeling_flash_attention_utils as flash

from llamita import storage
from llamita.data import shards
from llamita.data.pack import PackingConfig, pack
from llamita.data.shards import IGNORE, START, UNSUPERVISED, PackedData, Words, decode
from llamita.distill.teachers import last_hidden

VOCAB = 128
PAD = 127


def make(
    folder: Path,
    documents: list[list[int]],
    *,
    sequence_length: int = 16,
    max_padding: float = 0.02,
    shard_bytes: int = 2**28,
    vocab_size: int = VOCAB,
) -> PackedData:
    """A data directory with these documents as its training split."""
    stream = np.array([token for document in documents for token in document], dtype=np.uint32)
    length = np.array([len(document) for document in documents])
    packing = pack(np.cumsum(length) - length, length, sequence_length, PackingConfig(max_padding=max_padding))
    entry = shards.write(folder / "shards", "train", stream, packing, pad_id=PAD, shard_bytes=shard_bytes)
    manifest = {
        "format": shards.FORMAT,
        "sequence_length": sequence_length,
        "vocab_size": vocab_size,
        "tokenizer_hash": "of no tokenizer",
        "splits": {"train": entry, "validation": {"rows": 0, "shards": []}},
    }
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    return PackedData.open(folder)


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents of these lengths, whose tokens tell them apart."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, PAD, length).tolist() for length in lengths]


def pieces(row: Words) -> list[list[int]]:
    """The documents in a row of words, by the definition of the format and nothing else."""
    found: list[list[int]] = []
    for word in row.tolist():
        if word >> 31:
            found.append([])
        found[-1].append(word & 0x3FFFFFFF)
    return [piece for piece in found if set(piece) != {PAD}]


def test_labels_and_positions_of_a_row_in_full() -> None:
    """Two documents, the second with an unsupervised token, and three pad tokens."""
    row = np.array([5, 6, 7, 8, 9, 10, PAD, PAD, PAD], dtype=np.uint32)
    row[[0, 3, 6]] |= START
    row[[4, 6, 7, 8]] |= UNSUPERVISED
    batch = decode(row[None])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, PAD, PAD, PAD]]
    assert batch["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, IGNORE, 10, IGNORE, IGNORE, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), shard_bytes=st.sampled_from([1, 200, 2**20]))
def test_what_is_read_is_what_was_written(
    lengths: list[int], shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = numbered(lengths)
    split = make(tmp_path_factory.mktemp("data"), documents, shard_bytes=shard_bytes).split("train")
    words = split.words(np.arange(len(split)))
    found = [piece for row in words for piece in pieces(row)]
    assert sorted(t for piece in found for t in piece) == sorted(t for document in documents for t in document)
    whole = {tuple(document[i : i + n]) for document in documents for n in range(1, 17) for i in range(len(document))}
    assert {tuple(piece) for piece in found} <= whole
    labels = split.rows(np.arange(len(split)))["labels"]
    assert int((labels != IGNORE).sum()) == sum(lengths) - len(found)


def test_rows_come_in_the_order_asked_for_across_shards(tmp_path: Path) -> None:
    split = make(tmp_path, numbered([16] * 10), shard_bytes=3 * 64).split("train")
    assert len(split.shards) == 4
    every = split.words(np.arange(10))
    order = np.array([9, 0, 5, 5, 2])
    np.testing.assert_array_equal(split.words(order), every[order])


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Words, shards.Batch]:
    """Rows of several documents each, one of them of a single token, and padding."""
    split = make(tmp_path, numbered([5, 9, 1, 16, 7, 4, 30, 1, 3]), max_padding=1.0).split("train")
    indices = np.arange(len(split))
    return split.words(indices), split.rows(indices)


def test_logits_of_a_packed_document_are_its_logits_alone(
    tiny: LlamaForCausalLM, rows: tuple[Words, shards.Batch]
) -> None:
    words, batch = rows
    assert tiny.config._attn_implementation == "sdpa"
    assert len(words) > 1
    with torch.no_grad():
        together = tiny(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, logits in zip(words, together, strict=True):
            begin = 0
            for piece in pieces(row):
                alone = tiny(torch.tensor([piece]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[begin : begin + len(piece)], alone, atol=1e-5, rtol=1e-5)
                begin += len(piece)


def test_the_loss_of_packed_rows_is_that_of_the_documents_alone(
    tiny: LlamaForCausalLM, rows: tuple[Words, shards.Batch]
) -> None:
    words, batch = rows
    with torch.no_grad():
        logits = tiny(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        packed = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        alone = torch.tensor(0.0)
        for piece in (piece for row in words for piece in pieces(row) if len(piece) > 1):
            ids = torch.tensor([piece])
            logits = tiny(ids, use_cache=False).logits[0, :-1]
            alone += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    torch.testing.assert_close(packed, alone)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, softmax_scale: float, **_: object) -> Tensor:
    """What ``flash_attn_func`` computes, of [B, S, heads, head size], on any device."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=softmax_scale, enable_gqa=True
    ).transpose(1, 2)


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any
) -> Tensor:
    """What ``flash_attn_varlen_func`` computes, of [tokens, heads, head size]: each stretch by itself."""
    assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
    stretches = list(itertools.pairwise(cu_seqlens_q.tolist()))
    assert options["max_seqlen_q"] == max(end - begin for begin, end in stretches)
    parts = [tuple(states[None, begin:end] for states in (query, key, value)) for begin, end in stretches]
    return torch.cat([attend(*part, **options)[0] for part in parts])


@pytest.fixture
def flash_on_a_cpu(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A model on transformers' own FlashAttention path, borders and all; only the two kernels are replaced."""
    kernels = (attend, attend_varlen, None, None, None)

    def settings(**given: Any) -> dict[str, Any]:
        names = {"is_causal": "causal", "softmax_scale": "softmax_scale", "max_seqlen_q": "max_seqlen_q"}
        return {new: given[old] for old, new in names.items() if old in given}

    # transformers 5.17 gives one function that makes the kernels' settings, 5.23 two.
    several = hasattr(flash, "_process_with_kvcache_kwargs_fn")
    found = (kernels, (settings, None) if several else settings)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_, **__: found)
    tiny.config._attn_implementation = "flash_attention_2"
    return tiny


def test_hidden_states_of_a_packed_document_are_its_own_with_flash_attention(
    flash_on_a_cpu: LlamaForCausalLM, rows: tuple[Words, shards.Batch]
) -> None:
    """In batches of several rows, as a training step has them, through the function that it calls."""
    words, batch = rows
    assert len(words) > 1
    together = last_hidden(flash_on_a_cpu, batch, None)
    for row, hidden in zip(words, together, strict=True):
        begin = 0
        for piece in pieces(row):
            alone = flash_on_a_cpu.model(torch.tensor([piece]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[begin : begin + len(piece)], alone, atol=1e-5, rtol=1e-5)
            begin += len(piece)


def test_flash_attention_would_not_see_the_borders_of_a_larger_batch(
    flash_on_a_cpu: LlamaForCausalLM, rows: tuple[Words, shards.Batch]
) -> None:
    """Why the rows are joined for it; when this fails, transformers handles batches and they need not be."""
    _, batch = rows
    apart = last_hidden(flash_on_a_cpu, batch, None)
    mixed = flash_on_a_cpu.model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state
    assert (apart - mixed).abs().max() > 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_isolates_packed_documents(tiny: LlamaForCausalLM, rows: tuple[Words, shards.Batch]) -> None:
    pytest.importorskip("flash_attn", reason="needs flash-attn")
    words, batch = rows
    tiny.set_attn_implementation("flash_attention_2")
    model = tiny.to("cuda", torch.bfloat16)
    with torch.no_grad():
        together = last_hidden(model, {name: tensor.cuda() for name, tensor in batch.items()}, None)
        for row, hidden in zip(words, together, strict=True):
            begin = 0
            for piece in pieces(row):
                ids = torch.tensor([piece], device="cuda")
                alone = model.model(ids, use_cache=False).last_hidden_state[0]
                torch.testing.assert_close(hidden[begin : begin + len(piece)], alone, atol=5e-2, rtol=5e-2)
                begin += len(piece)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    make(tmp_path, numbered([16] * 10), shard_bytes=3 * 64)
    return tmp_path


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def test_a_truncated_shard_is_refused_by_name(data: Path) -> None:
    shard = data / "shards" / "train-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00002\.bin has 203 bytes, data\.json says 204"):
        PackedData.open(data)


def test_a_missing_shard_is_refused_by_name(data: Path) -> None:
    (data / "shards" / "train-00001.bin").unlink()
    with pytest.raises(ValueError, match=r"train-00001\.bin has None bytes"):
        PackedData.open(data)


def test_the_manifest_holds_the_hash_of_every_shard(data: Path) -> None:
    entries = json.loads((data / shards.MANIFEST).read_text())["splits"]["train"]["shards"]
    assert len(entries) > 1
    assert [entry["sha256"] for entry in entries] == [storage.sha256(data / entry["file"]) for entry in entries]


@pytest.mark.parametrize("byte", [64 + 8, 3 * 64 + 5])
def test_one_flipped_bit_is_found_when_its_row_is_read(data: Path, byte: int) -> None:
    """In the row itself or in its checksum; the rows around it are still good."""
    flip(data / "shards" / "train-00001.bin", byte)
    split = PackedData.open(data).split("train")
    split.rows(np.array([0, 1, 2, 3, 5, 9]))
    with pytest.raises(ValueError, match=r"train-00001\.bin: row 1 is not what was written"):
        split.rows(np.array([3, 9, 4]))


def test_a_manifest_of_other_rows_is_refused(data: Path) -> None:
    text = (data / "data.json").read_text().replace('"sequence_length": 16', '"sequence_length": 8')
    (data / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"204 bytes, which is not 3 rows of sequence_length=8"):
        PackedData.open(data)


def test_an_id_outside_the_vocabulary_is_named_with_its_file(data: Path) -> None:
    manifest = json.loads((data / "data.json").read_text())
    manifest["vocab_size"] = 100
    (data / "data.json").write_text(json.dumps(manifest))
    highest = max(shard["max_id"] for shard in manifest["splits"]["train"]["shards"])
    assert highest >= 100
    with pytest.raises(ValueError, match=r"train-0000\d\.bin holds token id \d+, but the vocabulary has 100"):
        PackedData.open(data)


def test_a_shard_outside_the_directory_is_refused(data: Path) -> None:
    text = (data / "data.json").read_text().replace("shards/train-00000.bin", "../train-00000.bin")
    (data / "data.json").write_text(text)
    with pytest.raises(ValueError, match="names a file outside its directory"):
        PackedData.open(data)


def test_the_hash_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one = make(tmp_path / "one", numbered([16] * 4))
    same = make(tmp_path / "same", numbered([16] * 4))
    other = make(tmp_path / "other", numbered([16] * 5))
    assert one.content_hash == same.content_hash != other.content_hash
    assert one.split("train").content_hash == same.split("train").content_hash != other.split("train").content_hash


def test_a_directory_that_is_not_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        PackedData.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a directory without data\.json"):
        PackedData.open(tmp_path)


def test_an_unfinished_run_is_refused(data: Path) -> None:
    (data / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished run: finish that stage first"):
        PackedData.open(data)
    (data / "DONE.json").write_text("{}")
    PackedData.open(data)


def test_another_format_is_refused(data: Path) -> None:
    (data / "data.json").write_text((data / "data.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match=r"data\.json has format 2, this program reads 1"):
        PackedData.open(data)


def test_a_split_without_rows_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="has no rows in split 'validation'; it has train"):
        PackedData.open(data).split("validation")
