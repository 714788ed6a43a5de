"""How a recipe begins and ends: settings from Hydra, and every ending as one of the contract's exit codes.

Lives beside the recipes because Hydra does. A recipe ends with ``main = command(…)`` and
``if __name__ == "__main__": exit_with(main)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import socket
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

# Python puts the script's folder first on the path, where recipes/evaluate.py would hide the package `evaluate`.
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if str(Path(entry or ".").resolve()) != _HERE] + [_HERE]
# Hydra would print its own text and exit with 1; here the exception itself is wanted.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llamita import redaction, runs, storage

T = TypeVar("T")
_made_by_hydra: list[Path] = []
USER_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
    | {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)
"""What the system says of a disk or a path that only the user can change."""
CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")


def store(name: str, schema: type[Any]) -> None:
    """Give a schema to Hydra so that its mappings take any name: ``models.small.path=…``, without a plus sign.

    Hydra fills a mapping of dataclasses key by key, which OmegaConf refuses before the entry exists. So entries are
    free while the command line is read; :func:`settings` holds them to the schema afterwards.
    """
    hints = typing.get_type_hints(schema)
    open_fields = [f for f in dataclasses.fields(schema) if typing.get_origin(hints[f.name]) is dict]
    names = {f.name for f in open_fields}
    fields = [(f.name, dict[str, Any] if f.name in names else hints[f.name], f) for f in dataclasses.fields(schema)]
    node = OmegaConf.structured(dataclasses.make_dataclass(schema.__name__, fields, kw_only=True))
    for field in open_fields:
        OmegaConf.set_struct(node[field.name], False)
    for key, hint in hints.items():  # what is passed on to a library, such as deepspeed.config.…
        for inner in dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ():
            if typing.get_origin(typing.get_type_hints(hint)[inner.name]) is dict:
                OmegaConf.set_struct(node[key][inner.name], False)
    ConfigStore.instance().store(name, node)


def settings(cfg: DictConfig, schema: type[T]) -> T:
    """The typed settings of a composed configuration; nothing after this has heard of Hydra."""
    if HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        _made_by_hydra.append(Path(HydraConfig.get().runtime.output_dir))
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg)))
    assert isinstance(config, schema)
    _refuse_secrets(storage.plain(config))
    mappings = {name: value for name, value in vars(config).items() if isinstance(value, dict)}
    if wrong := [line for name, value in mappings.items() for key in value for line in runs.names({name: key})]:
        raise ValueError("\n".join(wrong))
    return config


def command(name: str, schema: type[T], run: Callable[[T], None]) -> Callable[[], None]:
    """The ``main`` of a recipe: compose ``configs/<name>.yaml`` with the command line, and run what it says."""
    failures: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)
    def compose(cfg: DictConfig) -> None:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(redaction.Formatter(handler.formatter))
        try:
            run(settings(cfg, schema))
        except Exception as error:  # Hydra would repeat all overrides before the one message that matters
            failures.append(error)

    def main() -> None:
        failures.clear()
        compose()
        if failures:
            raise failures[0]

    return main


def _refuse_secrets(settings: dict[str, Any]) -> None:
    if found := redaction.secrets_in(settings):
        raise ValueError(redaction.redacted("\n".join(found)))


def exit_with(main: Callable[[], Any]) -> NoReturn:
    """Run ``main`` and exit: 0 done, 75 saved and to be started again, 64 the user's error in one message."""
    _tell(runs.EXIT_CRASH)  # stands if this process dies without a word
    sys.excepthook = _say_all
    try:
        _refuse_secrets(dict(word.partition("=")[::2] for word in sys.argv[1:]))  # Hydra repeats a failed command line
        main()
    except runs.Stopped as stopped:
        _say(str(stopped))
        _leave(runs.EXIT_REQUEUE)
    except runs.BadNode as bad:
        _say(f"error: bad node: {bad}")
        _tell(runs.EXIT_NODE, node=bad.here)
        sys.stdout.flush()
        os._exit(runs.EXIT_NODE)  # a device that hangs would keep the interpreter from ending
    except runs.Crashed as crash:
        _say(f"error: {crash}")
        _leave(runs.EXIT_CRASH)
    except (ValueError, HydraException, OmegaConfBaseException, yaml.YAMLError, FileNotFoundError) as error:
        if os.environ.get("LLAMITA_TRACEBACK"):
            raise
        _say(f"error: {_message(error)}")
        _remove_empty_directory()
        _leave(runs.EXIT_USER)
    except OSError as error:
        if error.errno not in USER_ERRORS or os.environ.get("LLAMITA_TRACEBACK"):
            raise
        _say(f"error: cannot use {error.filename or 'a file'}: {error.strerror}; nothing that was finished is lost")
        _remove_empty_directory()
        _leave(runs.EXIT_USER)
    _leave(runs.EXIT_DONE)


def _remove_empty_directory() -> None:
    """Hydra makes ``out`` before any setting is looked at."""
    for folder in _made_by_hydra:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _leave(code: int) -> NoReturn:
    _tell(code)
    sys.exit(code)


def _tell(code: int, *, node: bool = False) -> None:
    """Tell the batch script this rank's exit code: torchrun and accelerate turn every failure into 1.

    With ``node`` also that this node should not be taken again, by the name that Slurm has for it.
    """
    if folder := os.environ.get("LLAMITA_EXIT_DIR"):
        with contextlib.suppress(OSError):
            Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(f"{code}\n")
            if node:
                Path(folder, f"node-{os.environ.get('SLURMD_NODENAME') or socket.gethostname()}").write_text(
                    f"{code}\n"
                )


def _message(error: BaseException) -> str:
    """The message, with the innermost cause where a library wrapped it."""
    text = str(error).strip()
    if missing := re.search(r"[Mm]issing mandatory value: (\S+)", text):
        return f"{missing[1]} must be given: {missing[1]}=…"
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text += f"\n  because: {str(cause).strip()}"
    return text


def _say(text: str) -> None:
    print(redaction.redacted(text), file=sys.stderr, flush=True)


def _say_all(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python prints of an error that nobody caught, without keys: a batch job keeps it in a file."""
    _say("".join(traceback.format_exception(kind, error, trace)).rstrip())
