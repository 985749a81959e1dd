"""The benchmark of 16-bit logits at toy sizes on a CPU: parts, resumption, and what is decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sad_kernels import _tiles

from bench.__main__ import main
from bench.kernels import compact
from bench.peers import Unsupported

TINY = compact.Sizes(N=6, rows=6, D=8, V=40, calls=1, cuts=(2, 6), slabs=((2, 16), (6, 40)))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the copy of 64 MiB, and with 16-bit logits that are kept in 32 bits after all."""
    monkeypatch.setitem(compact.PARTS, "copy", lambda device, sizes: {"rate": 1e9})
    monkeypatch.setattr(compact, "COMPACT", {})
    for name in ("SLAB_ROWS", "SLAB_COLUMNS"):
        monkeypatch.setattr(_tiles, name, 1024)


@pytest.mark.slow
def test_every_part_is_measured_and_kept() -> None:
    kept: list[Any] = []
    found = compact.measure(fake=True, sizes=TINY, keep=lambda f: kept.append(json.dumps(f)))
    assert [len(json.loads(each)) for each in kept] == [4, 5, 6, 7, 8, 9]  # and case, sizes, limits
    assert json.loads(kept[-1]) == json.loads(json.dumps(found))
    assert [row["rows"] for row in found["products"]] == [2, 6]
    assert [(row["rows"], row["columns"]) for row in found["slabs"]] == [(2, 16), (6, 40)]
    pairs = [(kind, logits) for kind in ("ce", "joint") for logits in ("exact", "compact")]
    assert [(row["loss"], row["logits"]) for row in found["losses"]] == pairs
    assert [(row["loss"], row["columns"]) for row in found["widths"]] == [
        (kind, width) for kind in ("ce", "joint") for width in (16, 40)
    ]
    rows = [*found["products"], *found["slabs"], *found["losses"], *found["widths"]]
    assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert found["kernels"] == {"reason": "a CPU launches no kernels"}
    assert [vars(_tiles)[name] for name in ("SLAB_ROWS", "SLAB_COLUMNS")] == [1024, 1024]


def test_a_part_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(device: object, sizes: object) -> object:
        raise RuntimeError("no such product")

    def absent(device: object, sizes: object) -> object:
        raise Unsupported("has none")

    broken = dict.fromkeys(("products", "slabs", "losses"), failing)
    for name, part in (broken | {"widths": absent}).items():
        monkeypatch.setitem(compact.PARTS, name, part)
    found = compact.measure(fake=True, sizes=TINY)
    assert found["products"] == {"reason": "RuntimeError: no such product"}
    assert found["widths"] == {"reason": "has none"}
    assert {line["met"] for line in found["limits"]} == {None}


@pytest.mark.slow
def test_only_what_an_earlier_record_lacks_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def part(name: str) -> Any:
        def measured(device: object, sizes: object) -> Any:
            made.append(name)
            return {"rate": 1.0} if name == "copy" else []

        return measured

    for name in compact.PARTS:
        monkeypatch.setitem(compact.PARTS, name, part(name))
    earlier = json.loads(json.dumps(compact.measure(fake=True, sizes=TINY)))
    assert made == list(compact.PARTS)
    del earlier["slabs"]
    earlier["losses"] = {"reason": "RuntimeError: out of memory"}
    made.clear()
    compact.measure(fake=True, sizes=TINY, earlier=earlier)
    assert made == ["slabs", "losses"]
    made.clear()
    compact.measure(fake=True, sizes=compact.FAKE, earlier=earlier)
    assert made == list(compact.PARTS)


def test_limits_by_hand() -> None:
    def loss(kind: str, logits: str, ms: float, ratio: float) -> dict[str, Any]:
        return {"loss": kind, "logits": logits, "ms": ms, "ratio": ratio}

    kernels = [
        {"kernel": "gradient_kernel", "us": 2.0},
        {"kernel": "fold_groups_kernel", "us": 30.0},
        {"kernel": "merge_kernel", "us": 12.0},
        {"kernel": "gemm", "us": 1e6},
    ]
    found = {
        "sizes": {"N": 2048, "V": 1000},
        "copy": {"rate": 4e12},
        "slabs": [{"rows": 1024, "columns": 8192, "ratio": 1.2}],
        "losses": [
            loss("ce", "exact", 10.0, 1.11),
            loss("ce", "compact", 9.5, 1.04),
            loss("joint", "exact", 20.0, 1.19),
            loss("joint", "compact", 21.0, 1.2),
        ],
        "kernels": [
            {"loss": "ce", "logits": "compact", "kernels": kernels},
            {"loss": "ce", "logits": "exact", "kernels": [{"kernel": "gradient", "us": 1e9}]},
        ],
    }
    lines = {line["what"]: line for line in compact.limits(found)}
    slabs, *ce, _, _, joint_rate, joint_merge = lines.values()
    assert (slabs["measured"], slabs["met"]) == (1.2, False)
    assert [(line["measured"], line["met"]) for line in ce[:2]] == [(1.04, True), (0.95, True)]
    # Codes read, gradients written: 2048 x 1000 x 4 bytes in 2 us; 42 us for 2 x 1024 rows.
    assert ce[2]["measured"] == pytest.approx(2048 * 1000 * 4 / 2e-6 / 4e12) and ce[2]["met"]
    assert (ce[3]["measured"], ce[3]["met"]) == (21.0, False)
    assert [lines[f"CE + KL, T = 2, {end}"]["met"] for end in ENDS] == [False, False]
    assert joint_rate["met"] is joint_merge["met"] is None


ENDS = ("over its products", "over 32-bit logits")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match=r"^error: the case compact must find a GPU"):
        compact.measure()


@pytest.mark.slow
def test_the_command_goes_on_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compact, "FAKE", TINY)
    path = tmp_path / "r.json"
    assert main(["compact", "--fake", "--out", str(path)]) == 0
    first = json.loads(path.read_text())
    assert first["run"]["command"] == "python -m bench compact --fake" and first["schema"] == 1
    del first["losses"]
    first["slabs"] = [first["slabs"][0] | {"ms": 77.0}]
    path.write_text(json.dumps(first))
    assert main(["compact", "--fake", "--resume", "--out", str(path)]) == 0
    second = json.loads(path.read_text())
    assert second["slabs"] == first["slabs"] and len(second["losses"]) == 4
    assert second["run"]["command"] == first["run"]["command"]
    with pytest.raises(SystemExit, match="--fake must come with compact, got tiles"):
        main(["tiles", "--fake"])
