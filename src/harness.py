"""The tasks of lm-eval: looked up, their data checked beforehand, and asked of a model on all ranks."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llamita import chat
from llamita.evaluate import Estimate

TASKS = Path(__file__).resolve().parent.parent / "tasks"
"""Task files of this repository, which wait beside the library, also in a copy of both."""


@dataclass(kw_only=True)
class TaskConfig:
    """How lm-eval's tasks are asked."""

    limit: int | None = None
    """Items of each task; unset: all."""
    num_fewshot: int | None = None
    """Examples in each prompt; unset: as the task says."""
    batch_size: int = 8
    apply_chat_template: bool = False
    """Ask as a user would: for assistants, and for lm-eval's ``*_llama`` tasks."""
    fewshot_as_multiturn: bool = False
    """Examples as turns of the dialogue; needs ``apply_chat_template``."""

    def __post_init__(self) -> None:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("task.fewshot_as_multiturn=true needs task.apply_chat_template=true")
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"task.{name} must be at least {least}, got {value}")


def task_manager(names: Sequence[str], task_path: Path | None) -> Any:
    """lm-eval's index of tasks, with those below ``task_path`` (unset: ``TASKS``) first.

    Raises:
        ValueError: lm-eval is not installed, or it does not know one of ``names``.
    """
    folder = task_path or TASKS
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f'tasks={list(names)} need lm-eval: pip install -e ".[eval]"') from error
    if not folder.is_dir():
        raise ValueError(f"task_path={folder} is not a directory")
    # Indexing lm-eval's own thousands of files takes long: only where a name is not local.
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"tasks has {name!r}, which neither lm-eval nor task_path={folder} knows{hint}")
    for entry in manager.task_index.values():
        _root_data_files(entry, folder)
    return manager


def check_tasks(names: Sequence[str], task_path: Path | None) -> None:
    """Open the data of all tasks, so that what is missing is known before hours of work.

    Raises:
        ValueError: as :func:`task_manager`; or the data of a task is not on this machine.
    """
    manager = task_manager(names, task_path)
    try:
        manager.load(list(names))
    except OSError as error:
        raise ValueError(
            f"the data of tasks={list(names)} is not on this machine ({error}); "
            "fetch it once with HF_HUB_OFFLINE=0, or give local files with task_path="
        ) from error


def _root_data_files(entry: Any, folder: Path) -> None:
    """Let ``data_files`` of a local task be relative to its YAML file: lm-eval would look in the working directory.

    A task with functions of its own (``!function``) is left as it is, because they are bound when its file is read.
    """
    kwargs = (entry.cfg or {}).get("dataset_kwargs") or {}
    file, files = entry.yaml_path, kwargs.get("data_files")
    if file is None or files is None or not file.is_relative_to(folder):
        return
    if "!function" not in file.read_text(encoding="utf-8"):
        kwargs["data_files"] = _below(file.parent.resolve(), files)
        entry.yaml_path = None


def _below(folder: Path, files: Any) -> Any:
    match files:
        case str() if (folder / files).exists():
            return str(folder / files)
        case list():
            return [_below(folder, file) for file in files]
        case dict():
            return {split: _below(folder, file) for split, file in files.items()}
    return files


def run_tasks(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    names: Sequence[str],
    task_path: Path | None,
    config: TaskConfig,
    *,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Scores of ``model`` on lm-eval's tasks: ``{task: {metric: estimate}}``.

    Examples are split over the ranks of the launch; every rank must call, rank 0 alone gets scores.

    Raises:
        ValueError: as :func:`task_manager`.
    """
    manager = task_manager(names, task_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # Log-probabilities of long answers in 16 bits would have two or three digits, and answers would tie.
    settings = {"batch_size": config.batch_size, "softmax_dtype": torch.float32}
    # A template that asks for the date would else change what is asked from day to day.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, chat_template_args={"date_string": chat.DATE}, **settings)
    _spread(lm)
    results = simple_evaluate(
        model=lm,
        tasks=list(names),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        task_manager=manager,
        # Answers are kept in no cache: lm-eval's is a pickle.
        use_cache=None,
        log_samples=False,
        bootstrap_iters=1000,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {} if results is None else {task: _scores(values) for task, values in results["results"].items()}


def _spread(lm: Any) -> None:
    """Let every rank answer its share, which lm-eval arranges only for models that it loaded itself."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        lm.accelerator = accelerator
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes


def _scores(values: Mapping[str, Any]) -> dict[str, Estimate]:
    """lm-eval's ``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` as estimates by metric."""
    scores = {}
    for key, value in values.items():
        metric, comma, which = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{metric}_stderr,{which}")
        name = metric if which == "none" else f"{metric} ({which})"
        scores[name] = Estimate(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return scores
