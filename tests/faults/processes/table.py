"""Prints the table of faults from what the tests wrote, and puts it in the place of that in documents.

python tests/faults/processes/table.py .faults.jsonl docs/faults.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FAULTS = {
    "F01": "SIGKILL of all ranks at each point of writing, each rank in turn, and in the middle of a file",
    "F02": "200 SIGKILLs at random times in one run",
    "F03": "SIGKILL or SIGSTOP of one rank only",
    "F04": "SIGTERM or SIGUSR1 to one rank, to all, twice, during a save",
    "F05": "stop file before step 1, in warm-up, in a validation, in the export",
    "F06": "SIGKILL in the save after a stop",
    "F07": "newest checkpoint cut, one bit flipped, a file missing, an empty manifest",
    "F08": "pointer empty, dangling, or pointing outside the run",
    "F09": "crash loop of ten starts",
    "F10": "disk full, quota, file too large, at each write",
    "F11": "file system read-only, stale, broken, or slow",
    "F12": "power cut: what was not synced is gone",
    "F13": "restart on another number of ranks",
    "F14": "restart with other micro-batches",
    "F16": "SIGKILL between micro-batches over two epochs",
    "F17": "data edited, replaced or cut under the run",
    "F18": "settings changed on a restart",
    "F19": "a second start in the same directory",
    "F20": "clock jumps, another host, restart count 3",
    "F21": "metrics cut in the middle of a line",
    "F25": "SIGKILL in prune, in cache, and while a pipeline submits its jobs",
    "F28": "bfloat16 on a GPU, restarted three times",
}
"""Those with tests in this folder. What became of the others, and where they are tested, is in docs/faults.md."""


TABLE = re.compile(r"^\| \| fault \| cases .*?^Published checkpoints lost: .*?$", re.MULTILINE | re.DOTALL)


def rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One row per fault: the cases, what happened, and the most that any of them lost."""
    by_fault: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        case = json.loads(line)
        by_fault.setdefault(case["id"], []).append(case)
    table = []
    for fault, cases in sorted(by_fault.items()):
        told = list(dict.fromkeys(case["what"] for case in cases if case["ok"]))
        failed = [case["test"] for case in cases if not case["ok"]]
        table.append(
            {
                "id": fault,
                "fault": FAULTS[fault],
                "cases": len(cases),
                "what": "; ".join(told) if not failed else f"FAILED: {', '.join(failed)}",
                "ok": not failed,
                **{
                    name: max((case.get(name, 0) for case in cases), default=0)
                    for name in ("steps_lost", "checkpoints_lost", "samples_wrong")
                },
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table, and the two numbers that must be 0."""
    lines = ["| | fault | cases | what happened | steps lost |", "|---|---|---:|---|---:|"]
    lines += [f"| {r['id']} | {r['fault']} | {r['cases']} | {r['what']} | {r['steps_lost']} |" for r in table]
    totals = {name: sum(row[name] for row in table) for name in ("checkpoints_lost", "samples_wrong")}
    lines += ["", f"Published checkpoints lost: {totals['checkpoints_lost']}. "]
    lines[-1] += f"Samples skipped or repeated: {totals['samples_wrong']}."
    return "\n".join(lines)


def put_into(document: Path, text: str) -> None:
    """Replace the table in a document, and the line of numbers behind it."""
    changed, places = TABLE.subn(lambda _: text, document.read_text(encoding="utf-8"))
    if places != 1:
        raise ValueError(f"{document} must hold one table of faults, got {places}")
    document.write_text(changed, encoding="utf-8")


if __name__ == "__main__":
    found = rows(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())
    print(markdown(found))
    for document in sys.argv[2:]:
        put_into(Path(document), markdown(found))
    sys.exit(0 if found and all(row["ok"] for row in found) else 1)
