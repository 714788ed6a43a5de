"""What the assess recipe does with one model, and what it says of all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from llamita import chat, checkpoints, evaluate, harness, storage
from llamita.align import (
    assistants,
    blocks,
    choices,
    estimators,
    generation,
    refusals,
    rejection,
    reward_model,
    verifiers,
)
from llamita.align.assistants import Measure, Measures
from llamita.align.dialogues import Dialogue, DialogueData, Message, Pair, Task
from llamita.align.generation import Answer
from llamita.align.reward_model import RewardModel

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Questions:
    """What every model is asked."""

    dialogues: list[Dialogue]
    pairs: list[Pair]
    tasks: list[Task]
    safety: dict[str, list[str]]
    words: list[str]
    rewarded: dict[str, tuple[Message, ...]]
    """Prompts whose answers a reward model judges, by name."""
    choices: dict[str, list[choices.Question]]
    """Questions with endings, by the name of their list."""
    left_out: int = 0
    """Dialogues and pairs that one of the models cannot read, and so none is asked."""

    def prompts(self) -> dict[str, tuple[Message, ...]]:
        """Everything that is answered, by name."""
        found = {f"tasks/{number}": task.prompt for number, task in enumerate(self.tasks)}
        for name, texts in self.safety.items():
            found |= {f"safety/{name}/{n}": ({"role": "user", "content": text},) for n, text in enumerate(texts)}
        return found | self.rewarded


@dataclass(frozen=True)
class Reader:
    """How one of the models reads, as far as it can be told without its weights."""

    owner: str
    encoder: chat.Encoder
    positions: int

    @classmethod
    def of(cls, name: str, path: Path) -> Reader:
        """That of a model directory, whose files are looked at."""
        positions = checkpoints.Weights(path).config.max_position_embeddings
        return cls(f"models.{name}.path={path}", chat.Encoder(checkpoints.load_tokenizer(path)), positions)

    def prompt(self, name: str, messages: Sequence[Message]) -> list[int]:
        """The ids of a prompt; ``ValueError`` with its name where the chat template refuses it."""
        try:
            return self.encoder.prompt(messages)
        except ValueError as error:
            raise ValueError(f"{self.owner} cannot be asked {name}: {error}") from None

    def reads(self, row: Dialogue | Pair) -> bool:
        """Whether the chat template takes the row, and the model has positions for it; if not, this is told."""
        try:
            if isinstance(row, Pair):
                parts = [self.encoder.answer(row.prompt, side) for side in (row.chosen, row.rejected)]
                length = max(len(prompt) + len(answer) for prompt, answer in parts)
            else:
                length = len(self.encoder.dialogue(row.messages).ids)
            reason = f"it has {length} tokens, the model {self.positions} positions" * (length > self.positions)
        except ValueError as error:
            reason = str(error)
        if reason:
            log.warning("%s cannot read %s: %s: no model is asked", self.owner, row.id, reason)
        return not reason


def spread(items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
    """The results of all items, each process working on its share; every process calls this."""
    state = PartialState()
    number = state.num_processes
    parts: list[list[R]] = gather_object([list(work(items[state.process_index :: number]))])
    return [parts[place % number][place // number] for place in range(len(items))]


def load(path: Path, config: Any, device: torch.device) -> Any:
    """A model, ready to be measured."""
    dtype = checkpoints.dtype_named(config.dtype) if config.dtype else None
    return checkpoints.load_model(path, dtype=dtype, device=device).train(False)


def measure(
    path: Path, config: Any, asked: Questions, device: torch.device
) -> tuple[Measures, dict[str, Answer], dict[str, dict[str, evaluate.Estimate]]]:
    """What a model's likelihoods and answers say of it, its answers, and its scores on lm-eval's tasks."""
    tokenizer = checkpoints.load_tokenizer(path)
    encoder, model, rows = chat.Encoder(tokenizer), load(path, config, device), config.batch_rows
    likelihood = spread(asked.dialogues, lambda some: assistants.losses(model, encoder, some, batch_rows=rows))
    preferred = spread(asked.pairs, lambda some: assistants.preferences(model, encoder, some, batch_rows=rows))
    found = assistants.likelihoods(asked.dialogues, likelihood) | assistants.accuracies(asked.pairs, preferred)
    for name, questions in asked.choices.items():
        told = spread(questions, lambda some: choices.right(model, encoder, some, batch_rows=rows))
        found |= choices.accuracies(name, questions, told)
    scores: dict[str, dict[str, evaluate.Estimate]] = {}
    if config.tasks:
        # The template that the answers to everything else are asked with.
        tokenizer.chat_template = tokenizer.chat_template or chat.TEMPLATE
        seed = config.run.seed
        scores = harness.run_tasks(model, tokenizer, config.tasks, config.task_path, config.task, seed=seed)
    prompts = [generation.Prompt(name, encoder.prompt(messages)) for name, messages in asked.prompts().items()]
    sampler: generation.Sampler = generation.TransformersSampler(model, encoder, config.sampling)
    if config.sampling.backend is generation.Backend.vllm:
        del sampler, model
        generation.give_back()
        sampler = generation.VllmSampler(path, encoder, config.sampling, dtype=config.dtype)
    said = spread(prompts, lambda some: sampler.draw(some, samples=1, seed=config.run.seed))
    answers = {prompt.id: one for prompt, [one] in zip(prompts, said, strict=True)}
    found |= assistants.verified(asked.tasks, [answers[f"tasks/{n}"] for n in range(len(asked.tasks))])
    for name, texts in asked.safety.items():
        found |= assistants.refused(name, texts, [answers[f"safety/{name}/{n}"] for n in range(len(texts))])
    return found | (assistants.toxic(answers, asked.words) if asked.words else {}), answers, scores


def rewards(judge: RewardModel | None, asked: Questions, answers: Mapping[str, Answer], name: str) -> Measures:
    """What the reward model gives a model's answers."""
    if judge is None:
        return {}
    rows = list(asked.rewarded.items())
    names = [f"{name}: {row}" for row, _ in rows]
    said = [(messages, answers[row].text) for row, messages in rows]
    given = spread(
        list(zip(said, names, strict=True)),
        lambda some: judge.score([one for one, _ in some], [row for _, row in some], may_be_nan=True),
    )
    found = reward_model.least_where_unread(given, names)
    return assistants.rewarded({row: value for (row, _), value in zip(rows, found, strict=True)})


def keep(
    path: Path, measures: Measures, scores: Any, answers: Mapping[str, Answer], asked: Questions, made_from: str | None
) -> None:
    """Write what was measured of a model, and what it said."""
    path.parent.mkdir(exist_ok=True)
    prompts = asked.prompts()
    lines = [
        json.dumps({"id": name, "prompt": list(prompts[name]), **storage.plain(answer)}, ensure_ascii=False)
        for name, answer in answers.items()
    ]
    storage.write_atomically(path.with_suffix(".answers.jsonl"), "".join(f"{line}\n" for line in lines))
    storage.write_json(path, {"made_from": made_from, "measures": measures, "tasks": scores})


def made_from(name: str, config: Any, asked: Questions, hashes: Mapping[str, str]) -> str:
    """A hash of everything that decides what is measured of a model, with what the files hold now."""
    folder = config.task_path or harness.TASKS
    lists = sorted(folder.rglob("*")) if config.tasks else []
    return blocks.identity(
        inputs={key: value for key, value in hashes.items() if key not in config.models} | {"model": hashes[name]},
        tokenizer=checkpoints.dialogue_hash(config.models[name].path),
        rows=[[row.id for row in asked.dialogues], [row.id for row in asked.pairs]],
        tasks={str(file.relative_to(folder)): storage.sha256(file) for file in lists if file.is_file()},
    )


def is_measured(file: Path, made_from: str | None) -> bool:
    """Whether a former start has measured this, of the same models and data, as the main process knows."""
    if made_from is None or not file.is_file():
        return False
    if storage.read_mapping(file).get("made_from") == made_from:
        return True
    log.warning("%s was measured on other models or data than are there now: it is measured again", file)
    return False


def estimate(measure: Measure) -> evaluate.Estimate:
    """The ratio of a measure's sums."""
    return evaluate.ratio(torch.tensor(measure.numerator).double(), torch.tensor(measure.denominator).double())


def with_wins(found: dict[str, Measures]) -> dict[str, Measures]:
    """The measures of every model, and how often the reward model prefers its answers to the first one's."""
    first = next(iter(found))
    if "reward" not in found[first]:
        return found
    baseline = found[first]["reward"]
    return {
        name: {**measures, "win_rate": assistants.wins(measures["reward"], baseline)}
        for name, measures in found.items()
    }


def differences(found: dict[str, Measures], *, seed: int, resamples: int) -> list[dict[str, Any]]:
    """Every model against the first one, by a paired bootstrap over rows; positive where its figure is larger."""
    (first, base), *others = found.items()
    told = []
    for name, measures in others:
        gaps = {
            key: estimators.paired_bootstrap(
                (base[key].numerator, one.numerator),
                (base[key].denominator, one.denominator),
                seed=seed,
                resamples=resamples,
            )
            for key, one in measures.items()
            if key != "win_rate" and key in base and base[key].rows == one.rows
        }
        told.append({"first": first, "second": name, **gaps})
    return told


def table(values: Mapping[str, Mapping[str, evaluate.Estimate]]) -> str:
    """Figures of all models in columns, each with its standard error."""
    keys = list(dict.fromkeys(key for one in values.values() for key in one))
    lines = [["", *values]]
    for key in keys:
        cells = [one.get(key) for one in values.values()]
        lines.append([key, *("-" if cell is None else _cell(cell) for cell in cells)])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: evaluate.Estimate) -> str:
    return f"{value.value:.4f}" + (f" ± {value.stderr:.4f}" if value.stderr is not None else "")


def read_lists(config: Any) -> tuple[dict[str, list[str]], list[str]]:
    """The safety prompts by their names, and the listed words."""
    safety = {
        name: refusals.read_prompts(one.path, one.column, most=one.max_rows, where=one.where)
        for name, one in config.safety.items()
    }
    return safety, refusals.read_words(config.listed_words) if config.listed_words else []


def questions(config: Any, readers: Sequence[Reader]) -> Questions:
    """What every model is asked: of the dialogues and pairs those that all can read.

    Raises:
        ValueError: a list, the data or a task's check is not what it should be, or there is nothing to ask.
    """
    safety, words = read_lists(config)
    chosen = {name: choices.read(one.path, most=one.max_rows) for name, one in config.choices.items()}
    if config.data.path is None:
        return Questions([], [], [], safety, words, {}, chosen)
    data, split = DialogueData.open(config.data.path), config.data.split
    dialogues = rejection.evenly(data.dialogues(split), config.data.max_dialogues)
    pairs = rejection.evenly(data.pairs(split), config.data.max_pairs)
    tasks = rejection.evenly(data.tasks(split), config.data.max_tasks)
    given = len(dialogues) + len(pairs)
    dialogues = [row for row in dialogues if all(reader.reads(row) for reader in readers)]
    pairs = [row for row in pairs if all(reader.reads(row) for reader in readers)]
    left_out = given - len(dialogues) - len(pairs)
    if not (dialogues or pairs or tasks):
        lost = f": {left_out} dialogues and pairs cannot be read by every model" if left_out else ""
        raise ValueError(f"data.path={config.data.path} has nothing to measure in its split {split}{lost}")
    for task in tasks:
        if task.check:
            verifiers.validate_row(task.id, task.check)
    rewarded: dict[str, tuple[Message, ...]] = {}
    if config.reward.path is not None:
        rewarded = {f"tasks/{number}": task.prompt for number, task in enumerate(tasks)}
        known = {json.dumps(prompt) for prompt in rewarded.values()}
        for number, one in enumerate(dialogues):
            if one.prompt and json.dumps(one.prompt) not in known:
                known.add(json.dumps(one.prompt))
                rewarded[f"dialogues/{number}"] = one.prompt
    return Questions(dialogues, pairs, tasks, safety, words, rewarded, chosen, left_out)


def agreed(here: bool) -> bool:
    """What the main process says: others may have looked a moment before or after it."""
    told = [here]
    if PartialState().num_processes > 1:
        broadcast_object_list(told)
    return told[0]


def assess(name: str, config: Any, asked: Questions, file: Path, made_from: str | None) -> None:
    """Measure one model; the main process keeps what was found."""
    device = PartialState().device if config.device == "auto" else torch.device(config.device)
    measures, answers, scores = measure(config.models[name].path, config, asked, device)
    generation.give_back()  # what answered is gone; a reward model or the next one comes
    if config.reward.path is not None:
        dtype = checkpoints.dtype_named(config.dtype) if config.dtype else None
        rows = config.reward.batch_rows
        judge = RewardModel.open(config.reward.path, dtype=dtype, device=device, batch_rows=rows)
        measures |= rewards(judge, asked, answers, name)
    if PartialState().is_main_process:
        keep(file, measures, scores, answers, asked, made_from)
    PartialState().wait_for_everyone()


def hashes(config: Any) -> dict[str, str]:
    """Content hashes of everything that was read, by name."""
    found = {name: checkpoints.content_hash(model.path) for name, model in config.models.items()}
    if config.data.path is not None:
        found["data"] = DialogueData.open(config.data.path).content_hash
    if config.reward.path is not None:
        found["reward"] = checkpoints.content_hash(config.reward.path)
        found["reward/tokenizer"] = checkpoints.dialogue_hash(config.reward.path)
    for group in ("safety", "choices"):
        found |= {f"{group}/{name}": storage.sha256(one.path) for name, one in getattr(config, group).items()}
    if config.listed_words is not None:
        found["listed_words"] = storage.sha256(config.listed_words)
    return found


def scores(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, evaluate.Estimate]:
    """lm-eval's scores under one name each."""
    return {f"{t}/{m}": evaluate.Estimate(v["value"], v["stderr"]) for t, one in tasks.items() for m, v in one.items()}
