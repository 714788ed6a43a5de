"""Turn a checkpoint of llama2.c and its text into a stock model directory and packed data of its tokens.

python benchmarks/llama2c.py models/stories260k data/tinystories/tinystories_10k.txt scratch/stories260k

The folder of the checkpoint holds one ``.bin`` in llama2.c's first format and one SentencePiece ``.model``; the text
is documents with ``<|endoftext|>`` between them. Writes ``model/`` and ``data/`` below the last folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from llamita import checkpoints

REPOSITORY = Path(__file__).resolve().parent.parent
HEADER_INTEGERS = 7
BORDER = "<|endoftext|>"
BOS_ID = 1
BYTE_PIECE = 6
"""``SentencePiece.Type.BYTE`` of sentencepiece_model.proto."""


def read(file: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """The configuration, and the weights in float32 by their names in llama2.c (run.c, ``memory_map_weights``).

    The header is seven integers: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative where the
    classifier is a matrix of its own) and seq_len.

    Raises:
        ValueError: the file is shorter or longer than its header says.
    """
    raw = file.read_bytes()
    dim, hidden, layers, heads, keys, vocab, length = np.frombuffer(raw, "<i4", HEADER_INTEGERS).tolist()
    shared, vocab, size = vocab > 0, abs(vocab), dim // heads
    shapes = {
        "token_embedding": (vocab, dim),
        "rms_att": (layers, dim),
        "wq": (layers, heads * size, dim),
        "wk": (layers, keys * size, dim),
        "wv": (layers, keys * size, dim),
        "wo": (layers, dim, heads * size),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cis": (2, length, size // 2),
    } | ({} if shared else {"wcls": (vocab, dim)})
    counts = [int(np.prod(shape)) for shape in shapes.values()]
    if len(raw) != 4 * (HEADER_INTEGERS + sum(counts)):
        raise ValueError(f"{file} has {len(raw)} bytes, its header asks for {4 * (HEADER_INTEGERS + sum(counts))}")
    flat = torch.from_numpy(np.frombuffer(raw, "<f4", offset=4 * HEADER_INTEGERS).copy())
    parts = flat.split(counts)
    weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=size,
        vocab_size=vocab,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=shared,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,  # a story ends where the next begins: llama2.c stops at BOS, and never trained on EOS
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    return config, weights


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection in Hugging Face's order.

    llama2.c turns channels (2 j, 2 j + 1) of a head together, Hugging Face channels (j, j + head_dim / 2).
    """
    return rows.view(-1, head_dim // 2, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)


def model(config: LlamaConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """A stock model of these weights."""
    tensors = {"model.embed_tokens.weight": weights["token_embedding"], "model.norm.weight": weights["rms_final"]}
    tensors["lm_head.weight"] = weights["token_embedding" if config.tie_word_embeddings else "wcls"]
    for index in range(config.num_hidden_layers):
        layer = {
            "input_layernorm": weights["rms_att"][index],
            "self_attn.q_proj": half_split(weights["wq"][index], config.head_dim),
            "self_attn.k_proj": half_split(weights["wk"][index], config.head_dim),
            "self_attn.v_proj": weights["wv"][index],
            "self_attn.o_proj": weights["wo"][index],
            "post_attention_layernorm": weights["rms_ffn"][index],
            "mlp.gate_proj": weights["w1"][index],
            "mlp.up_proj": weights["w3"][index],
            "mlp.down_proj": weights["w2"][index],
        }
        tensors |= {f"model.layers.{index}.{name}.weight": tensor for name, tensor in layer.items()}
    llama = LlamaForCausalLM(config)
    llama.load_state_dict(tensors, strict=True)
    return llama.eval()


def tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE as a fast tokenizer; documents end with BOS, as the models were trained."""
    proto: Any = import_protobuf().ModelProto()
    proto.ParseFromString(file.read_bytes())
    vocabulary = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    plain = {piece.piece: piece.score for piece in proto.pieces if piece.type == 1}
    bpe = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=generate_merges(vocabulary, plain),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=any(piece.type == BYTE_PIECE for piece in proto.pieces),
        )
    )
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Prepend("▁"),
            normalizers.Replace(" ", "▁"),
        ]
    )
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="<s>", clean_up_tokenization_spaces=False
    )


def convert(folder: Path, out: Path) -> None:
    """Write the checkpoint in ``folder`` as a model directory.

    Raises:
        ValueError: there is not exactly one checkpoint and one tokenizer.
    """
    files = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".bin", ".model")}
    # A llama2.c tokenizer is called .bin as well.
    files[".bin"] = [file for file in files[".bin"] if not file.name.startswith("tok")]
    if any(len(found) != 1 for found in files.values()):
        raise ValueError(f"{folder} must hold one checkpoint .bin and one tokenizer .model, found {files}")
    llama = model(*read(files[".bin"][0]))
    with tempfile.TemporaryDirectory() as words:
        tokenizer(files[".model"][0]).save_pretrained(words)
        checkpoints.save_model(llama, out, source=Path(words), provenance={"recipe": "llama2c"})


def pack(text: Path, model: Path, out: Path, *, row_tokens: int, held_out: float) -> None:
    """Packed rows of the documents in ``text``, in the tokens of ``model``."""
    with tempfile.TemporaryDirectory() as scratch:
        documents = [document.strip() for document in text.read_text().split(BORDER)]
        source = Path(scratch) / "documents.jsonl"
        source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents if document))
        overrides = {
            "source.path": source,
            "tokenizer.path": model,
            "sequence_length": row_tokens,
            "validation.fraction": held_out,
            "num_proc": 1,
            "out": out,
        }
        told = [f"{name}={value}" for name, value in overrides.items()]
        subprocess.run([sys.executable, str(REPOSITORY / "recipes" / "prepare.py"), *told], check=True)


def main() -> None:
    """Convert one checkpoint and pack its text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder with a .bin and a .model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of the documents")
    told = parser.parse_args()
    convert(told.checkpoint, told.out / "model")
    pack(told.text, told.out / "model", told.out / "data", row_tokens=told.row_tokens, held_out=told.held_out)


if __name__ == "__main__":
    main()
