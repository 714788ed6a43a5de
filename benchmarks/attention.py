"""Time of one decoder layer, forward and backward, on a packed row of documents: each kernel that can run here.

python benchmarks/attention.py --tokens 8192 --hidden 512 --documents 200 400 600 900 1500

Documents of these lengths are drawn until the row is full. Kernels are compared at equal outputs, in one run.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamita.distill.teachers import Attention, Batch, last_hidden, mask_for


def packed_row(tokens: int, lengths: list[int], vocabulary: int) -> Batch:
    """One row of documents, positions restarting with each."""
    dice, sizes = random.Random(0), list[int]()
    while sum(sizes) < tokens:
        sizes.append(min(dice.choice(lengths), tokens - sum(sizes)))
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    return {"input_ids": torch.randint(vocabulary, (1, tokens)), "position_ids": positions}


def kernels(device: torch.device) -> list[Attention]:
    """Those that this machine can run."""
    found = [Attention.sdpa, Attention.documents]
    if device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        found.append(Attention.flash_attention_2)
    return found


def seconds(work: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, Tensor]:
    """The fastest of some runs, and what it gave."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        output = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times), output


def main() -> None:
    """Print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 256: heads of 64, four to a KV head")
    parser.add_argument("--documents", type=int, nargs="+", default=[200, 400, 600, 900, 1500])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    told = parser.parse_args()
    device, heads = torch.device(told.device), told.hidden // 64
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=told.hidden,
        intermediate_size=2 * told.hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=128,
        max_position_embeddings=told.tokens,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: LlamaForCausalLM = torch.nn.Module.to(LlamaForCausalLM(config), device=device, dtype=dtype)
    batch = {name: tensor.to(device) for name, tensor in packed_row(told.tokens, told.documents, 128).items()}
    documents = int((batch["position_ids"] == 0).sum())
    print(f"{told.tokens} tokens in {documents} documents, torch {torch.__version__}, {transformers.__version__}")
    print("| attention | seconds | to sdpa | largest difference |\n|---|---|---|---|")
    base: tuple[float, Tensor] | None = None
    for kernel in kernels(device):
        model.config._attn_implementation = kernel.value

        def work(kernel: Attention = kernel) -> Tensor:
            hidden = last_hidden(model, batch, mask_for(kernel, batch["position_ids"]))
            torch.autograd.backward(hidden.float().sum())
            return hidden.detach()

        took, hidden = seconds(work, device, told.repeats)
        base = base or (took, hidden)
        gap = float((hidden - base[1]).abs().max())
        print(f"| {kernel.value} | {took:.2f} | {took / base[0]:.2f} | {gap:.1e} |", flush=True)


if __name__ == "__main__":
    main()
