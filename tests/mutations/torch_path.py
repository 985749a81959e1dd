# One entry per fault: a list grows long, and its entries do not interact.
"""Faults of the losses as torch computes them, and of what both implementations share."""

from __future__ import annotations

from mutations.planting import Edit, Mutation, edit, tests

KERNELS = "kernels/sad_kernels/"
CHECK = KERNELS + "_check.py"
DIVERGENCE = KERNELS + "_divergence.py"
GRADIENT = KERNELS + "_torch/gradient.py"
LINEAR = KERNELS + "linear.py"
ROWS = KERNELS + "_rows.py"
SOURCES = KERNELS + "_torch/sources.py"
STATISTICS = KERNELS + "_torch/statistics.py"
TILES = KERNELS + "_tiles.py"
TORCH = KERNELS + "_torch/autograd.py"


def regressions(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_regressions.py", *names)


def both(name: str, *parameters: str) -> tuple[str, ...]:
    """The same test of both implementations."""
    each = (f"{name}[{'-'.join((*parameters, impl))}]" for impl in ("torch", "triton"))
    return regressions(*each)


MUTATIONS = [
    # --- Rounding --------------------------------------------------------------------------------
    Mutation(
        "1",
        "the softmax is rounded to bf16 before the label's share is subtracted",
        edit(
            GRADIENT,
            "g.mul_(self.q1_factor[rows, None])",
            "g.mul_(self.q1_factor[rows, None]); g.copy_(g.bfloat16())",
        ),
        regressions(
            "test_p_is_rounded_after_the_subtraction[dtype1-cross_entropy-torch]",
            "test_p_is_rounded_after_the_subtraction[dtype1-distill_loss-torch]",
        ),
    ),
    Mutation(
        "1",
        "the student's softmax is rounded to bf16 before the teacher's is subtracted",
        edit(
            GRADIENT,
            "        g.addcmul_(u, (kd / saved.total[rows])[:, None])\n",
            "        g.addcmul_(u, (kd / saved.total[rows])[:, None])\n"
            "        g.copy_(g.bfloat16())\n",
        ),
        regressions(
            "test_p_is_rounded_after_the_subtraction[dtype1-kl_div-torch]",
            "test_p_is_rounded_after_the_subtraction[dtype1-distill_loss-torch]",
        ),
    ),
    Mutation(
        "2",
        "the gradient is made for an upstream of 1, rounded, and scaled afterwards",
        edit(
            TORCH,
            "gradient = problem.gradient(saved, upstream)",
            "gradient = problem.gradient(saved, torch.ones_like(upstream))",
        )
        + edit(
            TORCH,
            "student_gradients = problem.student.gradients()",
            "dx, *others = problem.student.gradients(); "
            "student_gradients = (dx * upstream[:, None]).to(dx.dtype), *others",
        ),
        regressions("test_the_gradient_is_rounded_once[0.03-dtype1-cross_entropy-torch]"),
    ),
    Mutation(
        "6",
        "the weight's gradient is added up in its own 16 bits",
        edit(
            SOURCES,
            "self.dw = dw if self.dw is None else self.dw.add_(dw)",
            "self.dw = (dw if self.dw is None else self.dw.add_(dw)).to(self.weight.dtype)",
        ),
        regressions(
            "test_the_weight_gradient_does_not_depend_on_chunks[1-dtype1-linear_cross_entropy-torch]",
            "test_the_weight_gradient_does_not_depend_on_chunks[1-dtype1-linear_distill_loss-torch]",
        ),
    ),
    Mutation(
        "27",
        "losses of rows are returned in the dtype of the inputs",
        edit(
            TORCH,
            "(problem.scatter(x) for x in results)",
            "(problem.scatter(x).to(tensors[0].dtype) for x in results)",
        ),
        regressions(
            "test_losses_are_float32[dtype1-cross_entropy-torch]",
            "test_losses_are_float32[dtype1-linear_distill_loss-torch]",
        ),
    ),
    Mutation(
        "28",
        "the label's logit is rounded to bf16, the sum is not",
        edit(
            STATISTICS,
            "noted.copy_(logit.where(here, noted))",
            "noted.copy_(logit.bfloat16().to(s.dtype).where(here, noted))",
        ),
        regressions("test_no_probability_exceeds_one[dtype0-torch]"),
    ),
    # --- Upstream gradients ----------------------------------------------------------------------
    Mutation(
        "3",
        "every row gets the upstream gradient of the first",
        edit(
            TORCH,
            "rows = self.gather(upstream).to(self.zeros.dtype)",
            "rows = upstream[:1].expand_as(self.zeros).to(self.zeros.dtype)",
        ),
        regressions(
            "test_every_row_has_its_own_upstream[random-cross_entropy-torch]",
            "test_every_row_has_its_own_upstream[random-kl_div-torch]",
            "test_every_row_has_its_own_upstream[random-linear_cross_entropy-torch]",
        ),
    ),
    Mutation(
        "3b",
        "the upstream gradient is read as if its numbers lay next to each other",
        edit(
            TORCH,
            "rows = self.gather(upstream).to(self.zeros.dtype)",
            "rows = self.gather(upstream.as_strided(upstream.shape, (1,))).to(self.zeros.dtype)",
        ),
        regressions(
            "test_summing_rows_is_the_sum[cross_entropy-torch]",
            "test_every_row_has_its_own_upstream[stride0-kl_div-torch]",
        ),
        error="RuntimeError",  # torch knows the size of the storage, a kernel would read on
    ),
    # --- Graphs ----------------------------------------------------------------------------------
    Mutation(
        "5",
        "tiles are views of the caller's logits, and are overwritten",
        edit(SOURCES, "logits.to(self.dtype, copy=True)", "logits.to(self.dtype).data"),
        regressions(
            "test_inputs_survive_and_graphs_can_be_used_twice[cross_entropy-torch]",
            "test_inputs_survive_and_graphs_can_be_used_twice[distill_loss-torch]",
        ),
    ),
    Mutation(
        "20",
        "a part without a gradient is expected to have one",
        edit(
            SOURCES,
            "dhidden = None if self.dx is None else self.dx.to(self.hidden.dtype)",
            "dhidden = self.dx.to(self.hidden.dtype)",
        ),
        regressions(
            "test_frozen_parts_and_autocast[dtype0-None-weight-linear_cross_entropy-torch]"
        ),
        error="AttributeError",
    ),
    Mutation(
        "20",
        "autocast reaches the arithmetic of the losses",
        edit(
            TORCH,
            "torch.autocast(tensors[0].device.type, enabled=False)",
            "torch.autocast(tensors[0].device.type, enabled=torch.is_autocast_enabled('cpu'))",
        )
        + edit(
            KERNELS + "_torch/gemm.py", "if not (HAS_ONEDNN and ", "if True or not (HAS_ONEDNN and "
        ),
        regressions(
            "test_frozen_parts_and_autocast[dtype0-autocast1-hidden-linear_cross_entropy-torch]"
        ),
    ),
    Mutation(
        "25",
        "without gradients the mean is over all rows, not over those that count",
        edit(
            ROWS,
            "loss.sum() / num_tokens.clamp(min=1)",
            "loss.sum() / (num_tokens.clamp(min=1) if loss.requires_grad else loss.numel())",
        ),
        regressions(
            "test_evaluation_is_training_without_gradients[cross_entropy-torch]",
            "test_evaluation_is_training_without_gradients[kl_div-torch]",
        ),
    ),
    Mutation(
        "25",
        "the CE beside a divergence is taken at the divergence's temperature",
        edit(
            STATISTICS,
            "weights = u if self.temperature == 1 else tempered_exp(s, 1.0, out=u)",
            "weights = u",
        ),
        regressions("test_the_ce_of_a_distillation_is_the_cross_entropy[torch]"),
    ),
    Mutation(
        "21",
        "the head's gradient is added to what is there, and returned as well",
        edit(
            TORCH,
            "            student_gradients = problem.student.gradients()\n",
            "            student_gradients = problem.student.gradients()\n"
            "            if tensors[1] is not None and tensors[1].grad is not None:\n"
            "                tensors[1].grad += student_gradients[1]\n",
        ),
        regressions(
            "test_a_tied_head_gets_its_gradient_once[linear_cross_entropy-torch]",
            "test_a_tied_head_gets_its_gradient_once[linear_distill_loss-torch]",
            "test_two_ranks_have_the_gradient_of_their_joined_batch[torch]",
        ),
    ),
    # --- Rows that do not count ------------------------------------------------------------------
    Mutation(
        "4",
        "ignored rows of the gradient of logits stay unwritten",
        edit(SOURCES, "torch.zeros_like(self.logits)", "torch.empty_like(self.logits)"),
        regressions(
            "test_ignored_rows_are_written[cross_entropy-torch]",
            "test_ignored_rows_are_written[distill_loss-torch]",
        ),
    ),
    Mutation(
        "4",
        "ignored rows of the gradient of hidden states stay unwritten",
        edit(SOURCES, "torch.zeros_like(self.hidden)", "torch.empty_like(self.hidden)"),
        regressions("test_ignored_rows_are_written[linear_cross_entropy-torch]"),
    ),
    Mutation(
        "4",
        "the losses of ignored rows stay unwritten",
        edit(TORCH, "x.new_zeros(self.num_rows)", "x.new_empty(self.num_rows)"),
        regressions(
            "test_ignored_rows_are_written[kl_div-torch]",
            "test_ignored_rows_are_written[linear_distill_loss-torch]",
        ),
    ),
    Mutation(
        "15",
        "the ignore index is always -100",
        edit(
            TORCH,
            "kept = (labels != ignore_index).nonzero()",
            "kept = (labels != -100).nonzero()",
        ),
        regressions(
            "test_ignored_rows_are_as_good_as_absent[3-cross_entropy-torch]",
            "test_ignored_rows_are_as_good_as_absent[-1-linear_distill_loss-torch]",
        ),
    ),
    Mutation(
        "15",
        "ignored rows count in the mean",
        edit(
            ROWS,
            "return (labels != ignore_index).sum(dtype=dtype)",
            "return x.new_full((), labels.numel(), dtype=dtype)",
        ),
        regressions("test_ignored_rows_are_as_good_as_absent[-100-cross_entropy-torch]")
        + both("test_ignored_rows_are_as_good_as_absent", "-100", "linear_distill_loss"),
    ),
    Mutation(
        "16",
        "ignored rows are computed, and their gradient multiplied by 0",
        (
            Edit(
                TORCH,
                "return (None, labels) if len(kept) == len(labels) else (kept, labels[kept])",
                "return None, labels.where(labels != ignore_index, 0)",
            ),
            Edit(
                TORCH,
                "n = self.num_rows if self.kept is None else len(self.kept)",
                "n = self.num_rows\n"
                "        self.mask = labels is None or labels != call.spec.ignore_index",
            ),
            Edit(
                TORCH,
                "rows = self.gather(upstream).to(self.zeros.dtype)",
                "rows = (upstream * self.mask).to(self.zeros.dtype)",
            ),
            Edit(
                TORCH,
                "            return x.clone()",
                "            return x.where(torch.as_tensor(self.mask), 0)",
            ),
        ),
        regressions(
            "test_ignored_rows_may_hold_anything[-inf-cross_entropy-torch]",
            "test_ignored_rows_may_hold_anything[nan-linear_distill_loss-torch]",
        ),
    ),
    # --- Labels ----------------------------------------------------------------------------------
    Mutation(
        "17",
        "a label outside the vocabulary is moved into it",
        edit(
            TORCH,
            "self.kept, self.labels = _kept(labels, call.spec.ignore_index)\n",
            "self.kept, self.labels = _kept(labels, call.spec.ignore_index)\n"
            "        if self.labels is not None:\n"
            "            self.labels = self.labels.clamp(0, call.spec.vocab - 1)\n",
        ),
        regressions(
            "test_a_foreign_label_poisons_its_row[97-cross_entropy-torch]",
            "test_a_foreign_label_poisons_its_row[-1-distill_loss-torch]",
            "test_a_foreign_label_poisons_its_row[90-linear_cross_entropy-torch]",
        ),
    ),
    Mutation(
        "17",
        "labels that only say which rows count are not looked at",
        edit(
            STATISTICS, "poison.masked_fill_(outside, torch.nan)", "poison.masked_fill_(outside, 0)"
        ),
        regressions(
            f"test_a_foreign_label_poisons_its_row[{2**40}-kl_div-torch]",
        ),
    ),
    Mutation(
        "18",
        "labels are compared with the columns of the logits, padding included",
        edit(
            STATISTICS,
            "outside = (self.labels < 0) | (self.labels >= self.spec.vocab)",
            "outside = (self.labels < 0) | (self.labels >= 128)",
        ),
        regressions(
            "test_a_foreign_label_poisons_its_row[90-kl_div-torch]",
            "test_a_foreign_label_poisons_its_row[97-kl_div-torch]",
        ),
    ),
    Mutation(
        "19",
        "labels are flattened in their own order, not in that of the logits",
        edit(
            ROWS,
            "labels.permute(self.order).flatten().long()",
            "labels.flatten().long()",
        ),
        both("test_layouts_are_only_layouts", "cross_entropy")
        + both("test_layouts_are_only_layouts", "linear_distill_loss"),
    ),
    Mutation(
        "19",
        "rows are read as if they touched",
        edit(
            ROWS,
            "return x.permute(*self.order, -1).reshape(-1, x.shape[-1])",
            "return x.as_strided((x[..., 0].numel(), x.shape[-1]), (x.shape[-1], 1))",
        ),
        both("test_layouts_are_only_layouts", "kl_div")
        + both("test_layouts_are_only_layouts", "linear_cross_entropy"),
    ),
    Mutation(
        "23",
        "tiles have a multiple of 32 columns, rounded down",
        edit(
            TILES,
            "columns = min(vocab, LOGIT_COLUMNS)",
            "columns = min(vocab, LOGIT_COLUMNS) & -32",
        ),
        regressions(
            "test_small_vocabularies[1-cross_entropy-torch]",
            "test_small_vocabularies[31-kl_div-torch]",
        ),
        error="ZeroDivisionError",
    ),
    # --- Divergences -----------------------------------------------------------------------------
    Mutation(
        "10",
        "the mixture is formed from probabilities that underflow",
        edit(
            DIVERGENCE,
            "    over_q, over_p = _over_mixture(1 - beta, log_q, log_p)\n"
            "    h = _zero_nan(over_q.mul_(log_q.exp())).mul_(1 - beta)\n"
            "    return _zero_nan(over_p.mul_(log_p.exp())).mul_(beta).add_(h), h\n",
            "    q, p = log_q.exp(), log_p.exp()\n"
            "    log_m = ((1 - beta) * q + beta * p).log()\n"
            "    h = (1 - beta) * q * (log_q - log_m)\n"
            "    return beta * p * (log_p - log_m) + h, h\n",
        ),
        regressions(
            "test_probabilities_that_underflow[jsd-kl_div-torch]",
            "test_probabilities_that_underflow[jsd-distill_loss-torch]",
        ),
    ),
    Mutation(
        "11",
        "the teacher's log-probabilities keep 16 bits",
        edit(
            STATISTICS,
            "log_p = log_softmax_(t, teacher.maximum[rows], "
            "teacher.total[rows], self.temperature)\n",
            "log_p = log_softmax_(t, teacher.maximum[rows], "
            "teacher.total[rows], self.temperature).bfloat16().to(s.dtype)\n",
        ),
        regressions("test_a_bfloat16_teacher_makes_nothing_negative[jsd-torch]"),
    ),
    Mutation(
        "12",
        "the CE is halved on its way into the loss",
        edit(STATISTICS, "(objective.ce_weight, ce)", "(objective.ce_weight / 2, ce)"),
        regressions("test_no_weight_and_no_temperature_is_hidden[forward_kl-torch]"),
    ),
    Mutation(
        "12",
        "the CE reuses the exponentials of the divergence, at its temperature",
        edit(
            STATISTICS,
            "weights = u if self.temperature == 1 else tempered_exp(s, 1.0, out=u)",
            "weights = u",
        ),
        regressions("test_no_weight_and_no_temperature_is_hidden[reverse_kl-torch]"),
    ),
    Mutation(
        "13",
        "beta is the student's share",
        edit(
            DIVERGENCE,
            "    return TERMS[divergence]\n",
            "    return lambda beta, *logs: TERMS[divergence](1 - beta, *logs)\n",
        ),
        regressions("test_beta_is_the_teachers_share[torch]"),
    ),
    Mutation(
        "14",
        "each micro-batch is divided by its own number of tokens",
        edit(
            ROWS,
            "    if isinstance(num_items, int):\n",
            "    num_items = None\n    if isinstance(num_items, int):\n",
        ),
        both("test_the_normaliser_belongs_to_the_window", "linear_distill_loss"),
    ),
    Mutation(
        "51",
        "divergences that need a second reading are a list of names",
        edit(
            STATISTICS,
            "self.terms = terms_of(objective.divergence)",
            "self.terms = TERMS_OF_MIXTURES.get(objective.divergence)",
        )
        + edit(
            STATISTICS,
            'Side = Literal["student", "teacher"]\n',
            'Side = Literal["student", "teacher"]\n'
            "MIXTURES = 'jsd', 'skew_forward_kl', 'skew_reverse_kl'\n"
            "TERMS_OF_MIXTURES = {name: terms_of(name) for name in MIXTURES}\n",
        ),
        tests(
            "sad_kernels/test_divergence_table.py",
            "test_an_added_divergence_is_right[torch-logits-logits]",
            "test_an_added_divergence_is_right[torch-hidden-hidden]",
        ),
    ),
    # --- The head --------------------------------------------------------------------------------
    Mutation(
        "29",
        "the bias gets the gradient of the last rows only",
        edit(
            SOURCES,
            "self.dbias[self.columns] += g.sum(0)",
            "self.dbias[self.columns] = g.sum(0)",
        ),
        regressions("test_the_bias_has_its_gradient[bias-dtype0-linear_cross_entropy-torch]"),
    ),
    Mutation(
        "29",
        "the bias gets its gradient without the logits' scale",
        edit(SOURCES, "+= g.sum(0)", "+= g.sum(0) / self.logit_scale"),
        regressions(
            "test_the_bias_has_its_gradient[hidden,weight,bias-dtype0-linear_distill_loss-torch]"
        ),
    ),
    # --- The vocabulary --------------------------------------------------------------------------
    Mutation(
        "30",
        "columns that only one side has, or that are padding, count",
        edit(CHECK, "    return vocab\n", "    return min(width, teacher_width)\n"),
        both("test_padding_is_no_probability", "0.0")
        + both("test_padding_is_no_probability", "nan"),
    ),
    Mutation(
        "30",
        "the rows that pad a head count",
        edit(CHECK, "    return vocab\n", "    return min(width, teacher_width)\n"),
        both("test_padded_heads_are_cut", "50.0"),
    ),
    Mutation(
        "31",
        "running maxima start at -inf",
        edit(STATISTICS, "LOWEST = -1e30", "LOWEST = -torch.inf"),
        regressions(
            "test_a_whole_tile_of_impossible_tokens[40000-first tile-torch]",
            "test_a_whole_tile_of_impossible_tokens[40000-all but one-torch]",
        ),
    ),
    Mutation(
        "32",
        "the head's softcap is accepted and dropped",
        edit(
            TORCH,
            "LogitTransform(float(head.logit_scale), head.softcap)",
            "LogitTransform(float(head.logit_scale))",
        ),
        regressions("test_every_option_changes_the_result[torch]"),
    ),
    Mutation(
        "32",
        "the logits' scale is accepted and dropped",
        edit(
            TORCH,
            "LogitTransform(float(head.logit_scale), head.softcap)",
            "LogitTransform(softcap=head.softcap)",
        ),
        regressions("test_every_option_changes_the_result[torch]"),
    ),
    # --- Chunks and memory -----------------------------------------------------------------------
    Mutation(
        "33",
        "a budget of nothing is accepted",
        edit(CHECK, "chunk_bytes < 1:", "chunk_bytes < 0:"),
        both("test_no_chunk_bytes_at_all_are_refused", "linear_cross_entropy")
        + both("test_no_chunk_bytes_at_all_are_refused", "linear_distill_loss"),
    ),
    Mutation(
        "7",
        "every slice of the vocabulary has a temporary of the whole weight's size",
        edit(
            SOURCES,
            "self.dweight[self.columns] = 0 if self.dw is None else self.dw.T",
            "whole = torch.zeros_like(self.dweight); "
            "whole[self.columns] = 0 if self.dw is None else self.dw.T; "
            "self.dweight[self.columns] = whole[self.columns]",
        ),
        regressions(
            "test_memory_of_the_torch_path[linear_cross_entropy]",
            "test_memory_of_the_torch_path[linear_distill_loss]",
        ),
    ),
    Mutation(
        "33",
        "a budget too small for one row gives no rows",
        edit(TILES, "max(1, min(rows, int(share / per_row)))", "min(rows, int(share / per_row))"),
        regressions(
            "test_any_chunk_size[1-linear_cross_entropy-torch]",
            "test_any_chunk_size[3-linear_distill_loss-torch]",
        ),
        error="ZeroDivisionError",
    ),
    Mutation(
        "44",
        "what a top-k teacher's ids leave is summed from the row's maximum",
        edit(
            STATISTICS,
            "objective, student.maximum, self.rest.maximum, self.rest.total",
            "objective, student.maximum, student.maximum, self.rest.total"
            " * ((self.rest.maximum - student.maximum) / self.temperature).exp()",
        ),
        tests(
            "sad_kernels/test_topk.py",
            "test_a_rest_that_underflows_beside_the_ids[1.0-torch]",
            "test_a_rest_that_underflows_beside_the_ids[2.0-torch]",
            "test_a_student_that_is_sure[0.5-forward_kl-bucket-torch]",
        ),
    ),
    Mutation(
        "45",
        "student and teacher are mixed the other way round",
        edit(
            TORCH,
            "t = t.mul_(share).add_(s, alpha=1 - share)",
            "t = t.mul_(1 - share).add_(s, alpha=share)",
        ),
        tests(
            "sad_kernels/test_teacher_share.py",
            "test_no_gradient_flows_through_the_target[forward_kl-torch]",
        ),
    ),
]
