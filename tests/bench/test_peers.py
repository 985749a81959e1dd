"""The registry of peers: a new one costs a module and a name in ``MODULES``."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path

import pytest

from bench import peers, record
from bench.kernels import measure
from bench.kernels.entry import Effort
from bench.kernels.timing import Cpu
from bench.problems.cases import EmaCase, LossCase

TOY = """
from sad_kernels import cross_entropy

from bench.peers.base import Peer, require_kind


def of_logits(problem):
    require_kind(problem, "ce", what="has no divergence")
    return lambda: cross_entropy(problem.logits, problem.labels, impl="torch")


LOGITS = (Peer("toy", "toy.cross_entropy", of_logits, "toy-losses"),)
"""

CE = LossCase(name="ce", N=6, V=97, dtype="float32")
KD = LossCase(name="kd/forward_kl", N=6, V=97, dtype="float32")
LINEAR = LossCase(name="linear_ce", N=6, V=97, D_s=8, D_t=8, dtype="float32")
EMA = EmaCase(name="ema/update", parameters=300, tensors=3)


@pytest.fixture
def with_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module ``bench.peers.toy``, named in the registry."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(peers, "__path__", [*peers.__path__, str(tmp_path)])
    monkeypatch.setattr(peers, "MODULES", (*peers.MODULES, "toy"))


@pytest.mark.usefixtures("one_thread", "with_toy")
def test_a_new_peer_is_a_module_and_a_name() -> None:
    assert [peer.name for peer in peers.for_case(CE)][-1] == "toy"
    effort = Effort(1, 1, time.monotonic() + 60, compiled=False, peers=("toy",))
    rows = {case.name: measure.measure(case, Cpu(), effort, 1e9)[0][-1] for case in (CE, KD)}
    assert (rows["ce"]["peer"], rows["ce"]["status"]) == ("toy", "ok")
    assert rows["ce"]["ms"]["full"][1] > 0 and rows["ce"]["package"] == "toy-losses"
    kd = rows["kd/forward_kl"]
    assert (kd["status"], kd["reason"]) == ("skipped", "has no divergence")
    assert record.versions()["toy-losses"] is None  # asked for, and not installed
    assert not any(peer.name == "toy" for case in (LINEAR, EMA) for peer in peers.for_case(case))


def test_names_are_unique_and_every_module_has_peers() -> None:
    """A row is identified by its case and its peer's name."""
    for case in (CE, LINEAR, EMA):
        names = [peer.name for peer in peers.for_case(case)]
        assert names[0] == "ours" and len(names) == len(set(names))
    folder = Path(peers.__file__).parent
    written = {path.stem for path in folder.glob("*.py")} - {"__init__", "base"}
    assert written == set(peers.MODULES)
    for name in peers.MODULES:
        kinds = vars(import_module(f"bench.peers.{name}")).keys() & {"LOGITS", "HIDDEN", "EMA"}
        assert kinds, f"bench.peers.{name} has none of LOGITS, HIDDEN, EMA"
