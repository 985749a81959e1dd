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
SHARDS = KERNELS + "_torch/shards.py"
STATISTICS = KERNELS + "_torch/statistics.py"
TILES = KERNELS + "_tiles.py"
PROBLEM = KERNELS + "_torch/problem.py"
OUTCOMES = KERNELS + "_torch/outcomes.py"
OPERATORS = KERNELS + "_torch/operators.py"


def regressions(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_regressions.py", *names)


def sharded(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_vocab_shard.py", *names)


def options(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_loss_options.py", *names)


def outcomes(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_outcomes.py", *names)


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
            "            g = torch.mul(warm, factor, out=x)\n",
            "            g = torch.mul(warm, factor, out=x)\n            g.copy_(g.bfloat16())\n",
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
            STATISTICS,
            "return torch.sub(hot_t, hot, out=u)",
            "return torch.sub(hot_t, hot.bfloat16().to(hot.dtype), out=u)",
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
            OPERATORS,
            "return _filled(inputs, problem.gradients(saved, upstream, _wanted(want)))\n\n\n"
            "@torch_rows_gradient.register_fake",
            "dx, *others = problem.gradients(saved, torch.ones_like(upstream), _wanted(want))\n"
            "        dx = (dx * upstream[:, None]).to(dx.dtype)\n"
            "        return _filled(inputs, (dx, *others))\n\n\n"
            "@torch_rows_gradient.register_fake",
        ),
        regressions("test_the_gradient_is_rounded_once[0.03-dtype1-cross_entropy-torch]"),
    ),
    Mutation(
        "6",
        "the weight's gradient is added up in its own 16 bits",
        edit(
            SOURCES,
            "total = multiply_(self._unrounded(piece), g.T, x, add=not first)",
            "total = multiply_(self._unrounded(piece), g.T, x, add=not first)\n"
            "            total.copy_(total.to(self.weight.dtype))",
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
            PROBLEM,
            "*(self.scatter(x) for x in statistics.finish())",
            "*(self.scatter(x).to(self.student_dtype) for x in statistics.finish())",
        )
        + edit(
            PROBLEM,
            "        self.num_rows = len(student.x)\n",
            "        self.num_rows, self.student_dtype = len(student.x), student.x.dtype\n",
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
            "sums.label_logit.copy_(logit.where(here, sums.label_logit))",
            "logit = logit.bfloat16().to(s.dtype)\n"
            "        sums.label_logit.copy_(logit.where(here, sums.label_logit))",
        ),
        regressions("test_no_probability_exceeds_one[dtype0-torch]"),
    ),
    # --- Upstream gradients ----------------------------------------------------------------------
    Mutation(
        "3",
        "every row gets the upstream gradient of the first",
        edit(
            PROBLEM,
            "self._gradient(upstream[kept], inside)",
            "self._gradient(upstream[:1].expand(self.n), inside)",
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
            PROBLEM,
            "self._gradient(upstream[kept], inside)",
            "self._gradient(upstream.as_strided(upstream.shape, (1,))[kept], inside)",
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
        edit(
            STATISTICS,
            'scratch.like("x", block.s.shape) if block.is_lent[0] else block.s',
            "block.s.data",
        ),
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
            OPERATORS,
            "autocast = torch.autocast(self.x.device.type, enabled=False)",
            "autocast = torch.autocast(\n"
            "            self.x.device.type, enabled=torch.is_autocast_enabled('cpu')\n"
            "        )",
        )
        + edit(  # an output that is given is not cast
            KERNELS + "_torch/gemm.py",
            "torch.mm(a[:, piece], b[piece], out=out)",
            "out.copy_(a[:, piece] @ b[piece])",
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
            "    return (labels != ignore_index).sum(dtype=dtype)",
            "    if not x.requires_grad:\n"
            "        return x.new_full((), x[..., 0].numel(), dtype=dtype)\n"
            "    return (labels != ignore_index).sum(dtype=dtype)",
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
            '        warm = torch.mul(hot, hot, out=scratch.like("warm", x.shape))\n'
            "    elif untempered:\n"
            '        warm = scratch.exp_("warm", x)\n',
            "        warm = hot\n"
            "    elif untempered:\n"
            '        warm = scratch.exp_("warm", x, temperature)\n',
        ),
        regressions("test_the_ce_of_a_distillation_is_the_cross_entropy[torch]"),
    ),
    Mutation(
        "21",
        "the head's gradient is added to what is there, and returned as well",
        edit(
            OPERATORS,
            "        return problem.losses_and_gradients(whole_rows, upstream, _wanted(want))\n",
            "        both = problem.losses_and_gradients(whole_rows, upstream, _wanted(want))\n"
            "        if inputs.weight is not None and inputs.weight.grad is not None:\n"
            "            inputs.weight.grad += both[1][1]\n"
            "        return both\n",
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
        edit(PROBLEM, "x.new_zeros(self.num_rows)", "x.new_empty(self.num_rows)"),
        regressions(
            "test_ignored_rows_are_written[kl_div-torch]",
            "test_ignored_rows_are_written[linear_distill_loss-torch]",
        ),
    ),
    Mutation(
        "15",
        "the ignore index is always -100",
        edit(
            PROBLEM,
            "counts = targets.labels != self.spec.ignore_index",
            "counts = targets.labels != -100",
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
                PROBLEM,
                "self.kept, self.groups = self._groups(targets, teacher is not None)",
                "labels = targets.labels\n"
                "        self.mask = labels is None or labels != spec.ignore_index\n"
                "        if labels is not None:\n"
                "            targets = targets._replace(labels=labels.where(self.mask, 0))\n"
                "        self.kept, self.groups = self._groups(targets, teacher is not None)",
            ),
            Edit(
                PROBLEM,
                "self._gradient(upstream[kept], inside)",
                "self._gradient((upstream * self.mask)[kept], inside)",
            ),
            Edit(
                PROBLEM,
                "self._gradient(self.gather(upstream), statistics.inside)",
                "self._gradient(self.gather(upstream * self.mask), statistics.inside)",
            ),
            Edit(
                PROBLEM,
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
            PROBLEM,
            "        self.targets = targets._replace(**by_row)\n",
            "        self.targets = targets._replace(**by_row)\n"
            "        if self.targets.labels is not None:\n"
            "            inside = self.targets.labels.clamp(0, spec.vocab - 1)\n"
            "            self.targets = self.targets._replace(labels=inside)\n",
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
            STATISTICS,
            "poison.masked_fill_((labels < 0) | (labels >= self.spec.vocab), torch.nan)",
            "poison.masked_fill_((labels < 0) | (labels >= self.spec.vocab), 0)",
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
            "poison.masked_fill_((labels < 0) | (labels >= self.spec.vocab), torch.nan)",
            "poison.masked_fill_((labels < 0) | (labels >= 128), torch.nan)",
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
            "labels.permute(self.order).flatten()",
            "labels.flatten()",
        ),
        both("test_layouts_are_only_layouts", "cross_entropy")
        + both("test_layouts_are_only_layouts", "linear_distill_loss"),
    ),
    Mutation(
        "19",
        "rows are read as if they touched",
        edit(
            ROWS,
            "return x.permute(*self.order, -1).reshape(N, x.shape[-1])",
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
            "    log_m, _ = _log_mixture(1 - beta, gap)\n",
            "    log_m = ((1 - beta) * q + beta * p).log()\n"
            "    return beta * p * (p.log() - log_m) + (1 - beta) * q * (q.log() - log_m)\n",
        ),
        regressions(
            "test_probabilities_that_underflow[jsd-kl_div-torch]",
            "test_probabilities_that_underflow[jsd-distill_loss-torch]",
        ),
    ),
    Mutation(
        "54",
        "a top-k teacher's row of padding has NaN for the probabilities of its ids",
        edit(DIVERGENCE, "total.masked_fill(total == -torch.inf, 0)", "total"),
        options(
            "test_a_top_k_row_without_any_token_is_zero[jsd-torch]",
            "test_a_top_k_row_without_any_token_is_zero[jsd-triton]",
        ),
    ),
    Mutation(
        "11",
        "the teacher's log-probabilities keep 16 bits",
        edit(
            STATISTICS,
            "return torch.sub(block.t, sums.teacher_maximum[:, None], out=out)",
            "return block.t.sub(sums.teacher_maximum[:, None]).bfloat16().to(block.t.dtype)",
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
            '        warm = torch.mul(hot, hot, out=scratch.like("warm", x.shape))\n'
            "    elif untempered:\n"
            '        warm = scratch.exp_("warm", x)\n',
            "        warm = hot\n"
            "    elif untempered:\n"
            '        warm = scratch.exp_("warm", x, temperature)\n',
        ),
        regressions("test_no_weight_and_no_temperature_is_hidden[reverse_kl-torch]"),
    ),
    Mutation(
        "13",
        "beta is the student's share",
        edit(
            DIVERGENCE,
            "    return TERMS[divergence]\n",
            "    value, slope = TERMS[divergence]\n"
            "    return Terms(lambda beta, *rest: value(1 - beta, *rest), slope)\n",
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
            PROBLEM,
            "return how is not None and how.kl_weights is None",
            "return how is not None and how.divergence in "
            "('jsd', 'skew_forward_kl', 'skew_reverse_kl')",
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
            "self.dbias[piece] += g.sum(0)",
            "self.dbias[piece] = g.sum(0)",
        ),
        regressions("test_the_bias_has_its_gradient[bias-dtype0-linear_cross_entropy-torch]"),
    ),
    Mutation(
        "29",
        "the bias gets its gradient without the logits' scale",
        edit(
            SOURCES,
            "self.dbias[piece] += g.sum(0)",
            "self.dbias[piece] += g.sum(0) / self.transform.scale",
        ),
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
            PROBLEM,
            "LogitTransform(float(head.logit_scale), head.softcap)",
            "LogitTransform(float(head.logit_scale))",
        ),
        regressions("test_every_option_changes_the_result[torch]"),
    ),
    Mutation(
        "32",
        "the logits' scale is accepted and dropped",
        edit(
            PROBLEM,
            "LogitTransform(float(head.logit_scale), head.softcap)",
            "LogitTransform(softcap=head.softcap)",
        ),
        regressions("test_every_option_changes_the_result[torch]"),
    ),
    Mutation(
        "53",
        "a small probability is counted from the student's sum beside a far smaller teacher's",
        edit(
            GRADIENT,
            "by_student = sums.difference > -d / 2",
            "by_student = sums.difference > -d * 2",
        ),
        tests(
            "sad_kernels/test_agreement.py",
            "test_a_teacher_that_is_sure_of_a_token_leaves_the_others_their_digits[torch]",
        ),
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
            "            multiply_(self.dweight[piece], g.T, x, add=not first)\n",
            "            torch.zeros_like(self.dweight)\n"
            "            multiply_(self.dweight[piece], g.T, x, add=not first)\n",
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
            "            sums.rest_maximum,\n            sums.rest_total,\n",
            "            sums.maximum,\n            sums.rest_total"
            " * ((sums.rest_maximum - sums.maximum) / self.temperature).exp(),\n",
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
        "the target's most likely token is that of the other mixture",
        edit(
            PROBLEM,
            "t = t.mul_(share).add_(s, alpha=1 - share)",
            "t = t.mul_(1 - share).add_(s, alpha=share)",
        ),
        tests(
            "sad_kernels/test_teacher_share.py",
            "test_every_divergence[distill_loss-forward_kl-float64-torch]",
        ),
    ),
    Mutation(
        "45",
        "student and teacher are mixed the other way round",
        edit(
            PROBLEM,
            'out=self.scratch.like("gap", s.shape)).mul_(share)',
            'out=self.scratch.like("gap", s.shape)).mul_(1 - share)',
        ),
        tests(
            "sad_kernels/test_teacher_share.py",
            "test_no_gradient_flows_through_the_target[forward_kl-torch]",
        ),
    ),
    # --- A vocabulary split over processes -------------------------------------------------------
    Mutation(
        "57",
        "a sum of logits moves with the maximum for all columns, not for the shard's own",
        edit(
            SHARDS,
            '_in_order(parts["plain"] + parts["plain_weight"] * move)',
            '_in_order(parts["plain"] + _in_order(parts["plain_weight"]) * move)',
        ),
        sharded("test_every_objective[torch-ce]", "test_every_objective[torch-bucket]"),
    ),
    Mutation(
        "57",
        "the columns so far are counted from the first of the vocabulary",
        edit(
            STATISTICS,
            "sums.plain.add_(sums.plain_weight * move)",
            "sums.plain.add_(block.columns.start * move)",
        ),
        sharded("test_slices_of_the_vocabulary[ce]"),
    ),
    Mutation(
        "57",
        "every slice of the vocabulary is taken for a row's first",
        edit(
            STATISTICS,
            "is_first = columns.start == self.spec.first",
            "is_first = columns.start >= self.spec.first",
        ),
        sharded("test_slices_of_the_vocabulary[ce]"),
    ),
    Mutation(
        "57",
        "each rank keeps its own part of the hidden states' gradient",
        edit(PROBLEM, "sum_(dx, shard.group)", "_ = sum_"),
        sharded("test_every_objective[torch-ce]", "test_every_objective[torch-jsd]"),
    ),
    # --- Outcomes of two tokenizers --------------------------------------------------------------
    Mutation(
        "58",
        "an outcome's columns share its gradient alike, not by their probabilities",
        edit(
            OUTCOMES,
            "return slope.mul_(hot)",
            "return slope.mul_(hot.sum(1, keepdim=True) / hot.shape[1])",
        ),
        outcomes("test_by_hand[torch]", "test_every_kind_of_teacher[logits-float32-torch]"),
    ),
    Mutation(
        "58",
        "a sum of the student's that underflows is left as it is",
        edit(OUTCOMES, "far = (g.amax(1) > FAR[g.dtype])", "far = (g.amax(1) > math.inf)"),
        outcomes("test_extreme_logits[logits-sure-torch]"),
    ),
    Mutation(
        "58",
        "the student's argmax is compared with an outcome",
        edit(
            OUTCOMES,
            "ours = best.where(best < 0, self.student[best.clamp(min=0)])",
            "ours = best",
        ),
        outcomes("test_agreement_is_of_outcomes[torch]"),
    ),
]
