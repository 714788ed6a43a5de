"""The fused loss against naive PyTorch, Liger-Kernel and TRL: time, transient memory, error against float64.

    python benchmarks/loss.py --tokens 256 --hidden 512 --vocabulary 128256
    python benchmarks/loss.py --device cuda --tokens 8192 --hidden 4096 --vocabulary 128256 --dtype bfloat16

All methods take hidden states and heads and give the summed divergence and both gradients. They take turns, and the
fastest of their turns counts. On a CPU time is that of the process, on one thread. Transient memory is the peak of what
torch allocates above its inputs, without the two gradients that stay. A peer that is not installed, or does not run on
the device, is left out, with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llamita.distill.losses import LossConfig, TeacherStates, distillation_loss
from llamita.distill.sparse import SparseTargets

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""The peers' beta; theirs and this project's jsd is that of beta = 0.5."""
MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs that all methods share."""

    hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    targets: SparseTargets
    divergence: str

    @classmethod
    def make(cls, options: argparse.Namespace) -> Problem:
        """Random states whose logits have a standard deviation of about 2; the teacher is near the student."""
        torch.manual_seed(0)
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        tokens, size, vocabulary = options.tokens, options.hidden, options.vocabulary

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        hidden, head = draw(tokens, size), draw(vocabulary, size, scale=2 / size**0.5)
        teacher_size = options.teacher_hidden or size
        if teacher_size == size:
            teacher_hidden = hidden + draw(tokens, size, scale=0.3)
            teacher_head = head + draw(vocabulary, size, scale=0.3 * 2 / size**0.5)
        else:
            teacher_hidden = draw(tokens, teacher_size)
            teacher_head = draw(vocabulary, teacher_size, scale=2 / teacher_size**0.5)
        ids = torch.randint(vocabulary, (tokens, options.entries), device=device).sort(dim=1).values
        # The last position of a row predicts nothing, and so has no entries.
        lengths = torch.full((1, tokens + 1), options.entries, device=device)
        lengths[:, -1] = 0
        values = torch.full((tokens * options.entries,), 1 / options.entries, device=device)
        return cls(
            hidden=hidden.requires_grad_(),
            head=head.requires_grad_(),
            teacher_hidden=teacher_hidden,
            teacher_head=teacher_head,
            labels=torch.randint(vocabulary, (tokens,), device=device),
            targets=SparseTargets(ids.flatten(), values, lengths),
            divergence=options.divergence,
        )

    def row(self, tensor: Tensor) -> Tensor:
        """``[N, …]`` as one row of N + 1 positions, the last of which predicts nothing."""
        return torch.cat([tensor, tensor[:1]])[None]

    @property
    def row_labels(self) -> Tensor:
        """The labels of :meth:`row`: position s predicts the label of s + 1."""
        return torch.cat([self.labels[:1], self.labels])[None]


def divergence(logits: Tensor, teacher_logits: Tensor, kind: str) -> Tensor:
    """The sum over positions, as a user of PyTorch writes it."""
    log_q, log_p = functional.log_softmax(logits, -1), functional.log_softmax(teacher_logits, -1)
    if kind == "forward_kl":
        return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if kind == "reverse_kl":
        return functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0))
    to_teacher = functional.kl_div(log_m, log_p, reduction="sum", log_target=True)
    return 0.5 * (to_teacher + functional.kl_div(log_m, log_q, reduction="sum", log_target=True))


def naive(problem: Problem) -> Tensor:
    """Whole logits in float32."""
    with torch.no_grad():
        teacher_logits = (problem.teacher_hidden @ problem.teacher_head.T).float()
    return divergence((problem.hidden @ problem.head.T).float(), teacher_logits, problem.divergence)


def naive_cross_entropy(problem: Problem) -> Tensor:
    """Whole logits in float32."""
    return functional.cross_entropy((problem.hidden @ problem.head.T).float(), problem.labels, reduction="sum")


def ours(problem: Problem, chunk_mebibytes: int | None) -> Tensor:
    """This project's loss, without statistics."""
    teacher = TeacherStates(problem.row(problem.teacher_hidden), problem.teacher_head)
    config = LossConfig(divergence=problem.divergence, chunk_mebibytes=chunk_mebibytes)
    return _ours(problem, [teacher], config)


def ours_sparse(problem: Problem, chunk_mebibytes: int | None) -> Tensor:
    """The same on sparse targets."""
    return _ours(problem, [problem.targets], LossConfig(chunk_mebibytes=chunk_mebibytes))


def ours_cross_entropy(problem: Problem, chunk_mebibytes: int | None) -> Tensor:
    """The same without a teacher: a fused cross-entropy."""
    return _ours(problem, [], LossConfig(chunk_mebibytes=chunk_mebibytes))


def _ours(problem: Problem, teachers: list[TeacherStates | SparseTargets], config: LossConfig) -> Tensor:
    hidden = problem.row(problem.hidden)
    loss, _ = distillation_loss(hidden, problem.head, problem.row_labels, teachers, config, measure=False)
    return loss


def liger_chunked() -> Callable[[Problem], Tensor]:
    """``liger_kernel.chunked_loss``: autograd inside chunks of 1024 positions."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def run(problem: Problem) -> Tensor:
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=BETA[problem.divergence],
            compiled=problem.hidden.is_cuda,
        )
        states = (problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head)
        return loss(*states, problem.labels) * len(problem.hidden)

    return run


def liger_fused() -> Callable[[Problem], Tensor]:
    """``liger_kernel.ops.fused_linear_jsd``: Triton."""
    if not torch.cuda.is_available():
        raise RuntimeError("Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearJSD

    def run(problem: Problem) -> Tensor:
        loss = LigerFusedLinearJSD(jsd_beta=BETA[problem.divergence])
        states = (problem.hidden, problem.head, problem.teacher_hidden, problem.teacher_head)
        return loss(*states, None) * len(problem.hidden)

    return run


def liger_cross_entropy() -> Callable[[Problem], Tensor]:
    """``LigerFusedLinearCrossEntropyLoss``: Triton."""
    if not torch.cuda.is_available():
        raise RuntimeError("Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    def run(problem: Problem) -> Tensor:
        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(problem.head, problem.hidden, problem.labels)

    return run


def trl_chunked() -> Callable[[Problem], Tensor]:
    """``trl.kernels.chunked_divergence``: tiles of 4096 x 32768, projected again in the backward pass."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run(problem: Problem) -> Tensor:
        teacher = (problem.teacher_hidden, problem.teacher_head, None)
        beta = BETA[problem.divergence]
        return ChunkedDivergenceFunction.apply(problem.hidden, problem.head, None, *teacher, beta)[0].sum()

    return run


def products(problem: Problem, *, with_teacher: bool) -> None:
    """The matrix products alone, over all tokens at once where the memory allows, else over 1024 of them."""
    with torch.no_grad():
        for start in range(0, len(problem.hidden), 1024):
            chunk = slice(start, start + 1024)
            slope = problem.hidden[chunk] @ problem.head.T
            if with_teacher:
                _ = problem.teacher_hidden[chunk] @ problem.teacher_head.T
            _ = slope @ problem.head
            _ = slope.T @ problem.hidden[chunk]


def oracle(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in float64, 16 positions at a time."""
    head = problem.head.detach().double().requires_grad_()
    teacher_head = problem.teacher_head.double()
    total, gradients = torch.zeros((), dtype=torch.float64), []
    for hidden_CH, teacher_CE in zip(
        problem.hidden.detach().double().split(16), problem.teacher_hidden.double().split(16), strict=True
    ):
        hidden_CH.requires_grad_()
        value = divergence(hidden_CH @ head.T, teacher_CE @ teacher_head.T, problem.divergence)
        value.backward()
        total += value.detach().cpu()
        assert hidden_CH.grad is not None
        gradients.append(hidden_CH.grad)
    assert head.grad is not None
    return total, torch.cat(gradients), head.grad


def gradients_of(method: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """One forward and backward pass."""
    loss = method(problem)
    return loss.detach(), *torch.autograd.grad(loss, [problem.hidden, problem.head])


def transient_bytes(run: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """Peak of torch's allocations during ``run``, above what was there, without what it returns."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = sum(tensor.nbytes for tensor in run())
        return torch.cuda.max_memory_allocated() - before - kept
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = sum(tensor.nbytes for tensor in run())
    return peak_bytes(profile) - kept


def peak_bytes(profile: torch.profiler.profile) -> int:
    """The highest sum of allocations less releases that a profile of a CPU saw."""
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def seconds(run: Callable[[], object], device: str) -> float:
    """Of the GPU, or of this process."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.process_time()
    run()
    return time.process_time() - started


def methods(options: argparse.Namespace) -> dict[str, Callable[[Problem], Tensor]]:
    """What can run here, by name; says why the others cannot."""
    chunk = options.chunk_mebibytes
    if options.sparse:
        found: dict[str, Callable[[Problem], Tensor]] = {
            "ours, sparse targets": lambda problem: ours_sparse(problem, chunk),
            "ours, cross-entropy": lambda problem: ours_cross_entropy(problem, chunk),
            "naive cross-entropy": naive_cross_entropy,
        }
        peers = {"Liger, cross-entropy": liger_cross_entropy}
    else:
        found = {"ours": lambda problem: ours(problem, chunk), "naive": naive}
        peers = {"Liger, chunked": liger_chunked, "Liger, Triton": liger_fused, "TRL, chunked": trl_chunked}
    for name, make in peers.items():
        try:
            found[name] = make()
        except (ImportError, RuntimeError) as reason:
            print(f"{name} is left out: {reason}")
    return found


def versions() -> str:
    """Of what is compared."""
    names = []
    for package in ("torch", "triton", "liger-kernel", "trl"):
        try:
            names.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            names.append(f"{package} absent")
    return ", ".join(names)


def measure(options: argparse.Namespace) -> list[str]:
    """The rows of a table."""
    problem, device = Problem.make(options), options.device
    candidates = methods(options)
    times: dict[str, list[float]] = {name: [] for name in [*candidates, "products"]}
    for _ in range(options.repeats):
        for name, method in candidates.items():
            times[name].append(seconds(lambda method=method: gradients_of(method, problem), device))
        times["products"].append(seconds(lambda: products(problem, with_teacher=not options.sparse), device))
    best = {name: min(several) for name, several in times.items()}
    memory = {
        name: transient_bytes(lambda method=method: gradients_of(method, problem), device)
        for name, method in candidates.items()
    }
    want = None if options.sparse else [tensor.cpu() for tensor in oracle(problem)]
    head = "| method | time | to the products alone | transient MiB | error of the gradients |"
    lines = [head, "|---|---|---|---|---|"]
    for name, method in candidates.items():
        error = "–"
        if want is not None:
            got = [tensor.cpu().double() for tensor in gradients_of(method, problem)]
            each = [float((a - b).norm() / b.norm()) for a, b in zip(got[1:], want[1:], strict=True)]
            error = ", ".join(f"{value:.0e}" for value in each)
        ratio = best[name] / best["products"]
        lines.append(f"| {name} | {best[name]:.3f} s | {ratio:.2f} | {memory[name] / MEBIBYTE:.0f} | {error} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--teacher-hidden", type=int, help="as the student's where unset")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--divergence", default="forward_kl", choices=list(BETA))
    parser.add_argument("--sparse", action="store_true", help="sparse targets against cross-entropy")
    parser.add_argument("--entries", type=int, default=12, help="of each position's sparse targets")
    parser.add_argument("--chunk-mebibytes", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    else:
        print(torch.cuda.get_device_name())
    print(f"{options.tokens} tokens, H {options.hidden}, V {options.vocabulary}, {options.dtype}, {versions()}")
    print("\n".join(measure(options)))


if __name__ == "__main__":
    main()
