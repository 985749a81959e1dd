"""The faults, one function each, with links to reports.

Problems are as small as still shows the fault. A limit on the error lies between rounding in the
result's dtype and the fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from sad_kernels import reference
from torch import Tensor

from bench.faults import calls
from bench.faults.core import (
    INTERPRETED,
    RELATIVE,
    Fault,
    Values,
    at_most,
    close,
    cosine,
    norm,
    relative_error,
)
from bench.faults.problem import Draw, Heads, Loss, Problem, Rows, gradients, heads, narrow, values

BF16, FP16 = torch.bfloat16, torch.float16
DIVERGENCES = {0.0: "forward KL", 1.0: "reverse KL", 0.5: "JSD"}
IGNORED = -100


class Effort(NamedTuple):
    """Sizes of the most expensive faults; the interpreter's time grows with rows."""

    rows: int = 64 if INTERPRETED else 256
    seeds: int = 8
    vocab: int = 32000


def logits_overwritten(_: Effort) -> Iterator[Fault]:
    """https://github.com/linkedin/Liger-Kernel/issues/343

    https://github.com/linkedin/Liger-Kernel/pull/1251
    https://github.com/modelscope/ms-swift/pull/10130
    """

    def entropy(loss: Loss, problems: Sequence[Rows]) -> Values:
        p = problems[0].fresh()
        loss(p)
        log_q = p.logits.detach().double().log_softmax(-1)
        return [float(-(log_q.exp() * log_q).sum(-1).mean())]

    draw = Draw(0)
    yield Fault(
        "logits_overwritten",
        "The loss overwrites its caller's logits",
        "fp32 logits randn(8, 500)",
        "nats, entropy of the logits after the call",
        [Rows(draw.labels(8, 500), draw.normal(8, 500))],
        entropy,
        close(1e-4),
        calls.ce,
        [calls.liger_ce, calls.fla_ce, calls.trl_rows],
    )


def replay(_: Effort) -> Iterator[Fault]:
    """Gradients that were computed in forward are scaled in place by each backward.

    https://github.com/linkedin/Liger-Kernel/issues/343
    """
    draw = Draw(0)
    rows = Rows(draw.labels(8, 500), draw.normal(8, 500))
    both = heads(16, 256, 16)
    torch_linear = calls.torch_linear_ce({})
    for problem, ours, peers in (
        (rows, calls.ce, [calls.liger_ce, calls.fla_ce]),
        (
            both,
            calls.linear_ce,
            [calls.liger_linear_ce(), calls.fla_linear_ce, calls.trl_linear_ce, torch_linear],
        ),
        (
            both,
            calls.linear_kl,
            [calls.liger_linear_kl, calls.fla_linear_kl, calls.trl_linear_kl, calls.liger_chunked],
        ),
        (replace(both, beta=0.5), calls.linear_kl, [calls.liger_linear_jsd]),
    ):
        true = gradients(partial(ours, library=reference), problem.double(), 3.0)[1][0]

        def share(loss: Loss, problems: Sequence[Problem], true: Tensor = true) -> Values:
            p = problems[0].fresh()
            result = loss(p)
            upstream = torch.full_like(result, 3.0)
            torch.autograd.grad(result, p.leaf_tensors(), upstream, retain_graph=True)
            again = torch.autograd.grad(result, p.leaf_tensors(), upstream)[0]
            return [float((again.double() * true).sum() / true.square().sum())]

        yield Fault(
            "replay",
            "A second backward with retain_graph scales the gradient once more",
            "fp32, upstream 3, "
            + ("logits randn(8, 500)" if problem is rows else "16 rows, D=16, V=256"),
            "gradient of the second backward over the true one",
            [problem],
            share,
            close(1e-3),
            ours,
            peers,
        )


def weight_gradient_in_16_bits(effort: Effort) -> Iterator[Fault]:
    """https://github.com/linkedin/Liger-Kernel/issues/512

    https://github.com/linkedin/Liger-Kernel/pull/1391
    https://github.com/apple/ml-cross-entropy/issues/14
    """
    N, V, D = max(64, 4 * effort.rows), 2048, 32
    problem = narrow(heads(N, V, D), BF16)
    exact = partial(calls.linear_ce, library=reference)
    true = gradients(exact, problem.double())[1][1]

    def errors(loss: Loss, problems: Sequence[Heads]) -> Values:
        return [relative_error(gradients(loss, p)[1][1], true) for p in problems]

    yield Fault(
        "weight_gradient_in_16_bits",
        "dweight is summed in 16 bits, and the more chunks the worse",
        f"bf16, {N} rows, D={D}, V={V}, 1/4/16/64 chunks",
        f"{RELATIVE} dweight",
        [replace(problem, chunks=chunks) for chunks in (1, 4, 16, 64)],
        errors,
        at_most(2.0**-8),  # what rounding once may cost
        calls.linear_ce,
        [
            calls.liger_linear_ce(),
            calls.liger_linear_ce(accum_dtype=torch.float32),
            calls.eager_linear_ce,
        ],
        one=3,
    )


def loss_in_16_bits(effort: Effort) -> Iterator[Fault]:
    """Per-token losses in a 16-bit dtype have three digits, and so has their mean."""
    N, V, D = effort.rows, 8192, 64
    title, unit, near = "The loss is rounded to 16 bits", "nats", close(5e-4)
    torch_calls = [
        calls.torch_linear_ce(None),
        calls.torch_linear_ce({}),
        calls.torch_linear_ce({"acc_policy": "accurate"}),
        calls.torch_linear_ce({"acc_policy": "accurate", "acc_dtype": torch.float32}),
    ]
    peers = [*torch_calls, calls.liger_linear_ce(), calls.trl_linear_ce]
    problem = narrow(heads(N, V, D), BF16)
    inputs = f"bf16, {N} rows, D={D}, V={V}"
    yield Fault(
        "loss_in_16_bits", title, inputs, unit, [problem], values, near, calls.linear_ce, peers
    )
    draw = Draw(0)
    rows = Rows(draw.labels(16, V), draw.normal(16, V, scale=3.0).to(BF16))
    inputs = f"bf16 logits 3 randn(16, {V})"
    yield Fault(
        "loss_in_16_bits",
        title,
        inputs,
        unit,
        [rows],
        values,
        near,
        calls.ce,
        [calls.liger_ce, calls.fla_ce, calls.trl_rows],
    )
    noisy = rows.logits + draw.normal(16, V)
    log_q, log_p = (x.float().log_softmax(-1).to(BF16) for x in (rows.logits, noisy))
    both = Rows(rows.labels, log_q, log_p)
    yield Fault(
        "loss_in_16_bits",
        title,
        f"bf16 log-probabilities of {inputs[5:]} and with noise",
        unit,
        [both],
        values,
        near,
        calls.kl,
        [calls.liger_jsd],
    )


def near_zero_divergence(effort: Effort) -> Iterator[Fault]:
    """https://github.com/linkedin/Liger-Kernel/issues/1432

    https://github.com/modelscope/ms-swift/issues/10156
    """
    N, seeds, V = effort
    problems = [narrow(heads(N, V, 64, seed=i, noise=0.05), BF16) for i in range(seeds)]
    inputs = f"bf16, hs=randn({N}, 64), W=Wt=randn({V}, 64)/8, ht=hs+randn/20, {seeds} seeds"
    peers = [calls.liger_chunked, calls.trl_linear_kl]
    slug, title = "near_zero_divergence", "Student and teacher nearly agree: logits in 16 bits"
    for beta, name in DIVERGENCES.items():
        yield Fault(
            slug,
            title,
            inputs,
            f"nats, {name}",
            [replace(p, beta=beta) for p in problems],
            values,
            close(0.01),
            calls.linear_kl,
            peers,
            one=0,
        )
    yield Fault(
        slug,
        title,
        inputs,
        f"{RELATIVE} dhidden, forward KL",
        problems,
        hidden_errors(problems),
        at_most(0.01),
        calls.linear_kl,
        peers,
        one=0,
    )


def sharp_divergence(effort: Effort) -> Iterator[Fault]:
    """An fp32 softmax cannot recover what a 16-bit projection has rounded away.

    https://github.com/linkedin/Liger-Kernel/issues/1432
    """
    N, _, V = effort
    problems = [narrow(heads(N, V, 64, noise=0.05, spread=4.0), BF16)]
    inputs = f"bf16, hs=randn({N}, 64), W=Wt=randn({V}, 64)/2, ht=hs+randn/20"
    slug, title = "sharp_divergence", "Logits in 16 bits and four times as large, softmax in fp32"
    for unit, measure, right in (
        ("nats, forward KL", values, close(0.01)),
        (f"{RELATIVE} dhidden, forward KL", hidden_errors(problems), at_most(0.01)),
    ):
        yield Fault(
            slug,
            title,
            inputs,
            unit,
            problems,
            measure,
            right,
            calls.linear_kl,
            [calls.eager_linear_kl],
        )


def hidden_errors(problems: Sequence[Heads]) -> Callable[[Loss, Sequence[Heads]], Values]:
    """A measure: the relative error of ``dhidden`` on each of these problems."""
    exact = partial(calls.linear_kl, library=reference)
    true = [gradients(exact, p.double())[1][0] for p in problems]

    def errors(loss: Loss, problems: Sequence[Heads]) -> Values:
        found = [gradients(loss, p)[1][0] for p in problems]
        return [relative_error(g, t) for g, t in zip(found, true, strict=False)]

    return errors


def padded_head(effort: Effort) -> Iterator[Fault]:
    """https://github.com/huggingface/trl/issues/2215"""
    N, V, pads = 8, effort.vocab, 128
    one = heads(N, V, 64)
    zeros = one.weight.new_zeros(pads, 64)
    problem = replace(
        one,
        teacher_hidden=one.hidden,
        teacher_weight=torch.cat((one.weight, zeros)),
        teacher_bias=torch.cat((zeros.new_zeros(V), zeros.new_full((pads,), -30.0))),
    )

    def loss_and_gradient(loss: Loss, problems: Sequence[Heads]) -> Values:
        value, (dhidden, _) = gradients(loss, problems[0])
        return [value, norm(dhidden)]

    yield Fault(
        "padded_head",
        "The same model with a padded head as teacher: padding gets the student's probability",
        f"fp32, {N} rows, D=64, V={V}, {pads} columns of the teacher's alone at -30",
        "loss in nats, norm of dhidden",
        [problem],
        loss_and_gradient,
        close(0.0, absolute=1e-5),
        calls.linear_kl,
        [calls.liger_chunked, calls.trl_linear_kl],
    )


def minus_infinity_in_both(_: Effort) -> Iterator[Fault]:
    """Tokens that neither model can emit contribute 0 log 0 = 0.

    https://github.com/linkedin/Liger-Kernel/issues/1453
    """
    one = heads(8, 1000, 32)
    bias = one.hidden.new_zeros(1000)
    bias[900:] = -math.inf
    masked = replace(one, bias=bias, teacher_bias=bias)
    yield Fault(
        "minus_infinity_in_both",
        "100 of 1000 logits are -inf in student and teacher",
        "fp32, 8 rows, D=32, V=1000",
        "nats: forward KL, reverse KL, JSD",
        [replace(masked, beta=beta) for beta in DIVERGENCES],
        values,
        close(1e-4),
        calls.linear_kl,
        [calls.trl_linear_kl, calls.liger_chunked, calls.eager_linear_kl],
    )


def leading_minus_infinity(_: Effort) -> Iterator[Fault]:
    """https://github.com/Dao-AILab/flash-attention/issues/1930"""
    V = 140000  # more than two blocks of everyone's
    draw = Draw(0)
    z = draw.normal(2, V)
    z[:, : V // 2] = -math.inf
    labels = draw.labels(2, V // 2) + V // 2
    yield Fault(
        "leading_minus_infinity",
        "The first half of the vocabulary is masked with -inf",
        f"fp32 logits randn(2, {V})",
        "nats",
        [Rows(labels, z)],
        values,
        close(1e-5),
        calls.ce,
        [calls.liger_ce, calls.fla_ce, calls.trl_rows, calls.eager_ce],
    )


def nan_in_an_ignored_row(_: Effort) -> Iterator[Fault]:
    """https://github.com/huggingface/trl/pull/5594"""
    one = heads(8, 97, 16)
    one.labels[2] = IGNORED
    one.hidden[2] = math.nan

    def loss_and_gradient(loss: Loss, problems: Sequence[Heads]) -> Values:
        value, (_, dweight) = gradients(loss, problems[0])
        return [value, norm(dweight)]

    for ours, peers in (
        (
            calls.linear_ce,
            [calls.eager_linear_ce, calls.liger_linear_ce(), calls.torch_linear_ce({})],
        ),
        (calls.linear_kl, [calls.liger_linear_jsd, calls.liger_chunked]),
    ):
        yield Fault(
            "nan_in_an_ignored_row",
            "A row that does not count holds NaN",
            "fp32, 8 rows, D=16, V=97, the third ignored",
            "loss in nats, norm of dweight",
            [one],
            loss_and_gradient,
            close(1e-4),
            ours,
            peers,
        )


def fp16_loss_scale(effort: Effort) -> Iterator[Fault]:
    """Gradients computed in forward underflow before a GradScaler's factor reaches them."""
    N, V = min(64, effort.rows), 8 * effort.vocab
    problem = narrow(heads(N, V, 32, noise=0.1), FP16)
    exact = partial(calls.linear_kl, library=reference)
    true = gradients(exact, problem.double(), 65536.0)[1]

    def cosines(loss: Loss, problems: Sequence[Heads]) -> Values:
        found = gradients(loss, problems[0], 65536.0)[1]
        return [cosine(g, t) for g, t in zip(found, true, strict=True)]

    yield Fault(
        "fp16_loss_scale",
        "fp16 gradients are computed before the loss scale can save them",
        f"fp16, {N} rows, D=32, V={V}, loss scale 65536, forward KL",
        "cosine of dhidden, of dweight",
        [problem],
        cosines,
        close(0.01),
        calls.linear_kl,
        [calls.liger_chunked, calls.trl_linear_kl, calls.eager_linear_kl],
    )


FAULTS = (
    logits_overwritten,
    replay,
    weight_gradient_in_16_bits,
    loss_in_16_bits,
    near_zero_divergence,
    sharp_divergence,
    padded_head,
    minus_infinity_in_both,
    leading_minus_infinity,
    nan_in_an_ignored_row,
    fp16_loss_scale,
)
