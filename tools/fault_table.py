"""Prints the table of faults, in Markdown, from the log of the fault tests; `tools/faults.sh` calls it.

    python tools/fault_table.py FAULTS.jsonl RESULTS.xml...

FAULTS.jsonl is the file named by DREAMDANCE_FAULT_LOG; each RESULTS.xml is pytest's `--junitxml` of one part.
The exit code is 1 if a test failed, or if the log is empty.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

LONGEST_CELL = 160
NOT_MEASURED = "-"
# Temporary folders of tests, which the table leaves out of paths.
TEMPORARY = re.compile(r"/\S*?/(?:test_\w+|pytest-\d+)/")


@dataclass
class Row:
    """All log lines of one fault."""

    fault: str
    how: list[str] = field(default_factory=list)
    promised: list[str] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)
    detected_seconds: list[float] = field(default_factory=list)
    resumed_seconds: list[float] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    times: int = 0

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line of the log: texts that are new, and all numbers that are not null."""
        self.times += 1
        for name in ("how", "promised", "happened"):
            text = TEMPORARY.sub(".../", " ".join(str(line[name]).split()))
            if text not in getattr(self, name):
                getattr(self, name).append(text)
        for name in ("detected_seconds", "resumed_seconds", "steps_lost"):
            if line[name] is not None:
                getattr(self, name).append(line[name])

    def cells(self) -> list[str]:
        """The cells of the row; each number is the worst one."""
        fault = f"{self.fault} (x{self.times})" if self.times > 1 else self.fault
        texts = [_cell(texts) for texts in (self.how, self.promised, self.happened)]
        return [_shortened(fault), *texts, _worst(self.detected_seconds, ".1f"), _worst(self.resumed_seconds, ".1f"),
                _worst(self.steps_lost, "d")]  # fmt: skip


@dataclass(frozen=True)
class TestResults:
    """The results of all tests.

    Attributes:
        passed: number of tests that passed.
        seconds: duration of all tests together.
        failed: names of the tests that did not pass.
        skipped: reasons for skipped tests, each once.
    """

    passed: int
    seconds: float
    failed: list[str]
    skipped: list[str]


def read_rows(log: Path) -> list[Row]:
    """One row for each fault, in the order of the log."""
    rows: dict[str, Row] = {}
    own_folder = f"{log.resolve().parent}/"  # may also contain the tests' folders
    for text in log.read_text(encoding="utf-8").splitlines():
        line = json.loads(text.replace(own_folder, ".../"))
        rows.setdefault(line["fault"], Row(line["fault"])).add(line)
    return list(rows.values())


def read_results(files: list[Path]) -> TestResults:
    """Adds up the results of pytest; a part without results counts as failed."""
    passed, seconds, failed = 0, 0.0, list[str]()
    skipped: dict[str, None] = {}
    for file in files:
        if not file.is_file():
            failed.append(f"{file.stem} (no results)")
            continue
        for case in ElementTree.parse(file).getroot().iter("testcase"):
            seconds += float(case.get("time", "0"))
            reason = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"{case.get('classname')}::{case.get('name')}")
            elif reason is not None:
                skipped[reason.get("message", "")] = None
            else:
                passed += 1
    return TestResults(passed, seconds, failed, list(skipped))


def describe_commits(results: list[Path]) -> str:
    """The commit of each part if they differ, because a part that passed is not run again; otherwise one commit."""
    commits = {}
    for file in results:
        if (note := file.with_suffix(".commit")).is_file():
            commits[file.stem] = note.read_text(encoding="utf-8").strip()
    if len(set(commits.values())) > 1:
        return "commits " + ", ".join(f"{commit} ({part})" for part, commit in commits.items())
    present = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], text=True).strip()
    return f"commit {next(iter(commits.values()), present)}"


def describe_machine(results: list[Path]) -> str:
    """Date, commit, machine, its load, and the versions of the most important packages."""
    changed = subprocess.check_output(["git", "status", "--porcelain", "--untracked-files=no"], text=True).split("\n")
    # The table that this command itself writes is not a change.
    state = " with uncommitted changes" if [line for line in changed if line and not line.endswith("faults.md")] else ""
    versions = " ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "mosaicml-streaming"))
    load = os.environ.get("DREAMDANCE_LOAD_BEFORE", "unknown")
    return (
        f"{time.strftime('%Y-%m-%d')}, {describe_commits(results)}{state}, {os.cpu_count()} cores, no GPU used, "
        f"Python {platform.python_version()}, {versions}; the machine's load before: {load}, at the end: "
        f"{' '.join(f'{load:.1f}' for load in os.getloadavg())} (means over 1, 5 and 15 minutes)"
    )


def main() -> int:
    """Prints the page; returns 1 if anything failed."""
    log, results = Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]]
    rows = read_rows(log) if log.is_file() else []
    tests = read_results(results)
    print("# Faults: injected, promised, happened\n")
    print(f"Written by `bash tools/faults.sh`: {describe_machine(results)}.\n")
    verdict = f"{len(tests.failed)} FAILED" if tests.failed else "none failed"
    injected = sum(row.times for row in rows)
    minutes = tests.seconds / 60
    print(
        f"{len(rows)} faults, injected {injected} times; "
        f"{tests.passed} tests passed, {verdict}; {minutes:.0f} minutes. "
        "A test writes its line after its assertions have passed. If a fault was injected several times (xN), the "
        "numbers are the worst ones. Seconds count from the fault: until it was reported or all ranks had ended, and "
        "until the first step after it. Lost steps are repeated, with the same result. "
        f"'{NOT_MEASURED}': this number does not apply.\n"
    )
    for name in tests.failed:
        print(f"* FAILED: {name}")
    for reason in tests.skipped:
        print(f"* left out: {reason}")
    if tests.failed or tests.skipped:
        print()
    print("| fault | injected | promised | happened | detected, s | resumed, s | steps lost |")
    print("|---|---|---|---|--:|--:|--:|")
    for row in rows:
        print(f"| {' | '.join(row.cells())} |")
    return 1 if tests.failed or not rows else 0


def _cell(texts: list[str]) -> str:
    """The first text, and the number of others."""
    more = f" (and {len(texts) - 1} other{'s' * (len(texts) > 2)})" if len(texts) > 1 else ""
    return _shortened(texts[0]) + more


def _shortened(text: str) -> str:
    text = text.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 4].rstrip()} ..."


def _worst(values: list[Any], form: str) -> str:
    return format(max(values), form) if values else NOT_MEASURED


if __name__ == "__main__":
    sys.exit(main())
