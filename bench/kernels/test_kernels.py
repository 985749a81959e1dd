"""The quick set under pytest-benchmark: ``pytest bench --benchmark-only``.

A call is forward, backward and a device synchronisation. Rooflines and errors are only in the
results of ``python -m bench``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from bench.kernels.check import step_of
from bench.kernels.run import device_for
from bench.peers import Peer, Unsupported, for_case
from bench.problems import cases
from bench.problems.cases import LossCase
from bench.problems.inputs import Parameters, Problem, draw

pytest.importorskip("pytest_benchmark", reason="needs the plugin pytest-benchmark")

SET = cases.quick() if torch.cuda.is_available() else cases.quick_cpu()
CALLS = [(case, peer) for case in SET if isinstance(case, LossCase) for peer in for_case(case)]


@lru_cache(maxsize=1)
def problem_of(case: LossCase, device: torch.device) -> Problem:
    return draw(case, device)


def name_of(value: Any) -> str:
    if isinstance(value, LossCase):
        return "-".join([value.name, *(f"{k}{v}" for k, v in value.shape.items()), value.dtype])
    return value.name.replace(" ", "_")


@pytest.mark.parametrize(("case", "peer"), CALLS, ids=name_of)
def test_full(benchmark: Any, case: LossCase, peer: Peer) -> None:
    device = device_for(None)
    if device.device.type not in peer.devices or peer.compiles or peer.extra:
        pytest.skip("not in the quick set here")
    problem = problem_of(case, device.device)
    assert not isinstance(problem, Parameters)
    try:
        step = step_of(peer, problem)
    except Unsupported as error:
        pytest.skip(f"{peer.name}: {error}")
    benchmark.group = name_of(case)

    def call() -> None:
        step()
        device.finish()

    benchmark.pedantic(call, setup=step.prepare, rounds=5, warmup_rounds=1)
    step.prepare()
