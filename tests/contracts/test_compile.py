"""Every kernel compiles for real GPUs, well, and no worse than before: shown without a GPU.

``tests/support/launches.py`` records what the launchers launch and compiles it for seven targets,
in a process of its own, because interpreted kernels cannot be compiled. Held here are, for each
launch and target:

* nothing is spilled, registers and shared memory grow by at most a tenth over ``budgets.json``
* streams of logits, gradients and weights move 16 bytes per access and thread wherever rows begin
  at multiples of 16 bytes, also where the last valid column is odd
* no more shared memory than a program may have there, or the launch would fail
* no fp64 arithmetic, even when every float is passed as fp64, as some compilers in front of Triton
  pass Python's; the row index is multiplied in 64 bits, even when all strides fit into 32

A launch may spill only if its budget says how much (``spills``) and why (``reason``). Numbers
belong to one version of Triton, that of constraints.txt; other versions report theirs and are held
to the last point only. After a change of kernels or tiles, write the new budgets and look at what
changed:

    python tests/contracts/test_compile.py [FAMILY ...]

The default run compiles the common launches for one target, and for one of the other vendor where
that is cheap; ``-m slow`` compiles everything. What was compiled is kept in ``.pytest_cache`` until
a source, an argument or a version changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGETS = HERE / "budgets.json"

FAMILIES = (
    "cross_entropy",
    "kl_div",
    "distill_loss",
    "top_k",
    "linear",
    "shards",
    "compact",
    "outcomes",
    "ema",
    "scale",
    "reduce",
)

SHARED_KIB = {
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
}
"""Target -> shared memory of a program at most."""

CARDS = ("sm_86", "sm_89")
"""Cards of 24 GB with the instructions of sm_80: the short list is compiled for them."""

TARGETS = tuple(name for name in SHARED_KIB if name not in CARDS)
SHORT = ("sm_90", "gfx942")  # one of each vendor
BY_DEFAULT = {
    "cross_entropy": SHORT[:1],
    "distill_loss": SHORT[:1],
    "top_k": SHORT[:1],
    "compact": SHORT[:1],
    "outcomes": SHORT[:1],
    "ema": SHORT,
    "scale": SHORT,
    "reduce": SHORT,
}
"""What the default run compiles for: every kernel, but for those that put the sums of shards
together. ``kl_div`` and ``linear`` launch the kernels of ``distill_loss``, with other settings."""

CACHE = ROOT / ".pytest_cache" / "compiled"
KEPT = 100  # results
SOURCES = ("kernels/sad_kernels", "tests/support")

STREAMS = (
    "s_ptr",
    "t_ptr",
    "g_ptr",
    "*table_ptr 1",
    "*table_ptr 2",
    "x_ptr",
    "y_ptr",
    "out_ptr",
    "codes_ptr",
    "s_codes_ptr",
    "s_bias",
    "t_bias",
    "soft_ptr",
    "class_weight_ptr",
)
SINGLE_READS = ("merge_kernel", "fold_kernel", "fold_groups_kernel")
"""Kernels that read the logits of labels and ids, one by one."""

GROWTH = 1.1

Report = dict[str, Any]  # of one launch on one target
Reports = dict[str, dict[str, Report]]  # launch -> target -> report


def installed() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


pytestmark = pytest.mark.skipif(installed() is None, reason="triton is not installed")


@cache
def gating_version() -> str:
    """The version of Triton that the budgets belong to."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.removeprefix("triton==") for line in lines if line.startswith("triton=="))


def fingerprint(root: Path, arguments: Sequence[str]) -> str:
    """A name for everything that decides what ``launches.py`` prints."""
    packages = [f"{name} {version(name)}" for name in ("triton", "torch")]
    found = hashlib.sha256(json.dumps([*arguments, sys.version, *packages]).encode())
    for file in sorted(path for folder in SOURCES for path in (root / folder).rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        found.update(f"{file.relative_to(root)} {content}\n".encode())
    return found.hexdigest()


def launches(*arguments: str) -> Any:
    """What ``tests/support/launches.py`` prints, or printed before for the same sources."""
    stored = CACHE / f"{fingerprint(ROOT, arguments)}.json"
    if not stored.exists():
        printed = print_launches(*arguments)
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = stored.with_suffix(f".{os.getpid()}")
        unfinished.write_text(printed)
        unfinished.replace(stored)
        for old in sorted(CACHE.glob("*.json"), key=os.path.getmtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    return json.loads(stored.read_text())


def print_launches(*arguments: str) -> str:
    """Run ``launches.py`` in an environment without settings of Triton."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    jobs = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
    with tempfile.TemporaryDirectory() as cache_dir:
        environment |= {"TRITON_CACHE_DIR": cache_dir, "TRITON_DEFAULT_FP_FUSION": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / x) for x in ("kernels", "tests"))
        script = ROOT / "tests" / "support" / "launches.py"
        done = subprocess.run(
            [sys.executable, script, "--jobs", jobs, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(family: str, targets: tuple[str, ...], *options: str) -> Reports:
    return launches(family, "--targets", ",".join(targets), *options)


def budgets() -> dict[str, dict[str, Report]]:
    return json.loads(BUDGETS.read_text())


# --- What is wrong --------------------------------------------------------------------------------


def faults(report: Report, target: str) -> list[str]:
    """What no version of Triton excuses."""
    if "error" in report:
        return [f"must compile, got {report['error']}; the interpreter is no compiler"]
    found = [
        f"must not compute in fp64, got {line!r}; take run-time floats through tl.full"
        for line in report["fp64"]
    ]
    limit = SHARED_KIB[target] << 10
    if report["shared_bytes"] > limit:
        found.append(
            f"must take at most {limit} bytes of shared memory, got {report['shared_bytes']}; "
            "give the architecture smaller tiles in tile_sizes.py"
        )
    found += [
        f"must multiply the row index in 64 bits, got {line!r}; cast it with .to(tl.int64) first"
        for line in report["narrow_row_products"]
    ]
    if not report["wide_row_products"]:
        found.append("must multiply its row index, got no product; teach row_products to find it")
    return found


def excesses(name: str, report: Report, budget: Report | None) -> list[str]:
    """What costs speed, with the Triton that the budgets belong to."""
    if budget is None:
        return ["must have a budget, got none; see the top of test_compile.py"]
    found = []
    allowed = budget.get("spills", 0) if budget.get("reason") else 0
    if report["spills"] > allowed:
        found.append(
            f"must spill at most {allowed}, got {report['spills']}; take smaller tiles or more "
            "warps, or give a reason in budgets.json"
        )
    for what in ("registers", "shared_bytes"):
        if report[what] > GROWTH * budget[what]:
            found.append(
                f"{what} must be at most a tenth over {budget[what]}, got {report[what]}; "
                "find out why, or write new budgets"
            )
    for kind, widths in streams(report).items():
        for pointer, width in widths.items():
            narrow = "unaligned" in name or any(kernel in name for kernel in SINGLE_READS)
            least = budget.get(kind, {}).get(pointer, 16) if narrow else 16
            if width < least:
                found.append(
                    f"{kind} of {pointer} must be {least}, got {width}; keep masks out of the "
                    "loop over whole tiles, and offsets divisible"
                )
    return found


def streams(report: Report) -> dict[str, dict[str, int]]:
    return {
        kind: {name: width for name, width in report[kind].items() if name in STREAMS}
        for kind in ("load_bytes", "store_bytes")
    }


def check(reports: Reports) -> None:
    """Fail with everything that is wrong; with another Triton, report what may be."""
    assert reports, "launches must be recorded, got none; look at tests/support/launches.py"
    wrong, slow = [], []
    for name, by_target in reports.items():
        budget = budgets().get(name, {})
        for target, report in by_target.items():
            serious = faults(report, target)
            wrong += [f"{name} on {target} {fault}" for fault in serious]
            if "error" not in report:
                found = excesses(name, report, budget.get(target))
                slow += [f"{name} on {target} {excess}" for excess in found]
    if installed() == gating_version():
        wrong += slow
    assert not wrong, "\n".join(wrong)
    if slow:
        pytest.skip(
            f"triton {installed()} is not {gating_version()}, only reported: {'; '.join(slow)}"
        )


# --- Tests ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BY_DEFAULT)
def test_kernels_compile_within_their_budgets(family: str) -> None:
    """Scalars in fp64 under torch.compile: https://github.com/linkedin/Liger-Kernel/pull/1350"""
    check(compiled(family, BY_DEFAULT[family]))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compile_within_their_budgets_for_every_case_and_target(family: str) -> None:
    check(compiled(family, TARGETS, "--all"))
    check(compiled(family, CARDS))


def test_what_was_compiled_is_used_for_the_same_sources_only(tmp_path: Path) -> None:
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    before = fingerprint(tmp_path, ["ema"])
    assert before == fingerprint(ROOT, ["ema"]) != fingerprint(ROOT, ["ema", "--all"])
    kernel = tmp_path / "kernels" / "sad_kernels" / "_triton" / "ema.py"
    kernel.write_text(kernel.read_text() + "\n")
    changed = fingerprint(tmp_path, ["ema"])
    kernel.with_name("new.py").touch()
    assert len({before, changed, fingerprint(tmp_path, ["ema"])}) == 3


@pytest.mark.slow
def test_every_launch_has_a_budget_and_every_budget_a_launch() -> None:
    """Recording alone takes half a minute, so this covers all cases on all targets."""
    names = launches("--all", "--list")
    assert {name.split(":")[0] for name in names} == set(FAMILIES)
    committed = {name: sorted(by_target) for name, by_target in budgets().items()}
    short = launches("--list")
    on_cards = {name: CARDS if name in short else () for name in names}
    assert committed == {name: sorted([*TARGETS, *on_cards[name]]) for name in names}


def test_a_budget_that_spills_says_why() -> None:
    for name, by_target in budgets().items():
        for target, budget in by_target.items():
            assert ("spills" in budget) == bool(budget.get("reason")), (name, target)


@pytest.fixture(scope="module")
def planted() -> Reports:
    return compiled("planted", SHORT)


SEEN = {
    "sound": None,
    "masked_throughout": "load_bytes of x_ptr must be 16, got 2",
    "narrow_rows": "must multiply the row index in 64 bits, got '%",
    "double_scalars": "must not compute in fp64, got '%",
    "does_not_compile": "must compile, got",
}


@pytest.mark.parametrize("target", SHORT)
@pytest.mark.parametrize("kernel", SEEN)
def test_a_planted_fault_is_seen(planted: Reports, kernel: str, target: str) -> None:
    said = messages(planted, kernel, target)
    expected = SEEN[kernel]
    if expected is None:
        assert said == []
    else:
        assert any(expected in message for message in said), said


@pytest.mark.parametrize(
    "kernel",
    ["statistics_kernel", "merge_kernel", "mixture_kernel", "gradient_kernel", "merge_kernel 3"],
)
def test_a_divergence_without_a_branch_does_not_compile(planted: Reports, kernel: str) -> None:
    """It would be taken for another; the third merge is that of a top-k teacher."""
    said = planted[f"planted: unknown divergence: {kernel}"]["sm_90"].get("error", "")
    assert "divergence must have a branch in every kernel that asks for it" in said


def test_a_planted_spill_is_seen(planted: Reports) -> None:
    """On sm_90 only: gfx942 has registers for 512 numbers per thread."""
    assert any("must spill at most 0" in m for m in messages(planted, "too_large", "sm_90"))


def test_more_shared_memory_than_a_card_has_is_seen(planted: Reports) -> None:
    report = planted["planted: sound: sound"]["sm_90"] | {"shared_bytes": 100 << 10}
    assert faults(report, "sm_90") == []
    assert "must take at most 101376 bytes" in faults(report, "sm_89")[0]


@pytest.mark.parametrize("what", ["registers", "shared_bytes"])
def test_growth_over_a_tenth_is_seen(planted: Reports, what: str) -> None:
    report = planted["planted: too_large: too_large"]["gfx942"]
    budget = report | {"reason": "what it spills, if anything, is not asked here"}
    small = budget | {what: report[what] / 1.12}
    large = budget | {what: report[what] / 1.08}
    assert any(what in message for message in excesses("", report, small))
    assert excesses("", report, large) == []


def messages(planted: Reports, kernel: str, target: str) -> list[str]:
    report = planted[f"planted: {kernel}: {kernel}"][target]
    return faults(report, target) or excesses(kernel, report, report)


# --- New budgets ----------------------------------------------------------------------------------


def budget_of(report: Report, before: Report) -> Report:
    """Widths only where they are not 16, spills only where there are any."""
    assert "error" not in report, report["error"]
    narrow = {
        kind: {pointer: width for pointer, width in widths.items() if width < 16}
        for kind, widths in streams(report).items()
    }
    spills = {"spills": report["spills"], "reason": before.get("reason", "")}
    return {
        "registers": report["registers"],
        "shared_bytes": report["shared_bytes"],
        **{kind: widths for kind, widths in narrow.items() if widths},
        **(spills if report["spills"] else {}),
    }


def write_budgets(families: Sequence[str]) -> None:
    """One line per launch, so that a change shows as such. Other families keep theirs."""
    before = budgets() if BUDGETS.exists() else {}
    after = {name: by for name, by in before.items() if name.split(":")[0] not in families}
    for family in families:
        for found in (compiled(family, TARGETS, "--all"), compiled(family, CARDS)):
            for name, by_target in found.items():
                old, new = before.get(name, {}), after.setdefault(name, {})
                new |= {t: budget_of(report, old.get(t, {})) for t, report in by_target.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(after[name])}" for name in sorted(after)]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    assert installed() == gating_version(), (
        f"install triton {gating_version()} first, got {installed()}"
    )
    write_budgets(sys.argv[1:] or FAMILIES)
