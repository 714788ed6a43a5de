"""Has imported everything that a recipe needs, and forks a fresh start of a recipe for each line that it reads.

Imports take most of a start's time. A child has a session of its own, its own environment, arguments and output, and
runs the recipe's file as ``__main__``, so that signal handlers, locks and exit codes are the true ones. It dies with
this process, and this process ends with its input.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import time
from typing import Any

import hydra._internal.hydra
import hydra.core.plugins
import spies

MODULES = (
    "accelerate",
    "accelerate.accelerator",
    "accelerate.utils.other",
    "antlr4.LL1Analyzer",
    "huggingface_hub.dataclasses",
    "hydra",
    "hydra._internal.core_plugins",
    "hydra._internal.hydra",
    "hydra._internal.logging_config",
    "hydra._internal.utils",
    "hydra.core.config_store",
    "hydra.core.hydra_config",
    "hydra.main",
    "llamita.data.loader",
    "llamita.distill.cache",
    "llamita.distill.cached",
    "llamita.distill.engines",
    "llamita.distill.loop",
    "llamita.distill.placement",
    "llamita.distill.quantised",
    "llamita.distill.student",
    "llamita.distill.zero",
    "llamita.evaluate",
    "llamita.prune.importance",
    "llamita.prune.mend",
    "llamita.prune.plan",
    "llamita.prune.surgery",
    "omegaconf",
    "omegaconf._impl",
    "peft",
    "rich.console",
    "rich.progress",
    "torch._dynamo",
    "torch.distributed.elastic",
    "torch.nn.parallel.distributed",
    "torch.optim.lr_scheduler",
    "torch.utils.flop_counter",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.modeling_llama",
)
PR_SET_PDEATHSIG = 1


def child(request: dict[str, Any]) -> None:
    """Become ``python FILE ARGUMENTS``."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, output), (2, output)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[:] = [request["file"], *request["arguments"]]
    sys.path[0] = os.path.dirname(request["file"])
    spies.install(request["spies"])
    code: Any = 0
    try:
        runpy.run_path(request["file"], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # Threads of libraries may be at work, as at the end of any Python process; exit handlers are of no interest here.
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; ``None`` while it runs."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    hydra.core.plugins.Plugins.instance()  # looks through all of Hydra's modules
    # Hydra composes everything once more to read hydra.mode, which nothing sets: a third of a start's time.
    hydra._internal.hydra.Hydra.get_mode = lambda *_, **__: None
    gc.freeze()  # else the first collection of every child copies what it shares with this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"threads": threading.active_count()}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: Any = wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                child(request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
