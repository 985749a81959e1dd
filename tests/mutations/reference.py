"""Faults of what everything else is held against: the specification, and the rule of the tests."""

from __future__ import annotations

from mutations.planting import Mutation, edit, tests

REFERENCE = "kernels/sad_kernels/reference.py"
DIVERGENCES = "tests/support/oracle/divergences.py"
EXACT = "tests/support/oracle/exact.py"
ROUNDING = "tests/support/oracle/rounding.py"
RULE = "tests/support/oracle/rule.py"


def mathematics(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_reference.py", *names)


def by_hand(module: str, name: str) -> tuple[str, ...]:
    """A value computed by hand, which the reference has to meet like any implementation."""
    return tests(f"sad_kernels/test_{module}.py", f"{name}[reference]")


def divergence(name: str, scale_t2: bool = True, temperature: float = 1.0) -> tuple[str, ...]:
    name = f"test_by_hand[{scale_t2}-{temperature}-{name}-reference]"
    return tests("sad_kernels/test_kd.py", name)


def fault(
    what: str, before: str, after: str, red: tuple[str, ...], error: str = "AssertionError"
) -> Mutation:
    return Mutation("22", f"in the reference {what}", edit(REFERENCE, before, after), red, error)


MUTATIONS = [
    # --- The specification -----------------------------------------------------------------------
    fault(
        "the sign of the KL is flipped",
        "bracket = bracket - minus",
        "bracket = -bracket + minus",
        divergence("forward_kl") + mathematics("test_forward_kl_is_torchs"),
    ),
    fault(
        "the sides of the KL are exchanged",
        "return _kl(log_p, log_q)",
        "return _kl(log_q, log_p)",
        divergence("forward_kl") + mathematics("test_forward_kl_is_torchs"),
    ),
    fault(
        "T^2 is forgotten",
        "return objective.kd_scale * value",
        "return value",
        divergence("reverse_kl", True, 2.0)
        + mathematics("test_high_temperature_compares_centred_logits"),
    ),
    fault(
        "T^2 cannot be switched off",
        "return objective.kd_scale * value",
        "return T**2 * value",
        divergence("reverse_kl", False, 2.0),
    ),
    fault(
        "T is for the teacher only",
        "(s / T).log_softmax(-1)",
        "s.log_softmax(-1)",
        divergence("jsd", True, 2.0),
    ),
    fault(
        "beta is the student's share of the JSD",
        "log_m = _log_mixture(beta, log_p, log_q)",
        "log_m = _log_mixture(1 - beta, log_p, log_q)",
        divergence("jsd") + mathematics("test_divergences_approach_the_kls_at_the_ends"),
    ),
    fault(
        "both skews have one mixture",
        "_log_mixture(beta, log_q, log_p)",
        "_log_mixture(beta, log_p, log_q)",
        divergence("skew_reverse_kl") + mathematics("test_jsd_is_made_of_both_skews"),
    ),
    fault(
        "ignored rows count",
        "return labels.flatten() != ignore_index",
        "return labels.flatten() > -1000",
        by_hand("ce", "test_reductions_by_hand")
        + mathematics("test_ignored_rows_may_hold_anything[nan]"),
    ),
    fault(
        "the mean is over all rows",
        "count = keep.sum() if mass is None else mass",
        "count = torch.tensor(keep.shape[0]) if mass is None else mass",
        by_hand("ce", "test_reductions_by_hand"),
    ),
    fault(
        "the label is the class before it",
        "one_hot(y.long().clamp(0, V - 1), V)",
        "one_hot((y.long() - 1).clamp(0, V - 1), V)",
        by_hand("ce", "test_by_hand") + mathematics("test_cross_entropy_is_torchs[0.0-mean]"),
    ),
    fault(
        "smoothing is spread over the other classes",
        "a = (1 - label_smoothing) * targets + label_smoothing / V",
        "a = (1 - label_smoothing) * targets + label_smoothing * (1 - targets) / (V - 1)",
        by_hand("ce", "test_label_smoothing_by_hand")
        + mathematics("test_cross_entropy_is_torchs[0.1-mean]"),
    ),
    fault(
        "smoothing is dropped",
        "a = (1 - label_smoothing) * targets + label_smoothing / V",
        "a = targets",
        by_hand("ce", "test_label_smoothing_by_hand"),
    ),
    fault(
        "the mean over weighted classes is over rows",
        "mass = class_weight[y[(y >= 0) & (y < s.shape[-1])].long()].sum()",
        "mass = None",
        mathematics("test_weighted_cross_entropy_is_torchs[classes-0.1-mean]"),
    ),
    fault(
        "smoothing is not weighted by class",
        "        a = class_weight * a\n",
        "        a = class_weight * (1 - label_smoothing) * targets + label_smoothing / V\n",
        mathematics("test_weighted_cross_entropy_is_torchs[probabilities-0.1-sum]"),
    ),
    fault(
        "a row's weight is left out of its divergence",
        "_times(on_kd, kd)",
        "_times((on_kd != 0).to(kd.dtype), kd)",
        mathematics("test_token_weights_multiply_each_row"),
    ),
    fault(
        "a row without weight is compared",
        "compared = on_kd != 0",
        "compared = on_kd == on_kd",
        mathematics("test_a_kd_weight_of_zero_reads_nothing_of_the_teachers_row"),
    ),
    fault(
        "both divergences take the same rows",
        "rest = ~other_rows",
        "rest = other_rows",
        mathematics("test_each_row_has_one_of_two_divergences[tvd]"),
    ),
    fault(
        "the z-loss is not squared",
        "ce + z_loss * s.logsumexp(-1).square()",
        "ce + z_loss * s.logsumexp(-1)",
        by_hand("ce", "test_z_loss_by_hand"),
    ),
    fault(
        "the z-loss is weighted like the CE",
        "(objective.z_loss, z)",
        "(objective.ce_weight * objective.z_loss, z)",
        by_hand("kd", "test_distill_loss_by_hand"),
    ),
    fault(
        "the CE is halved",
        "(objective.ce_weight, ce)",
        "(objective.ce_weight / 2, ce)",
        by_hand("kd", "test_distill_loss_by_hand")
        + mathematics("test_the_loss_is_the_weighted_sum_of_its_parts"),
    ),
    fault(
        "the softcap is dropped",
        "z if softcap is None else softcap * torch.tanh(z / softcap)",
        "z",
        by_hand("ce", "test_softcap_by_hand") + by_hand("linear", "test_distillation_by_hand"),
    ),
    fault(
        "the logits' scale is dropped",
        "return _transformed(z, head.logit_scale, head.softcap)",
        "return _transformed(z, 1.0, head.softcap)",
        by_hand("linear", "test_cross_entropy_by_hand")
        + by_hand("kd", "test_teacher_hidden_by_hand"),
    ),
    fault(
        "the bias comes after the scale",
        "z = z + head.bias[:V].to(dtype)",
        "z = z + head.bias[:V].to(dtype) / head.logit_scale",
        by_hand("linear", "test_cross_entropy_by_hand")
        + by_hand("kd", "test_teacher_hidden_by_hand"),
    ),
    fault(
        "padding counts",
        "_rows(logits, keep)[:, :V].to(_math_dtype(logits)), logit_scale",
        "_rows(logits, keep).to(_math_dtype(logits)), logit_scale",
        by_hand("ce", "test_valid_vocab_by_hand"),
    ),
    fault(
        "the bucket is empty",
        "p_rest = (1 - log_probs.exp().sum(-1)).clamp(min=0)",
        "p_rest = log_probs.new_zeros(n)",
        by_hand("topk", "test_bucket_by_hand"),
    ),
    fault(
        "the student's bucket holds all of its mass",
        "_logsumexp(log_q.masked_fill(in_k, -math.inf))",
        "_logsumexp(log_q)",
        by_hand("topk", "test_bucket_by_hand"),
    ),
    fault(
        "the teacher without a tail is not renormalised",
        "log_probs.masked_fill(nothing, 0).log_softmax(-1)",
        "log_probs.masked_fill(nothing, 0)",
        by_hand("topk", "test_zero_tail_by_hand"),
    ),
    fault(
        "num_items is not looked at",
        "_nonzero(count if num_items is None else num_items)",
        "_nonzero(count)",
        by_hand("kd", "test_distill_loss_by_hand"),
    ),
    fault(
        "labels outside of the vocabulary pass",
        "(y >= 0) & (y < V)",
        "(y >= 0) | (y < V)",
        mathematics(
            "test_a_foreign_label_poisons_its_own_row[-1]",
            f"test_a_foreign_label_poisons_its_own_row[{2**40}]",
        ),
    ),
    fault(
        "0 log 0 is not a number",
        "bracket = value.where(a > 0, 0)",
        "bracket = value",
        mathematics(
            "test_impossible_tokens_on_both_sides_change_nothing[forward_kl]",
            "test_impossible_tokens_on_both_sides_change_nothing[jsd]",
        ),
    ),
    fault(
        "the moving average moves away",
        "shadow.double() + (1 - decay)",
        "shadow.double() - (1 - decay)",
        mathematics("test_ema_update_by_hand"),
    ),
    fault(
        "a swap rounds down",
        "torch.where(low < 0x8000, hi, _up(hi))",
        "torch.where(low < 0x8000, hi, hi)",
        mathematics("test_ema_swap_by_hand"),
    ),
    fault(
        "16-bit inputs are computed in 16 bits",
        "(x.dtype for x in tensors), torch.float32)",
        "(x.dtype for x in tensors))",
        mathematics("test_low_precision_inputs_are_computed_in_float32")
        + tests("sad_kernels/test_regressions.py", "test_the_oracle_is_not_rounded"),
    ),
    fault(
        "a helper of the kernels is used",
        "from sad_kernels.objective import (\n    DistillOutput,",
        "from sad_kernels._divergence import terms_of\n"
        "from sad_kernels.objective import (\n    DistillOutput,",
        mathematics("test_the_reference_shares_no_code_with_what_it_judges"),
    ),
    # --- The rule --------------------------------------------------------------------------------
    Mutation(
        "22",
        "the oracle gets the inputs in their own dtype",
        edit(EXACT, "{name: x.double() for name, x in problem.leaves.items()}", "problem.leaves"),
        tests("sad_kernels/test_regressions.py", "test_the_oracle_is_not_rounded"),
    ),
    Mutation(
        "22",
        "the oracle of a divergence is autograd through its definition",
        edit(EXACT, "with replaced(_kd=kd_of()):", "with replaced():"),
        tests("sad_kernels/test_exact.py", "test_the_oracle_has_digits_that_the_reference_lacks"),
    ),
    Mutation(
        "22",
        "the oracle counts from equal probabilities, not from the student's token",
        edit(DIVERGENCES, "g=gap - gap.gather(-1, y),", "g=gap - offset,"),
        tests(
            "sad_kernels/test_exact.py",
            "test_dense_teachers[reverse_kl-sure of different tokens]",
        ),
    ),
    Mutation(
        "22",
        "a gradient of nothing is within the band where student and teacher agree",
        edit(RULE, "8 * moved, 0)", "8 * moved.clamp(min=8 * eps), 0)"),
        tests(
            "sad_kernels/test_oracle_divergences.py",
            "test_exact_differences_pass_where_gradients_are_small"
            "[skew_reverse_kl-0.9-randn1+1e-3]",
            "test_no_gradient_and_half_of_it_are_rejected[kl_div-dtype5]",
        ),
    ),
    Mutation(
        "22",
        "logits are given, whatever they were computed from",
        edit(ROUNDING, "if z.shape[-1] == known.shape[-1]:", "if known is None:"),
        tests(
            "sad_kernels/test_oracle_divergences.py",
            "test_exact_differences_pass_beside_other_teachers[forward_kl-0.5-logits-dtype0]",
        ),
    ),
    Mutation(
        "22",
        "errors are averaged over the tensor, not judged row by row",
        edit(
            RULE,
            "return (as_rows(x).double() - as_rows(oracle)).abs().amax(-1)",
            "rows = as_rows(x)\n"
            "    return (rows.double() - as_rows(oracle)).abs().mean().expand(len(rows))",
        ),
        tests("sad_kernels/test_oracle.py", "test_the_three_lines_of_the_rule"),
    ),
    Mutation(
        "22",
        "what eager gets wrong is a licence",
        edit(
            RULE,
            "budget = torch.minimum(2 * err_eager + band, 4 * band)",
            "budget = 2 * err_eager + band",
        ),
        tests("sad_kernels/test_oracle.py", "test_the_three_lines_of_the_rule"),
    ),
    Mutation(
        "22",
        "a NaN is within any budget",
        edit(
            RULE,
            "    if not (err <= budget).all():\n"
            "        raise AssertionError(_worst_row(ours, oracle, yardstick",
            "    if (err > budget).any():\n"
            "        raise AssertionError(_worst_row(ours, oracle, yardstick",
        ),
        tests("sad_kernels/test_oracle.py", "test_nan_is_never_within"),
    ),
]
