"""What the sample recipe does between its settings and its result: answers and scores, block by block."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llamita import chat, checkpoints, runs, storage
from llamita.align import blocks, generation, rejection
from llamita.align.blocks import Block, Store
from llamita.align.dialogues import SPLITS, DialogueData, Refused
from llamita.align.rejection import Asked, Sample
from llamita.align.reward_model import RewardModel
from llamita.progress import Progress

log = logging.getLogger(__name__)


def device_of(name: str) -> torch.device:
    """The device of that name; this process's own where it is ``auto``."""
    return PartialState().device if name == "auto" else torch.device(name)


def prompts_of(config: Any, data: DialogueData) -> dict[str, list[Asked]]:
    """The prompts of each split that has any.

    Raises:
        ValueError: none has, or a prompt cannot be judged.
    """
    wanted = {"tasks": ("tasks",), "dialogues": ("dialogues",), "both": ("tasks", "dialogues")}[config.prompts]
    settings = {"most": config.max_prompts, "is_ranked": config.reward.path is not None}
    found = {
        split: rejection.asked(data.tasks(split), data.dialogues(split), config.prompts, **settings)
        for split in SPLITS
        if split in config.data.splits
    }
    if not any(found.values()):
        data.need(config.data.splits[0], wanted[0])
        raise ValueError(f"data.path={config.data.path} has no prompt for prompts={config.prompts}")
    return {split: rows for split, rows in found.items() if rows}


def answerable(asked: dict[str, list[Asked]], encoder: chat.Encoder) -> dict[str, list[Asked]]:
    """The prompts that the chat template takes; the others are named and left out, as they are in training.

    Raises:
        ValueError: these are more than a few.
    """
    found: dict[str, list[Asked]] = {}
    for split, rows in asked.items():
        refused, found[split] = Refused(), []
        for one in rows:
            try:
                encoder.prompt(one.messages)
            except ValueError as error:
                refused.add(f"{split}, {one.name}", str(error))
            else:
                found[split].append(one)
        refused.check(f"prompts of {split}", len(found[split]))
    return found


@dataclass(frozen=True)
class Work:
    """Everything that is asked, in blocks, and where answers and scores go."""

    asked: dict[str, list[Asked]]
    blocks: list[Block]
    answers: Store
    scores: Store

    def rows(self, block: Block) -> list[Asked]:
        """The prompts of a block."""
        return self.asked[block.split][block.first : block.last]


def plan(config: Any, data: DialogueData, asked: dict[str, list[Asked]], hashes: dict[str, str]) -> Work:
    """The blocks, by what they are made from: what does not change an answer may change on a restart."""
    found = [b for split, rows in asked.items() for b in blocks.blocks(split, len(rows), config.block_prompts)]
    told = {
        "model": hashes["model"],
        "data": data.content_hash,
        "sampling": config.sampling,
        "samples": config.samples_per_prompt,
        "seed": config.run.seed,
        "round": config.round,
        "dtype": config.dtype,
        "tokenizer": hashes["tokenizer"],
        "prompts": {split: [one.name for one in rows] for split, rows in asked.items()},
        "asked": [config.prompts, config.max_prompts, config.block_prompts],
    }
    made = blocks.identity(**told)
    judge = [hashes.get("reward"), hashes.get("reward/tokenizer")]
    judged = blocks.identity(answers=made, reward=judge, rows=config.reward.batch_rows)
    return Work(asked, found, Store(config.out / "answers", made), Store(config.out / "scores", judged))


def hashes_of(config: Any, data: DialogueData, state: PartialState) -> dict[str, str]:
    """Content hashes of what is read; the main process reads the weights, and tells the others."""
    found = [{"data": data.content_hash}]
    if state.is_main_process:
        found[0]["model"] = checkpoints.content_hash(config.model.path)
        found[0]["tokenizer"] = checkpoints.dialogue_hash(config.model.path)
        if config.reward.path is not None:
            found[0]["reward"] = checkpoints.content_hash(config.reward.path)
            found[0]["reward/tokenizer"] = checkpoints.dialogue_hash(config.reward.path)
    if state.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def sampler_of(config: Any, encoder: chat.Encoder) -> generation.Sampler:
    """The model, ready to answer."""
    if config.sampling.backend is generation.Backend.vllm:
        return generation.VllmSampler(config.model.path, encoder, config.sampling, dtype=config.dtype)
    dtype = checkpoints.dtype_named(config.dtype) if config.dtype else None
    model = checkpoints.load_model(config.model.path, dtype=dtype, device=device_of(config.device))
    return generation.TransformersSampler(model.train(False), encoder, config.sampling)


def check_lengths(config: Any, asked: dict[str, list[Asked]], encoder: chat.Encoder, positions: int) -> None:
    """Raise ``ValueError`` for a prompt that the model has no room to answer."""
    for rows in asked.values():
        prompts = [generation.Prompt(one.name, encoder.prompt(one.messages)) for one in rows]
        generation.check_lengths(prompts, config.sampling, positions, f"model.path={config.model.path}")


def answer_all(config: Any, work: Work, state: PartialState, run: runs.Run, encoder: chat.Encoder) -> None:
    """Draw what is missing of this process's share of the answers."""
    mine = work.answers.missing(work.blocks[state.process_index :: state.num_processes])
    if mine:
        sampler = sampler_of(config, encoder)
        for block in _counted("answers", mine, work, run):
            rows = work.rows(block)
            prompts = [generation.Prompt(one.name, encoder.prompt(one.messages)) for one in rows]
            settings = {"samples": config.samples_per_prompt, "seed": config.run.seed, "number": config.round}
            drawn = sampler.draw(prompts, **settings)
            told = [{"id": one.name, "answers": storage.plain(got)} for one, got in zip(rows, drawn, strict=True)]
            work.answers.write(block, told)
            every = [answer for got in drawn for answer in got]
            cut = sum(not answer.finished for answer in every) / len(every)
            run.log({"sample/tokens": sum(a.tokens for a in every), "sample/cut": cut}, step=work.blocks.index(block))
    work.answers.wait(work.blocks, run)


def score_all(config: Any, work: Work, state: PartialState, run: runs.Run) -> None:
    """Judge what is missing of this process's share."""
    mine = work.scores.missing(work.blocks[state.process_index :: state.num_processes])
    if mine:
        judge = None
        if config.reward.path is not None:
            generation.give_back()  # the model that answered is gone
            dtype = checkpoints.dtype_named(config.dtype) if config.dtype else None
            rows, device = config.reward.batch_rows, device_of(config.device)
            judge = RewardModel.open(config.reward.path, dtype=dtype, device=device, batch_rows=rows)
        for block in _counted("scores", mine, work, run):
            work.scores.write(block, _judged(judge, work.rows(block), work.answers.read(block)))
    work.scores.wait(work.blocks, run)


def _judged(judge: RewardModel | None, rows: Sequence[Asked], told: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [[answer["text"] for answer in row["answers"]] for row in told]
    found: list[dict[str, Any]] = [
        {"id": one.name, "verified": [rejection.verify(one, text) for text in said]}
        for one, said in zip(rows, texts, strict=True)
    ]
    if judge is not None:
        # An empty answer is no message, and is never chosen: nobody asks what it is worth.
        flat = [(p, s) for p, said in enumerate(texts) for s, text in enumerate(said) if text]
        names = [f"{rows[p].name}/{s}" for p, s in flat]
        values = judge.score([(rows[p].messages, texts[p][s]) for p, s in flat], names, may_be_nan=True)
        for row, said in zip(found, texts, strict=True):
            row["reward"] = [None] * len(said)
        for (p, s), name, value in zip(flat, names, values, strict=True):
            if abs(value) < float("inf"):
                found[p]["reward"][s] = value
            else:
                log.warning("the reward of %s is %s: it is not chosen", name, value)
    return found


def _counted(name: str, mine: Sequence[Block], work: Work, run: runs.Run) -> Any:
    done = len(work.blocks) - len(mine)
    with run.watchdog, Progress(name, len(work.blocks), completed=done) as progress:
        for block in progress.count(blocks.until_stopped(mine, run)):
            run.watchdog.beat()
            yield block


def samples_of(config: Any, work: Work, split: str) -> list[list[Sample]]:
    """Every answer of a split with its scores, per prompt."""
    found = []
    is_ranked = config.reward.path is not None
    for block in (block for block in work.blocks if block.split == split):
        rows = zip(work.rows(block), work.answers.read(block), work.scores.read(block), strict=True)
        for one, said, judged in rows:
            rewards = judged.get("reward") or [None] * len(said["answers"])
            told = zip(said["answers"], judged["verified"], rewards, strict=True)
            found.append(
                [
                    Sample(one, n, a["text"], a["tokens"], a["finished"], verified, reward, is_ranked)
                    for n, (a, verified, reward) in enumerate(told)
                ]
            )
    return found


def tell_unusable(name: str, groups: Sequence[Sequence[Sample]], folder: Path) -> None:
    """Name the first answers that cannot be chosen; all are in ``samples.jsonl``."""
    wrong = [s for group in groups for s in group if s.status is not rejection.Status.usable]
    for sample in wrong[:20]:
        log.warning("%s: %s: %s: it is not chosen", name, sample.name, sample.status)
    if len(wrong) > 20:
        log.warning("%s: and %d more, see %s", name, len(wrong) - 20, folder / "samples.jsonl")
