"""Every token once per epoch on any number of processes, and resume anywhere gives the same rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamita.data import shards
from llamita.data.loader import Loader, Sequential
from llamita.data.pack import pack
from llamita.data.shards import Batch, Split

ROWS = 24
LENGTH = 8


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """24 full rows, each of one document of tokens that appear nowhere else."""
    folder = tmp_path_factory.mktemp("data")
    stream = np.arange(ROWS * LENGTH, dtype=np.uint32)
    packing = pack(np.arange(0, stream.size, LENGTH), np.full(ROWS, LENGTH), LENGTH)
    entry = shards.write(folder / "shards", "train", stream, packing, pad_id=0, shard_bytes=5 * 4 * LENGTH)
    return Split("train", folder, LENGTH, stream.size, entry["shards"])


def loader(split: Split, **overrides: int) -> Loader:
    return Loader(split, **{"seed": 0, "global_batch_rows": 12, "micro_batch_rows": 1, **overrides})


def tokens(steps: Iterable[list[Batch]]) -> list[int]:
    return [t for step in steps for batch in step for t in batch["input_ids"].flatten().tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_token_appears_once_per_epoch(split: Split, world_size: int) -> None:
    loaders = [loader(split, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(3):
        epoch = Counter(t for one in loaders for t in tokens(islice(one, ROWS // 12)))
        assert epoch == Counter(range(ROWS * LENGTH))


def test_every_token_appears_once_per_epoch_where_steps_do_not_divide_the_rows(split: Split) -> None:
    """20 rows a step of 24: the fifth of six steps is the end of the fourth epoch and the begin of the next."""
    seen = Counter(tokens(islice(loader(split, global_batch_rows=20), 6)))
    assert seen == Counter(dict.fromkeys(range(ROWS * LENGTH), 5))


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_a_step_is_the_same_rows_for_any_world_and_micro_batch(
    split: Split, world_size: int, micro_batch_rows: int
) -> None:
    whole = [tokens([step]) for step in islice(loader(split, micro_batch_rows=12), 5)]
    ranks = [
        list(islice(loader(split, rank=r, world_size=world_size, micro_batch_rows=micro_batch_rows), 5))
        for r in range(world_size)
    ]
    assert [tokens(rank[step] for rank in ranks) for step in range(5)] == whole
    assert {batch["input_ids"].shape for rank in ranks for step in rank for batch in step} == {
        torch.Size([micro_batch_rows, LENGTH])
    }


@given(before=st.integers(0, 9), world_before=st.sampled_from([1, 2, 3, 4]), world_after=st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=25)
def test_resume_anywhere_gives_the_rows_of_the_uninterrupted_run(
    split: Split, before: int, world_before: int, world_after: int
) -> None:
    straight = [tokens([step]) for step in islice(loader(split), before + 4)]
    first = loader(split, world_size=world_before, rank=world_before - 1)
    list(islice(first, before))
    resumed = [loader(split, world_size=world_after, rank=rank) for rank in range(world_after)]
    for one in resumed:
        one.load_state_dict(first.state_dict())
    assert [tokens(steps) for steps in zip(*(islice(one, 4) for one in resumed), strict=True)] == straight[before:]


def test_the_state_is_three_numbers(split: Split) -> None:
    one = loader(split, seed=5)
    list(islice(one, 3))
    assert one.state_dict() == {"seed": 5, "samples_consumed": 36, "data_hash": split.content_hash}
    assert one.epoch == 1.5


def test_another_seed_is_another_order(split: Split) -> None:
    assert tokens(islice(loader(split, seed=1), 1)) != tokens(islice(loader(split, seed=2), 1))


@pytest.mark.parametrize(("key", "value"), [("data_hash", "another"), ("seed", 9)])
def test_the_position_in_other_data_or_another_order_is_refused(split: Split, key: str, value: object) -> None:
    state = loader(split).state_dict() | {key: value}
    with pytest.raises(ValueError, match=f"the saved position belongs to {key}={value}, this run has {key}="):
        loader(split).load_state_dict(state)


def test_a_negative_position_is_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="samples_consumed must be at least 0, got -1"):
        loader(split).load_state_dict(loader(split).state_dict() | {"samples_consumed": -1})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"global_batch_rows": 10, "world_size": 4}, r"must be a multiple of micro_batch_rows \* world_size = 1 \* 4"),
        ({"micro_batch_rows": 5}, r"must be a multiple of micro_batch_rows \* world_size = 5 \* 1, got 12"),
        ({"micro_batch_rows": 0}, "must be at least 1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, got 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(split: Split, overrides: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(split, **overrides)


def test_sequential_gives_each_row_once_in_order(split: Split) -> None:
    batches = list(Sequential(split, batch_rows=7))
    assert [len(batch["input_ids"]) for batch in batches] == [7, 7, 7, 3]
    together = torch.cat([batch["input_ids"] for batch in batches])
    assert torch.equal(together, split.rows(np.arange(ROWS))["input_ids"])


def test_sequential_stops_where_it_is_told(split: Split) -> None:
    assert [len(batch["input_ids"]) for batch in Sequential(split, batch_rows=7, max_rows=10)] == [7, 3]
    with pytest.raises(ValueError, match="batch_rows and max_rows must be at least 1"):
        next(Sequential(split, batch_rows=0))
