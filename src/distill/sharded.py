"""A teacher whose layers are spread over processes and gathered one at a time: ZeRO-3 for a model that never learns.

Each process keeps one piece of every layer. While layer k computes, layer k + 1 is gathered into the other of two
buffers. Only the head and the last norm are whole everywhere.

Why neither a second DeepSpeed engine nor FSDP2: nothing is left to do for either, because there are no gradients and
no optimiser. DeepSpeed's ZeRO-3 is switched on by a configuration that holds for the whole process, so that the student
would be built under the teacher's, and needs an optimiser's settings for a model without one; loading goes through
it too. FSDP2 gathers in the same way as is done here, but loads into tensors of its own and leaves the order of its
collectives beside the student's to its hooks. Here the bytes on each process, their origin in the file, and the order
of the collectives are a few lines each, and the same on a CPU.

Memory per process for a 70B (80 layers of 855.7 million values, vocabulary 128,256, width 8,192) in bfloat16 over 8
processes: pieces of layers and embedding 17.4 GB, head 2.1 GB, two buffers of the larger of embedding and layer 4.2 GB:
23.7 GB. The head is whole because the loss needs it at the moment of most memory anyway: gathering it for each use
would move 2.1 GB per micro-batch and lower no peak. The embedding is needed when little else is, and shares a buffer.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch import distributed as dist

from llamita import checkpoints, runs
from llamita.distill.losses import TeacherStates
from llamita.distill.teachers import Attention, Batch, last_hidden

# torch 2.13 renames it, and warns of the old name.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
EMBEDDING = "model.embed_tokens.weight"
ALIGNMENT = 64
"""Values; a piece begins where a kernel likes a tensor to begin."""
CHECKSUM_VALUES = 2**22
"""Values that a checksum looks at in one go: 100 MB as 64-bit integers."""
CHECKSUM_PRIME = 65_521


@dataclass(frozen=True)
class Unit:
    """Tensors that are gathered together, laid end to end."""

    label: str
    sizes: dict[str, torch.Size]
    """Shape of each tensor by its name in the files."""

    @property
    def numel(self) -> int:
        """Values of all tensors."""
        return sum(size.numel() for size in self.sizes.values())

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The tensors as views of a flat buffer."""
        found, first = {}, 0
        for name, size in self.sizes.items():
            found[name] = flat[first : first + size.numel()].view(size)
            first += size.numel()
        return found


def units_of(weights: checkpoints.Weights) -> list[Unit]:
    """The embedding, unless it is the head as well, and every layer, in the order of their use."""
    sizes = {name: torch.Size(size) for name, size in checkpoints.stored_tensors(weights.config).items()}
    units = [] if weights.shape.tie_word_embeddings else [Unit(EMBEDDING, {EMBEDDING: sizes[EMBEDDING]})]
    for index in range(weights.shape.num_hidden_layers):
        names = [f"model.layers.{index}.{name}" for name in weights.shape.layer_tensors()]
        units.append(Unit(f"model.layers.{index}", {name: sizes[name] for name in names}))
    return units


def read_piece(weights: checkpoints.Weights, unit: Unit, into: Tensor, first: int) -> None:
    """Fill ``into`` with the values from ``first`` on of a unit's flat form; reads no other page of the files."""
    start = 0
    for name, size in unit.sizes.items():
        begin, end = max(first, start), min(first + len(into), start + size.numel())
        if begin < end:
            into[begin - first : end - first] = weights[name].flatten()[begin - start : end - start].to(into.dtype)
        start += size.numel()


def checksum(values: Tensor, first: int = 0) -> Tensor:
    """Two 64-bit sums over the bits of a flat tensor, exact on every device: plain, and weighted by the place.

    Values are read as integers v_i, i counted from ``first``: sum v_i and sum (i mod 65521 + 1) v_i, modulo 2^64. The
    sums of parts add up to that of the whole. The second one finds values that are in each other's place.
    """
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
    total = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), CHECKSUM_VALUES):
        part = bits[start : start + CHECKSUM_VALUES].long()
        place = torch.arange(first + start, first + start + len(part), device=part.device) % CHECKSUM_PRIME + 1
        total += torch.stack([part.sum(), (part * place).sum()])
    return total


def checksum_of_file(
    weights: checkpoints.Weights, unit: Unit, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """:func:`checksum` of a unit's flat form, one tensor at a time."""
    total, first = torch.zeros(2, dtype=torch.int64, device=device), 0
    for name, size in unit.sizes.items():
        total += checksum(weights[name].flatten().to(device, dtype), first)
        first += size.numel()
    return total


def node_group() -> Any:
    """The processes that share a teacher: those of one node, whose links are fast; all, where a node has only one.

    ``None`` where there is only this one. Makes process groups, so all ranks must come here.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    size = local if 1 < local <= world and world % local == 0 else world
    group, _ = dist.new_subgroups(group_size=size, timeout=runs.COLLECTIVE_TIMEOUT)  # type: ignore[no-untyped-call]
    return group


class ShardedTeacher:
    """A frozen model in pieces, one of each layer on each process of ``group``."""

    is_sparse = False

    def __init__(
        self,
        name: str,
        weights: checkpoints.Weights,
        weight: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention,
        group: Any,
    ) -> None:
        """Read this process's pieces and compare what all of them make together with the files.

        Raises:
            ValueError: a gathered layer, the head or the norm is not what the files hold.
        """
        self.name = name
        self.weight = weight
        self.device = device
        self._group = group
        self._size = dist.get_world_size(group) if group else 1
        self._rank = dist.get_rank(group) if group else 0
        self.units = units_of(weights)
        self._next = 0
        self._counts_turns = False
        self._work: list[Any] = [None, None]
        self._pieces = [self._read(weights, unit, dtype) for unit in self.units]
        longest = max(len(piece) for piece in self._pieces) * self._size
        self._buffers = [torch.zeros(longest, dtype=dtype, device=device) for _ in range(2)]
        weights.config._attn_implementation = attention.value
        self.model = checkpoints.meta_model(weights.config, dtype=dtype, device=device)
        self._furnish(weights)
        self._verify(weights)

    @classmethod
    def load(
        cls,
        name: str,
        path: Path,
        weight: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention,
    ) -> Self:
        """Spread a model directory over the processes of each node; every rank calls this.

        Raises:
            ValueError: as :class:`checkpoints.Weights`, or the pieces do not make what the files hold.
        """
        weights = checkpoints.Weights(path)
        return cls(name, weights, weight, dtype=dtype, device=device, attention=attention, group=node_group())

    def _read(self, weights: checkpoints.Weights, unit: Unit, dtype: torch.dtype) -> Tensor:
        length = -(-unit.numel // (self._size * ALIGNMENT)) * ALIGNMENT
        piece = torch.zeros(length, dtype=dtype)
        read_piece(weights, unit, piece, self._rank * length)
        return piece.to(self.device)

    def _furnish(self, weights: checkpoints.Weights) -> None:
        """Give the model the head and norm whole, and two layers, whose weights are the buffers, in turns."""
        model, dtype = self.model, self._buffers[0].dtype
        head = weights.head().to(self.device, dtype, copy=True)
        norm = weights["model.norm.weight"].to(self.device, dtype, copy=True)
        model.lm_head.weight = nn.Parameter(head, requires_grad=False)
        model.model.norm.weight = nn.Parameter(norm, requires_grad=False)
        embedding = model.model.embed_tokens
        if self.units[0].label == EMBEDDING:
            embedding.weight = nn.Parameter(self.units[0].views(self._buffers[0])[EMBEDDING], requires_grad=False)
            embedding.register_forward_pre_hook(self._arrival())
        else:
            embedding.weight = model.lm_head.weight
        before = len(self.units) - len(model.model.layers)
        slots = [self._slot(model.model.layers[0], self.units[before], buffer) for buffer in self._buffers]
        model.model.layers = nn.ModuleList(slots[(before + index) % 2] for index in range(len(model.model.layers)))
        model.requires_grad_(False)
        model.train(False)

    def _slot(self, template: nn.Module, unit: Unit, buffer: Tensor) -> nn.Module:
        slot = copy.deepcopy(template)
        below = f"{unit.label}."
        views = {name.removeprefix(below): view for name, view in unit.views(buffer).items()}
        slot.load_state_dict(views, strict=True, assign=True)
        slot.register_forward_pre_hook(self._arrival())
        return slot

    def _arrival(self) -> Callable[..., None]:
        """:meth:`_arrive` for a hook, which must not keep this teacher, and its buffers, alive."""
        arrive = weakref.WeakMethod(self._arrive)

        def hook(*_: Any) -> None:
            if (found := arrive()) is not None:
                found()

        return hook

    def _start(self, index: int) -> None:
        """Begin to gather a unit. Whoever used its buffer before has been queued, and is waited for."""
        piece = self._pieces[index]
        buffer = self._buffers[index % 2][: len(piece) * self._size]
        if self._group is None:
            buffer.copy_(piece)
            return
        # As bytes: not every backend knows every dtype.
        self._work[index % 2] = all_gather(
            buffer.view(torch.uint8), piece.view(torch.uint8), group=self._group, async_op=True
        )

    def _wait(self, index: int) -> None:
        if self._work[index % 2] is not None:
            self._work[index % 2].wait()
            self._work[index % 2] = None

    def _arrive(self) -> None:
        """Before a module computes: let the next one's weights be on their way, and wait for its own."""
        index = self._next
        self._next += 1
        if self._next < len(self.units):
            self._start(self._next)
        self._wait(index)

    @contextmanager
    def uneven(self) -> Iterator[None]:
        """Within, processes may call :meth:`states` differently often.

        One that leaves, at the end of its work or because it was stopped, gathers layers for the others until the last
        of them has left. An error ends the process at once: its launcher ends the others.
        """
        self._counts_turns = True
        try:
            yield
        except runs.Stopped:
            self._keep_company()
            raise
        else:
            self._keep_company()
        finally:
            self._counts_turns = False

    def _keep_company(self) -> None:
        """Run a row of one token whenever another process runs something."""
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        while self._take_turn(works=False):
            self._forward({"input_ids": nothing, "position_ids": nothing}, None)

    def _take_turn(self, *, works: bool) -> bool:
        """Agree on one more forward; whether any process has something to run."""
        workers = torch.tensor([int(works)], device=self.device)
        if self._group is not None:
            dist.all_reduce(workers, group=self._group)
        return works or workers.item() > 0

    def states(self, batch: Batch, mask: Tensor | None) -> TeacherStates:
        """Last hidden states and head, without gradient.

        All processes of the group call this together, or within :meth:`uneven`.
        """
        if self._counts_turns:
            self._take_turn(works=True)
        return self._forward(batch, mask)

    @torch.no_grad()
    def _forward(self, batch: Batch, mask: Tensor | None) -> TeacherStates:
        self._next = 0
        self._start(0)
        return TeacherStates(last_hidden(self.model, batch, mask), self.model.lm_head.weight, self.weight)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes on this process: of the pieces, of what is whole, and of the two buffers."""
        whole = [self.model.lm_head.weight, self.model.model.norm.weight]
        return {
            "pieces": sum(tensor.nbytes for tensor in self._pieces),
            "whole": sum(tensor.nbytes for tensor in whole),
            "buffers": sum(tensor.nbytes for tensor in self._buffers),
        }

    def _verify(self, weights: checkpoints.Weights) -> None:
        """Gather every unit once and compare it, and what is whole, with the files.

        The file's side is computed by one process per unit, so that all of them together read each file twice.
        """
        head = "lm_head.weight" if self.units[0].label == EMBEDDING else EMBEDDING
        whole = {head: self.model.lm_head.weight, "model.norm.weight": self.model.model.norm.weight}
        units = [*self.units, *(Unit(name, {name: tensor.shape}) for name, tensor in whole.items())]
        sums = torch.zeros(len(units), 2, dtype=torch.int64, device=self.device)
        of_files = torch.zeros_like(sums)
        for index, unit in enumerate(units):
            flat = self._gathered(index) if index < len(self.units) else whole[unit.label].flatten()
            sums[index] = checksum(flat[: unit.numel])
            if index % self._size == self._rank:
                of_files[index] = checksum_of_file(weights, unit, flat.dtype, self.device)
        if self._group is not None:
            dist.all_reduce(of_files, group=self._group)
        self._refuse(units, (sums != of_files).any(1), weights.path)

    def _gathered(self, index: int) -> Tensor:
        self._start(index)
        self._wait(index)
        return self._buffers[index % 2]

    def _refuse(self, units: Sequence[Unit], differs: Tensor, path: Path) -> None:
        if self._group is not None:
            count = differs.long()
            dist.all_reduce(count)
            differs = count > 0
        if wrong := [unit.label for unit, bad in zip(units, differs.tolist(), strict=True) if bad]:
            raise ValueError(
                f"teacher {self.name}: {len(wrong)} parts gathered from all processes are not those of {path}: "
                f"{', '.join(wrong[:3])}; do all machines see the same files?"
            )
