"""Make one offline page of run directories, with its pictures, and print the headline table.

python recipes/report.py runs.pruned=pruned runs.distilled=distilled runs.evaluation=evaluation out=report
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from llamita.report import gather, page
from llamita.runs import RunConfig, is_main_process, start
from llamita.storage import plain


@dataclass(kw_only=True)
class Report:
    """Everything that this recipe can be told."""

    runs: dict[str, Path] = field(default_factory=dict)
    """Directories under the names that the page shows."""
    run: RunConfig = field(default_factory=RunConfig)
    out: Path = MISSING


store("report_schema", Report)


def run(config: Report) -> None:
    """Read the directories, draw, publish the page, and print the table.

    While one of the directories is unfinished, so is the report: the same command draws it again.
    """
    report = gather.gather(config.runs)
    with start(config.out, "report", plain(config), config.run) as run:
        if not is_main_process():
            return
        if not run.done:
            files = page.write(report, config.out)
            if all(stage.done is not None or stage.recipe is None for stage in report.stages):
                parents = {stage.name: stage.sha256 for stage in report.stages if stage.sha256 is not None}
                run.finish(files, parents=parents)
        page.show(report, config.out / page.PAGE)


main = command("report", Report, run)

if __name__ == "__main__":
    exit_with(main)
