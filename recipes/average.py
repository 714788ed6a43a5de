"""Average the weights of several models of one shape, as Llama 3.1 does after each stage of alignment.

python recipes/average.py models.a.path=… models.b.path=… out=…
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import logging
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from llamita import checkpoints, runs, storage
from llamita.align import averaging

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Average:
    """Everything that this recipe can be told."""

    models: dict[str, averaging.MemberConfig] = field(default_factory=dict)
    """By name."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING


store("average_schema", Average)


def run(config: Average) -> None:
    """Check, average and publish."""
    if not (config.out / "DONE.json").is_file():
        averaging.check(config.models)
    with runs.start(config.out, "average", storage.plain(config), config.run) as this:
        if this.done or not runs.is_main_process():
            return
        paths = {name: member.path for name, member in config.models.items() if member.path is not None}
        parents = {name: checkpoints.content_hash(path) for name, path in paths.items()}
        provenance = {
            "recipe": "average",
            "parents": {name: {"path": str(path), "sha256": parents[name]} for name, path in paths.items()},
            "settings": this.settings,
        }
        files = averaging.publish(config.models, this.path, provenance)
        log.info("%s: the mean of %s", config.out, ", ".join(paths))
        this.log({"average/models": len(paths)})
        this.finish(files, parents=parents, summary={"average/models": len(paths)})


main = command("average", Average, run)

if __name__ == "__main__":
    exit_with(main)
