"""Teachers that are read from a cache instead of being run, a step ahead of the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from llamita.distill.cache import Cache, Rows
from llamita.distill.loop import Source
from llamita.distill.losses import LossConfig
from llamita.distill.sparse import SparseTargets
from llamita.distill.teachers import Batch, TeacherConfig

Step = tuple[list[Batch], dict[str, Any]]


class CachedTeacher:
    """A teacher whose distributions were stored; see :class:`teachers.Teacher`."""

    is_sparse = True

    def __init__(self, name: str, cache: Cache, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self.cache = cache

    def attach(self, batch: Batch) -> dict[str, Tensor]:
        """A batch on the CPU with what this teacher says to it, which then travels with it to the device.

        Raises:
            ValueError: the cache does not hold a document of the batch.
        """
        found = self.cache.lookup(batch)
        return {**batch, **{self._key(name): tensor for name, tensor in found.items()}}

    def _key(self, name: str) -> str:
        return f"{self.name}/{name}"

    def states(self, batch: Batch, mask: Tensor | None) -> SparseTargets:
        """What :meth:`attach` found for the batch; one that it has not seen, such as a held-out one, is looked up."""
        if self._key("ids") not in batch:
            device = batch["labels"].device
            batch = self.attach({name: tensor.cpu() for name, tensor in batch.items()})
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
        ids, values, lengths = (batch[self._key(name)] for name in ("ids", "values", "lengths"))
        return SparseTargets(ids, values, lengths, self.weight)


def teachers_of(caches: Mapping[str, Cache], settings: Mapping[str, TeacherConfig]) -> list[CachedTeacher]:
    """The teachers that are read from a cache."""
    return [CachedTeacher(name, cache, settings[name].weight) for name, cache in caches.items()]


class CachedSource:
    """Another source's micro-batches with what cached teachers say to them, read while the step before is computed."""

    def __init__(self, source: Source, teachers: Sequence[CachedTeacher]) -> None:
        self._source = source
        self._teachers = teachers
        self._pool = ThreadPoolExecutor(1)
        self._next: Future[Step] | None = None
        self._state = source.state_dict()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Itself: the position is part of its state."""
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step; it counts as consumed from here on, the one behind it does not."""
        ahead = self._next or self._pool.submit(self._read)
        batches, self._state = ahead.result()
        self._next = self._pool.submit(self._read)
        return batches

    def _read(self) -> Step:
        batches: list[Batch] = next(iter(self._source))
        for teacher in self._teachers:
            batches = [teacher.attach(batch) for batch in batches]
        return batches, self._source.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The other source's, of what was given out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position of the other source."""
        if self._next is not None:
            self._next.result()
            self._next = None
        self._source.load_state_dict(state)
        self._state = self._source.state_dict()

    def row_ids(self, first: int, stop: int) -> list[int]:
        """The other source's."""
        return self._source.row_ids(first, stop)


def open_all(teachers: Mapping[str, TeacherConfig], loss: LossConfig, tokenizer: str) -> dict[str, Cache]:
    """The caches among the teachers, by the teacher's name; no content is read.

    Raises:
        ValueError: a cache is not whole, or of another tokenizer, or cannot be learnt from with this loss.
    """
    found: dict[str, Cache] = {}
    for name, teacher in teachers.items():
        if teacher.cache is None:
            continue
        cache = found[name] = Cache.open(teacher.cache, f"teachers.{name}.cache")
        loss.check_sparse(name, cache.identity.temperature)
        if cache.identity.tokenizer != tokenizer:
            raise ValueError(
                f"teachers.{name}.cache={cache.path} is of another tokenizer ({cache.identity.tokenizer[:12]}) than "
                f"that of the data ({tokenizer[:12]})"
            )
    return found


def check_content(
    caches: Mapping[str, Cache], parents: dict[str, str], splits: Mapping[str, Rows], data_hash: str
) -> None:
    """Hold the caches against their hashes and the rows, and add what they were made from to ``parents``.

    ``parents`` has the content hash of a teacher whose directory was given beside its cache.

    Raises:
        ValueError: a cache is damaged, is of another teacher, or lacks a row.
    """
    for name, cache in caches.items():
        teacher = cache.identity.teacher
        if parents.setdefault(name, teacher) != teacher:
            raise ValueError(
                f"teachers.{name}.cache={cache.path} is of another teacher ({teacher[:12]}) than teachers.{name}.path "
                f"({parents[name][:12]})"
            )
        parents[f"{name}/cache"] = cache.content_hash
        cache.check_content()
        cache.check_covers(splits, data_hash)
