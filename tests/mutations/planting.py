"""One fault planted in a copy of the code, and the tests that must turn red there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("kernels/sad_kernels", "sad", "tests", "pyproject.toml", "constraints.txt")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "quickstart")  # a stored model no test here needs

Failures = Mapping[str, str | None]
"""Name of each test that ran -> the exception that ended it and its message, None if it passed."""


@dataclass(frozen=True)
class Edit:
    """``before``, which must occur exactly once in the file, becomes ``after``."""

    file: str  # relative to the repository
    before: str
    after: str


@dataclass(frozen=True)
class Mutation:
    """A fault of the bank, and every test that must notice it.

    ``error`` is the exception that the tests end in, ``says`` is part of its message. A fault must
    be *judged* wrong: a name that does not exist would turn any test red.
    """

    row: str
    fault: str
    edits: tuple[Edit, ...]
    red: tuple[str, ...]  # node ids
    error: str = "AssertionError"
    says: str = ""

    @property
    def places(self) -> frozenset[str]:
        """Which implementations this shows to be guarded."""
        file = self.edits[0].file
        if file.startswith("sad/"):
            return frozenset({"trainer"})
        if file.startswith("tests/") or file.endswith("reference.py"):
            return frozenset({"oracle"})
        if "/_triton/" in file:
            return frozenset({"triton"})
        named = re.findall(r"[\[-](torch|triton)(?=[\]-])", " ".join(self.red))
        return frozenset(named or ["torch"])

    @property
    def needs_triton(self) -> bool:
        return any("triton" in name for name in (*self.red, *(edit.file for edit in self.edits)))


def edit(file: str, before: str, after: str) -> tuple[Edit, ...]:
    """One edit; more of them are added up."""
    return (Edit(file, before, after),)


def tests(file: str, *names: str) -> tuple[str, ...]:
    """Node ids of tests in one file under ``tests``."""
    return tuple(f"tests/{file}::{name}" for name in names)


# --- Planting ------------------------------------------------------------------------------------


def complaints(mutation: Mutation, root: Path = ROOT) -> list[str]:
    """Why this fault cannot be planted: the code has moved on, and the table must follow."""
    found, sources = [], {}
    for each in mutation.edits:
        source = sources.get(each.file) or (root / each.file).read_text()
        times = source.count(each.before)
        if times != 1:
            found.append(f"must find once in {each.file}, found {times} times: {each.before!r}")
        sources[each.file] = source.replace(each.before, each.after)
    for file, source in sources.items():
        try:
            ast.parse(source)
        except SyntaxError as error:
            found.append(f"leaves {file} no Python: {error}")
    return found


def copy_with(mutation: Mutation | None, folder: Path) -> None:
    """Copy what tests need to ``folder`` and plant the fault there."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
        else:
            shutil.copy2(ROOT / name, folder / name)
    if mutation is None:
        return
    assert not complaints(mutation, folder)
    for each in mutation.edits:
        file = folder / each.file
        file.write_text(file.read_text().replace(each.before, each.after))


# --- Running -------------------------------------------------------------------------------------


def outcome_of(node_ids: Iterable[str], mutation: Mutation | None) -> tuple[int, Failures, str]:
    """Run tests in a copy with the fault: pytest's exit status, what failed, and what it said."""
    with tempfile.TemporaryDirectory(prefix="sad-mutation-") as name:
        folder = Path(name)
        copy_with(mutation, folder)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["--junit-xml=result.xml", f"--basetemp={folder / 'temporary'}", *node_ids]
        done = subprocess.run(
            command, cwd=folder, env=_environment(folder), capture_output=True, text=True
        )
        result = folder / "result.xml"
        failures = _failures(result.read_text()) if result.exists() else {}
        return done.returncode, failures, done.stdout[-4000:] + done.stderr[-2000:]


def collected(files: Iterable[str]) -> set[str]:
    """Node ids of the default run's tests in these files, by pytest's own account."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files], cwd=ROOT, env=_environment(ROOT), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return set(done.stdout.splitlines())


def _environment(folder: Path) -> dict[str, str]:
    """The copy is what is imported, also by processes that tests start; kernels are interpreted."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(str(folder / name) for name in ("", "kernels", "tests"))
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return own | fixed | {"PYTHONPATH": path}


def _failures(xml: str) -> Failures:
    found: dict[str, str | None] = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = wrong[0].get("message", "") if wrong else None
        name = f"{case.get('classname')}.{case.get('name')}"
        found[name] = None if message is None else _exception(wrong[0].tag, message)
    return found


def _exception(tag: str, message: str) -> str:
    """``Name: message``, which pytest shortens for its own exceptions and plain assertions."""
    if tag != "failure":
        return f"{tag}: {message}"
    if message.startswith(("assert ", "Failed: ")):  # the latter of pytest.raises and pytest.fail
        return f"AssertionError: {message}"
    return message


def unnoticed(mutation: Mutation, failures: Failures) -> list[str]:
    """The tests that should have seen the fault and did not, or stumbled instead of judging."""
    found = []
    for node_id in mutation.red:
        failure = failures.get(_junit_name(node_id), "did not run") or "passed"
        name = failure.partition(":")[0].rpartition(".")[2]
        if name != mutation.error or mutation.says not in failure:
            found.append(f"{node_id}: {failure[:200]}")
    return found


def _junit_name(node_id: str) -> str:
    path, _, name = node_id.partition(".py::")
    name, bracket, parameters = name.partition("[")
    return f"{path.replace('/', '.')}.{name.replace('::', '.')}{bracket}{parameters}"
