"""The registry of peers: a new one costs a module and a name in ``MODULES``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import peers, record
from bench.kernels import measure
from bench.kernels.entry import Effort, Row
from bench.kernels.timing import Cpu
from bench.peers import base, torch_linear
from bench.problems.cases import EmaCase, LossCase
from bench.report import targets
from bench.table import is_ours

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


# Packages that CI does not have, by stand-ins with their functions' names and arguments.

UNSLOTH = """
import torch
import torch.nn.functional as F
from unsloth_zoo.sizes import none


def fused_linear_cross_entropy(hidden, weight, bias, targets, *, divisor, ignore_index=-100):
    z = hidden @ weight.T
    return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="sum") / divisor


def fused_linear_jsd(hidden, weight, t_hidden, t_weight, *, labels=None, beta=0.5, temperature=1.0):
    q, p = (
        F.log_softmax(h @ w.T / temperature, -1)
        for h, w in ((hidden, weight), (t_hidden.detach(), t_weight.detach()))
    )
    if beta in (0, 1):
        a, b = (p, q) if beta == 0 else (q, p)
        rows = (a.exp() * (a - b)).sum(-1)
    else:
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        rows = (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)
    keep = labels != -100
    return rows[keep].sum() / keep.sum()
"""
SPECULATORS = """
from speculators.utils.util import log_softmax


def _kl(p, q):
    return (p.exp() * (p - q)).sum(-1)  # [1, T]


def fused_kl_div_loss(logits, targets):
    return _kl(log_softmax(targets), log_softmax(logits))


def fused_reverse_kl_div_loss(logits, targets):
    return _kl(log_softmax(logits), log_softmax(targets))


def fused_js_div_loss(logits, targets):
    q, p = log_softmax(logits), log_softmax(targets)
    m = ((p.exp() + q.exp()) / 2).log()
    return (_kl(p, m) + _kl(q, m)) / 2
"""
QUACK = """
import torch.nn.functional as F


def scaled_exp_lce_supported(x, weight, chunk_size, reduction):
    return chunk_size == 4096 and reduction == "mean"


def chunked_linear_cross_entropy(x, weight, target, chunk_size=4096, *, use_scaled_exp):
    return F.cross_entropy(x @ weight.T, target)
"""
FILES = {
    "unsloth": {"fused_losses/fused_linear.py": UNSLOTH, "sizes.py": "none = 0"},
    "speculators": {
        "losses/fused.py": SPECULATORS,
        "utils/util.py": "def log_softmax(x):\n    return x.log_softmax(-1)\n",
    },
    "quack": {"linear_cross_entropy.py": QUACK},
}
ROOTS = {"unsloth": "unsloth_zoo"}
FAILS = "raise RuntimeError('needs a GPU')\n"
SIZES: dict[str, Any] = {"N": 8, "V": 96, "dtype": "float32", "ignored": 0.25}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins of the packages above, first on the path; every folder's ``__init__`` fails."""
    for name, files in FILES.items():
        for path, text in files.items():
            file = tmp_path / ROOTS.get(name, name) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            for folder in (file.parent, tmp_path / ROOTS.get(name, name)):
                (folder / "__init__.py").write_text("" if name == "quack" else FAILS)
    before = set(sys.modules)
    for module in [m for m in before if m.partition(".")[0] in ("quack", *ROOTS.values())]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    base.require_file.cache_clear()
    yield tmp_path
    base.require_file.cache_clear()
    for module in set(sys.modules) - before:
        if module.partition(".")[0] == "quack":
            del sys.modules[module]


def row_of(case: LossCase, peer: str) -> Row:
    effort = Effort(1, 1, time.monotonic() + 60, peers=(peer,), interpreted=True)
    rows, _ = measure.measure(case, Cpu(), effort, 1e9)
    return next(row for row in rows if row["peer"] == peer)


@pytest.mark.usefixtures("one_thread", "installed")
@pytest.mark.parametrize(
    ("peer", "names"),
    [
        ("unsloth", ("linear_ce", "linear_kd/reverse_kl", "linear_kd/jsd", "linear_kd/joint")),
        ("speculators", ("kd/forward_kl", "kd/reverse_kl", "kd/jsd")),
        ("quack", ("linear_ce",)),
        ("quack scaled exp", ("linear_ce",)),
    ],
)
def test_what_is_called_with_these_arguments_is_the_loss(peer: str, names: Sequence[str]) -> None:
    for name in names:
        widths = {"D_s": 8, "D_t": 16} if name.startswith("linear") else {}
        sizes: dict[str, Any] = SIZES | widths
        row = row_of(LossCase(name=name, **sizes), peer)
        assert (row["status"], row["reason"]) == ("ok", None), name
        assert row["err"]["loss_relative"] < 1e-4, name  # the limit of `wrong` is 5 %


@pytest.mark.usefixtures("one_thread", "installed")
@pytest.mark.parametrize(
    ("peer", "name", "sizes", "reason"),
    [
        ("quack", "linear_kd/joint", {}, "has no divergence"),
        ("quack", "linear_ce", {"V": 97}, "takes multiples of 8 rows, columns and widths only"),
        ("speculators", "kd/joint", {"D_s": 0}, "has no cross-entropy with labels"),
        ("torch probabilities 2048", "linear_kd/jsd", {}, "has the forward KL only"),
        ("ours compact", "linear_kd/jsd", {}, "keeps the logits of mixtures in 32 bits"),
        ("ours compact", "linear_ce", {}, "keeps the logits of 32-bit hidden states in 32 bits"),
    ],
)
def test_what_a_peer_cannot_do_is_a_reason(
    peer: str, name: str, sizes: dict[str, int], reason: str
) -> None:
    given: dict[str, Any] = SIZES | {"D_s": 8, "D_t": 16} | sizes
    row = row_of(LossCase(name=name, **given), peer)
    assert (row["status"], row["reason"]) == ("skipped", reason)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")  # torch 2.13 makes whole logits
@pytest.mark.parametrize("name", ["linear_kd/forward_kl", "linear_kd/joint"])
def test_probabilities_as_targets_are_the_kl(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this version of torch has no F.linear_cross_entropy")
    monkeypatch.setattr(torch_linear, "_chunks_probabilities", lambda: True)
    row = row_of(LossCase(name=name, D_s=8, D_t=16, **SIZES), "torch probabilities 2048")
    assert (row["status"], row["reason"]) == ("ok", None)
    assert row["err"]["loss_relative"] < 1e-4 and row["err"]["dweight"] < 1e-4


def test_a_file_is_imported_without_its_package(installed: Path) -> None:
    with pytest.raises(RuntimeError, match="needs a GPU"):
        import_module("speculators")
    kept = sys.modules["speculators"] = ModuleType("speculators")
    try:
        fused = base.require_file("speculators.losses.fused", "speculators")
        assert fused is base.require_file("speculators.losses.fused", "speculators")
        assert Path(fused.__file__).is_relative_to(installed)
        assert [m for m in sys.modules if m.startswith("speculators")] == ["speculators"]
        assert sys.modules["speculators"] is kept
    finally:
        del sys.modules["speculators"]
    assert not any(isinstance(finder, base._WithoutInit) for finder in sys.meta_path)
    with pytest.raises(base.Unsupported, match=r"^none-such is not installed$"):
        base.require_file("none_such.losses", "none-such")
    with pytest.raises(base.Unsupported, match=r"does not import here: No module named"):
        base.require_file("speculators.losses.none", "speculators")


def test_settings_of_ours_are_ours() -> None:
    assert list(map(is_ours, ("ours", "ours compact", "yours", "oursel"))) == [1, 1, 0, 0]
    times = {"ours compact": 1.0, "slow": 3.0, "fast": 2.0}
    rows = {peer: {"ms": {"full": [ms, ms, ms]}} for peer, ms in times.items()}
    assert targets._fastest(rows) == "fast"
