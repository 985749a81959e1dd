# One entry per fault: a list grows long, and its entries do not interact.
"""Faults of the kernels of the losses, of their launchers and operators."""

from __future__ import annotations

from mutations.planting import Edit, Mutation, edit, tests

TRITON = "kernels/sad_kernels/_triton/"
CHUNKS = TRITON + "chunks.py"
CODES = TRITON + "codes.py"
COMPRESS = TRITON + "compress.py"
FOLD = TRITON + "fold.py"
OUTCOMES = TRITON + "outcomes.py"
GRADIENT_KERNEL = TRITON + "gradient.py"
LAUNCH = TRITON + "launch.py"
LINEAR = TRITON + "linear.py"
LOGITS = TRITON + "logits.py"
MERGE = TRITON + "merge.py"
TOP_K = TRITON + "top_k.py"
OPERATOR = "kernels/sad_kernels/_operator.py"
REDUCE = TRITON + "reduce.py"
ROWS = TRITON + "rows.py"
SCALE = TRITON + "scale.py"
STATISTICS_KERNEL = TRITON + "statistics.py"
MIXTURE_KERNEL = TRITON + "mixture.py"
TILE = TRITON + "tile.py"
TILES = "kernels/sad_kernels/_tiles.py"


def regressions(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_regressions.py", *names)


def sharded(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_vocab_shard.py", *names)


def compiled(family: str) -> tuple[str, ...]:
    name = f"test_kernels_compile_within_their_budgets[{family}]"
    return tests("contracts/test_compile.py", name)


def far_apart(divergence: str) -> tuple[str, ...]:
    name = f"test_rows_past_two_to_the_31_elements[{divergence}]"
    return tests("sad_kernels/test_bytes.py", name)


def options(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_loss_options.py", *names)


def codes(*names: str) -> tuple[str, ...]:
    return tests("sad_kernels/test_compact.py", *names)


def digits(*cases: str) -> tuple[str, ...]:
    name = "test_a_sure_student_learns_from_what_is_left"
    file = "sad_kernels/test_triton_divergences.py"
    return tests(file, *(f"{name}[{case}]" for case in cases))


# The first lines of the kernels that begin alike.
STATISTICS = '''"""Partial sums of one row over one segment of the vocabulary."""
    row = tl.program_id(0)'''
MIXTURE = '''sums of a mixture's divergence, see ``mixture_value``, over one segment."""
    row = tl.program_id(0)'''
GRADIENT = '''``width``: the gradient up to V, zeros from there on."""
    row = tl.program_id(0)'''

MUTATIONS = [
    # --- Rounding --------------------------------------------------------------------------------
    Mutation(
        "1",
        "in the kernel the softmax is rounded to bf16 before the label's share is subtracted",
        edit(
            GRADIENT_KERNEL,
            "g += exp_1 * scalars.q_1_factor - ",
            "g += (exp_1 * scalars.q_1_factor).to(tl.bfloat16).to(tl.float32) - ",
        ),
        regressions(
            "test_p_is_rounded_after_the_subtraction[dtype1-cross_entropy-triton]",
            "test_p_is_rounded_after_the_subtraction[dtype1-distill_loss-triton]",
        ),
    ),
    Mutation(
        "1",
        "in the kernel the student's softmax is rounded to bf16 before the teacher's is subtracted",
        edit(
            GRADIENT_KERNEL,
            "g = difference_tile(exp_T, y, apart, t_share, scalars, inv_T) * scalars.kd",
            "exp_T = exp_T.to(tl.bfloat16).to(tl.float32)\n"
            "            g = difference_tile(exp_T, y, apart, t_share, scalars, inv_T)\n"
            "            g *= scalars.kd",
        ),
        regressions("test_p_is_rounded_after_the_subtraction[dtype1-kl_div-triton]"),
    ),
    Mutation(
        "2",
        "the kernel's gradient is made for an upstream of 1, rounded, and scaled afterwards",
        edit(
            LOGITS,
            "return row_gradient(*inputs, *saved, upstream), *nothing",
            "g = row_gradient(*inputs, *saved, torch.ones_like(upstream))\n"
            "    return (g * upstream[:, None]).to(g.dtype), *nothing",
        )
        + edit(
            LOGITS,
            "return row_gradient(*inputs, *saved, share), *nothing",
            "g = row_gradient(*inputs, *saved, torch.ones_like(share))\n"
            "    return (g * share).to(g.dtype), *nothing",
        ),
        regressions(
            "test_the_gradient_is_rounded_once[0.03-dtype1-cross_entropy-triton]",
            "test_the_gradient_is_rounded_once[0.7-dtype0-kl_div-triton]",
        ),
    ),
    Mutation(
        "6",
        "between chunks the weight's gradient is kept in the dtype of the hidden states",
        edit(
            CHUNKS,
            "            add_times_(result.dweight[:V], g.T, x)\n",
            "            add_times_(result.dweight[:V], g.T, x)\n"
            "            result.dweight.copy_(result.dweight.to(x.dtype))\n",
        ),
        regressions(
            "test_the_weight_gradient_does_not_depend_on_chunks[1-dtype1-linear_cross_entropy-triton]",
            "test_the_weight_gradient_does_not_depend_on_chunks[1-dtype1-linear_distill_loss-triton]",
        ),
    ),
    Mutation(
        "27",
        "the kernel's losses of rows are returned in the dtype of the logits",
        edit(
            LOGITS,
            "return RowResults(loss, *parts.detach())",
            "return RowResults(loss.to(logits.dtype), *parts.detach())",
        )
        + edit(
            LOGITS,
            "return DistillOutput(loss, *sums,",
            "return DistillOutput(loss.to(logits.dtype), *sums,",
        ),
        regressions(
            "test_losses_are_float32[dtype1-cross_entropy-triton]",
            "test_losses_are_float32[dtype1-kl_div-triton]",
        ),
    ),
    Mutation(
        "28",
        "in the kernel the label's logit is rounded to fp16, the sum is not",
        edit(
            MERGE,
            "tl.load(student.ptr + at, mask=counts, other=0.0).to(tl.float32)",
            "tl.load(student.ptr + at, mask=counts, other=0.0).to(tl.float16).to(tl.float32)",
        ),
        regressions("test_no_probability_exceeds_one[dtype0-triton]"),
    ),
    Mutation(
        "55",
        "interpreted kernels truncate to bf16, as the interpreter does of itself",
        edit(TILE, "            bits += 0x7FFF + ((bits >> 16) & 1)\n", ""),
        tests("sad_kernels/test_tile.py", "test_stores_round_to_nearest[dtype2]"),
    ),
    # --- Means -----------------------------------------------------------------------------------
    Mutation(
        "15",
        "the kernel of the mean counts ignored rows",
        edit(REDUCE, "(label != ignore_index).to(tl.int32)", "(rows < N).to(tl.int32)"),
        regressions("test_ignored_rows_are_as_good_as_absent[-100-cross_entropy-triton]"),
    ),
    Mutation(
        "14",
        "the kernel of the mean divides each micro-batch by its own number of tokens",
        edit(REDUCE, "divisor = tl.load(items_ptr).to(tl.float32)", "divisor = num_tokens"),
        tests("sad_kernels/test_reduce.py", "test_triton_sums_of_rows[7.0-2125]"),
    ),
    Mutation(
        "25",
        "without gradients the kernel's mean is over all rows, not over those that count",
        edit(
            LOGITS,
            "row_mean(*inputs, items)",
            "row_mean(*inputs, items if logits.requires_grad else logits.new_tensor(1.0 * "
            "len(logits)))",
        ),
        regressions(
            "test_evaluation_is_training_without_gradients[cross_entropy-triton]",
            "test_evaluation_is_training_without_gradients[kl_div-triton]",
        ),
    ),
    # --- Upstream gradients ----------------------------------------------------------------------
    Mutation(
        "3",
        "in the kernel every row gets the upstream gradient of the first",
        edit(
            GRADIENT_KERNEL,
            "tl.load(upstream_ptr + row * upstream_stride)",
            "tl.load(upstream_ptr)",
        ),
        regressions(
            "test_every_row_has_its_own_upstream[random-cross_entropy-triton]",
            "test_every_row_has_its_own_upstream[random-kl_div-triton]",
            "test_every_row_has_its_own_upstream[random-linear_cross_entropy-triton]",
        ),
    ),
    Mutation(
        "3",
        "an upstream gradient whose first number is 1 is taken for 1",
        edit(
            GRADIENT_KERNEL,
            "upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)",
            "upstream = tl.load(upstream_ptr + row * upstream_stride).to(tl.float32)\n"
            "    upstream = tl.where(tl.load(upstream_ptr) == 0.7, 0.7, upstream * 0 + 1)",
        ),
        regressions("test_every_row_has_its_own_upstream[random-cross_entropy-triton]"),
    ),
    Mutation(
        "3b",
        "the kernel reads upstream gradients as if they lay next to each other",
        edit(GRADIENT_KERNEL, "upstream_ptr + row * upstream_stride", "upstream_ptr + row"),
        regressions(
            "test_summing_rows_is_the_sum[cross_entropy-triton]",
            "test_every_row_has_its_own_upstream[stride0-kl_div-triton]",
        ),
    ),
    # --- Graphs ----------------------------------------------------------------------------------
    Mutation(
        "5",
        "the gradient is written over the caller's logits",
        edit(LOGITS, "out = inputs.student.new_empty(inputs.student.shape)", "out = inputs.student")
        + edit(
            LOGITS,
            "upstream, out)\n    return out\n",
            "upstream, out)\n    return out.clone()\n",
        ),
        regressions(
            "test_inputs_survive_and_graphs_can_be_used_twice[cross_entropy-triton]",
            "test_inputs_survive_and_graphs_can_be_used_twice[distill_loss-triton]",
        ),
    ),
    Mutation(
        "20",
        "gradients are only made where hidden states, weight and bias all want theirs",
        edit(
            CHUNKS,
            "upstream is not None and any(grad_mask)",
            "upstream is not None and all(grad_mask)",
        ),
        regressions(
            "test_frozen_parts_and_autocast[dtype0-None-hidden-linear_cross_entropy-triton]"
        ),
        error="RuntimeError",
    ),
    Mutation(
        "20",
        "autocast reaches the product that gives a teacher's logits",
        edit(
            LOGITS,
            "torch.autocast(hidden.device.type, enabled=False)",
            "torch.autocast(hidden.device.type, enabled=torch.is_autocast_enabled('cpu'))",
        ),
        regressions(
            "test_a_teachers_head_keeps_its_precision_under_autocast[dtype0-distill_loss-triton]",
            "test_a_teachers_head_keeps_its_precision_under_autocast[dtype1-distill_loss-triton]",
        ),
    ),
    Mutation(
        "21",
        "the weight's gradient is added to that of the call before",
        edit(
            CHUNKS,
            "dweight = fp32.new_empty(student.weight.shape)\n",
            'dweight = vars(run).setdefault("kept", fp32.new_zeros(student.weight.shape))\n',
        )
        + edit(CHUNKS, "        if chunk.start == 0:\n", "        if False:\n"),
        regressions(
            "test_a_tied_head_gets_its_gradient_once[linear_cross_entropy-triton]",
            "test_a_tied_head_gets_its_gradient_once[linear_distill_loss-triton]",
            "test_two_ranks_have_the_gradient_of_their_joined_batch[triton]",
        ),
    ),
    Mutation(
        "25",
        "without gradients the sum is divided by all rows, not by those that count",
        edit(
            LINEAR,
            "loss = result.loss.sum() / items",
            "loss = result.loss.sum() / (items if any(want) else len(hidden))",
        ),
        regressions(
            "test_evaluation_is_training_without_gradients[linear_cross_entropy-triton]",
            "test_evaluation_is_training_without_gradients[linear_distill_loss-triton]",
        ),
    ),
    Mutation(
        "25",
        "in the kernel the CE beside a divergence is taken at the divergence's temperature",
        edit(TILE, "return exp_T, tl.exp2(x * LOG2_E)", "return exp_T, exp_T"),
        regressions("test_the_ce_of_a_distillation_is_the_cross_entropy[triton]"),
    ),
    # --- Rows that do not count ------------------------------------------------------------------
    Mutation(
        "4",
        "the kernel leaves ignored rows of the gradient unwritten",
        edit(
            GRADIENT_KERNEL,
            "tl.store(g_row + columns, nothing, mask=columns < last)",
            "tl.store(g_row + columns, nothing, mask=columns < 0)",
        ),
        regressions(
            "test_ignored_rows_are_written[cross_entropy-triton]",
            "test_ignored_rows_are_written[kl_div-triton]",
            "test_ignored_rows_are_written[linear_cross_entropy-triton]",
        )
        + tests(
            "sad_kernels/test_operators.py",
            "test_compiled_without_graph_breaks[aot_eager-cross_entropy]",
        ),
    ),
    Mutation(
        "4",
        "the kernel leaves the losses of ignored rows unwritten",
        edit(
            MERGE,
            "tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=exists)",
            "tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=counts)",
        ),
        regressions(
            "test_ignored_rows_are_written[cross_entropy-triton]",
            "test_ignored_rows_are_written[linear_distill_loss-triton]",
        ),
    ),
    Mutation(
        "15",
        "in the gradient the ignore index is always -100",
        edit(GRADIENT_KERNEL, "if label == ignore_index:", "if label == -100:"),
        regressions(
            "test_ignored_rows_are_as_good_as_absent[3-cross_entropy-triton]",
            "test_ignored_rows_are_as_good_as_absent[-1-linear_distill_loss-triton]",
        ),
    ),
    Mutation(
        "16",
        "hidden states of ignored rows are multiplied by a gradient of 0",
        edit(CHUNKS, "x = x.where((labels[chunk] != spec.ignore_index)[:, None], 0)", "pass"),
        regressions(
            "test_ignored_rows_may_hold_anything[nan-linear_cross_entropy-triton]",
            "test_ignored_rows_may_hold_anything[-inf-linear_distill_loss-triton]",
        ),
    ),
    Mutation(
        "16",
        "the losses of ignored rows are multiplied by 0",
        edit(
            MERGE,
            "tl.store(loss_ptr + rows, tl.where(counts, loss, 0.0), mask=exists)",
            "tl.store(loss_ptr + rows, loss * counts.to(tl.float32), mask=exists)",
        ),
        regressions(
            "test_ignored_rows_may_hold_anything[nan-cross_entropy-triton]",
            "test_ignored_rows_may_hold_anything[inf-distill_loss-triton]",
        ),
    ),
    # --- Labels ----------------------------------------------------------------------------------
    Mutation(
        "17",
        "in the kernel a label outside the vocabulary is taken for class 0",
        edit(MERGE, 'poison = tl.where(in_range, zero, float("nan"))', "poison = zero"),
        regressions(
            "test_a_foreign_label_poisons_its_row[97-cross_entropy-triton]",
            "test_a_foreign_label_poisons_its_row[-1-distill_loss-triton]",
            f"test_a_foreign_label_poisons_its_row[{2**40}-kl_div-triton]",
        ),
    ),
    Mutation(
        "18",
        "in the kernel a label may be one of the columns that fill up the last tile",
        edit(
            MERGE,
            "in_range = (label >= 0) & (label < V)",
            "in_range = (label >= 0) & (label < (V + 31) // 32 * 32)",
        ),
        regressions(
            "test_a_foreign_label_poisons_its_row[90-cross_entropy-triton]",
            "test_a_foreign_label_poisons_its_row[90-distill_loss-triton]",
        ),
    ),
    Mutation(
        "19",
        "the kernel reads labels as if they lay next to each other",
        edit(
            LAUNCH,
            "which = _adjacent(targets.labels), spec",
            "which = targets.labels, spec",
        ),
        regressions(
            "test_layouts_are_only_layouts[cross_entropy-triton]",
            "test_layouts_are_only_layouts[kl_div-triton]",
        ),
    ),
    Mutation(
        "19",
        "the kernel reads rows of the student as if they touched",
        edit(
            STATISTICS_KERNEL,
            "LogitsRow(s_ptr + row * s_stride, ",
            "LogitsRow(s_ptr + row * tl.minimum(s_stride, V), ",
        ),
        regressions(
            "test_layouts_are_only_layouts[cross_entropy-triton]",
            "test_layouts_are_only_layouts[distill_loss-triton]",
        ),
    ),
    Mutation(
        "19",
        "the kernel reads rows of the teacher as if they touched",
        edit(
            STATISTICS_KERNEL,
            "LogitsRow(t_ptr + row * t_stride, ",
            "LogitsRow(t_ptr + row * tl.minimum(t_stride, V), ",
        ),
        regressions(
            "test_layouts_are_only_layouts[kl_div-triton]",
            "test_layouts_are_only_layouts[distill_loss-triton]",
        ),
    ),
    Mutation(
        "23",
        "the kernel leaves out the last columns where there is no whole tile before them",
        edit(
            STATISTICS_KERNEL,
            "(last - first) // STEP * STEP\n",
            "(last - first) // STEP * STEP\n    last = tl.where(whole > 0, last, 0)\n",
        ),
        regressions(
            "test_small_vocabularies[2-cross_entropy-triton]",
            "test_small_vocabularies[31-linear_distill_loss-triton]",
        ),
    ),
    # --- Divergences -----------------------------------------------------------------------------
    Mutation(
        "10",
        "in the kernel ratios are formed from probabilities that underflow",
        edit(
            MIXTURE_KERNEL,
            "        phi, term = ",
            "        gap = tl.where((exp_T > 0) & (exp_T_t > 0), gap, 0.0)\n        phi, term = ",
        ),
        regressions(
            "test_probabilities_that_underflow[jsd-kl_div-triton]",
            "test_probabilities_that_underflow[jsd-distill_loss-triton]",
        ),
    ),
    Mutation(
        "11",
        "in the kernel the teacher's log-probabilities keep 16 bits",
        edit(
            MIXTURE_KERNEL,
            "tl.exp2(y * inv_T)\n",
            "tl.exp2((y * inv_T).to(tl.bfloat16).to(tl.float32))\n",
        ),
        regressions("test_a_bfloat16_teacher_makes_nothing_negative[jsd-triton]"),
    ),
    Mutation(
        "12",
        "in the kernel the CE is halved on its way into the loss",
        edit(
            MERGE,
            "tl.where(ce_weight > 0, ce_weight * ce, 0.0)",
            "tl.where(ce_weight > 0, 0.5 * ce_weight * ce, 0.0)",
        ),
        regressions("test_no_weight_and_no_temperature_is_hidden[forward_kl-triton]"),
    ),
    Mutation(
        "12",
        "in the kernel the CE reuses the exponentials of the divergence, at its temperature",
        edit(TILE, "return exp_T, tl.exp2(x * LOG2_E)", "return exp_T, exp_T"),
        regressions("test_no_weight_and_no_temperature_is_hidden[reverse_kl-triton]"),
    ),
    Mutation(
        "13",
        "in the kernel beta is the student's share",
        edit(
            TILE,
            "    a = 1 - beta if ",
            "    beta, share = 1 - beta, 1 - share\n    a = 1 - beta if ",
        ),
        regressions("test_beta_is_the_teachers_share[triton]"),
    ),
    Mutation(
        "14",
        "the kernels' gradient is divided by the tokens of the micro-batch",
        edit(
            LINEAR,
            "inverse = 1 / items.float()",
            "inverse = 1 / (inputs.labels != -100).sum().clamp(min=1).float()",
        ),
        regressions("test_the_normaliser_belongs_to_the_window[linear_distill_loss-triton]"),
    ),
    Mutation(
        "53",
        "in the kernel a mixture's slopes count from 0, not from that of the top token",
        edit(
            TILE,
            "        return phi, log_over_mu - ",
            "        phi += (beta - 1) * row.rho / beta\n        return phi, log_over_mu - ",
        ),
        digits("skew_forward_kl-dense", "skew_forward_kl-top-k"),
    ),
    Mutation(
        "53",
        "in the kernel the difference of totals is that of two rounded totals",
        edit(
            MERGE,
            "        expectation = sums.B / sums.d_t\n",
            "        expectation = (sums.d_t - sums.d) / sums.d_t\n",
        ),
        digits("forward_kl-dense"),
    ),
    Mutation(
        "53",
        "beside a top-k teacher the gradient at the top token is a difference of numbers near 1",
        edit(
            TOP_K,
            "    h = tl.where(is_top, 0.0, tl.exp2(x)",
            "    scale *= 0\n    h = tl.where(is_top & (x > 0), 0.0, tl.exp2(x)",
        ),
        digits("forward_kl-top-k"),
    ),
    Mutation(
        "54",
        "in the kernel a top-k teacher's row of padding has a divergence",
        edit(
            TOP_K,
            '    teaches = (tl.max(log_p, 1) != float("-inf")) | ',
            "    teaches = (tl.max(log_p, 1) == tl.max(log_p, 1)) | ",
        ),
        tests(
            "sad_kernels/test_triton_divergences.py",
            "test_a_row_of_padding_teaches_nothing[jsd-zero]",
            "test_a_row_of_padding_teaches_nothing[skew_reverse_kl-zero]",
        ),
    ),
    # --- The head --------------------------------------------------------------------------------
    Mutation(
        "29",
        "the bias gets the gradient of the last chunk only",
        edit(
            CHUNKS,
            "result.dbias[:V] += g.sum(0, dtype=torch.float32)",
            "result.dbias[:V] = g.sum(0, dtype=torch.float32)",
        ),
        regressions(
            "test_the_bias_has_its_gradient[bias-dtype0-linear_cross_entropy-triton]",
            "test_the_bias_has_its_gradient[bias-dtype0-linear_distill_loss-triton]",
        ),
    ),
    Mutation(
        "29",
        "the gradient leaves the logits' scale out",
        edit(
            LINEAR,
            "return upstream * args.scale, torch.ones(",
            "return upstream, torch.ones(",
        ),
        regressions("test_the_bias_has_its_gradient[bias-dtype0-linear_cross_entropy-triton]"),
    ),
    # --- The vocabulary --------------------------------------------------------------------------
    Mutation(
        "30",
        "the kernel writes a gradient for columns past the vocabulary",
        edit(GRADIENT_KERNEL, "            g = tl.where(columns < V, g, 0.0)\n", ""),
        regressions("test_padding_is_no_probability[0.0-triton]"),
    ),
    Mutation(
        "31",
        "in the kernel running maxima start at -inf",
        edit(TILE, "LOWEST = tl.constexpr(-1e30)", 'LOWEST = tl.constexpr(float("-inf"))'),
        regressions(
            "test_a_whole_tile_of_impossible_tokens[128-first tile-triton]",
            "test_a_whole_tile_of_impossible_tokens[128-all but one-triton]",
        ),
    ),
    Mutation(
        "31",
        "an impossible token counts in what is rescale_cross from tile to tile",
        edit(
            ROWS,
            "return weights * tl.where(weights > 0, x, 0.0)",
            "return weights * x",
        ),
        regressions(
            "test_a_whole_tile_of_impossible_tokens[128-middle-triton]",
            "test_a_whole_tile_of_impossible_tokens[128-all but one-triton]",
        ),
    ),
    Mutation(
        "32",
        "the head's softcap is dropped on its way to the kernels",
        edit(
            LINEAR,
            "OpArgs(spec, float(head.logit_scale), head.softcap)",
            "OpArgs(spec, float(head.logit_scale))",
        ),
        regressions("test_every_option_changes_the_result[triton]"),
    ),
    Mutation(
        "32",
        "the teacher's scale is dropped on its way to the kernels",
        edit(
            LINEAR,
            "teacher_scale=float(other.logit_scale), teacher_softcap",
            "teacher_softcap",
        ),
        regressions("test_every_option_changes_the_result[triton]"),
    ),
    Mutation(
        "32",
        "the logits' softcap is dropped on its way to the kernels",
        edit(LOGITS, "float(transform.logit_scale), transform.softcap)", "1.0, None)"),
        regressions("test_every_option_changes_the_result[triton]"),
    ),
    Mutation(
        "32",
        "the gradient of given logits is by the scaled ones",
        edit(LOGITS, "        upstream = upstream * args.scale\n", "        pass\n"),
        options("test_given_logits_have_a_scale_and_a_softcap[mean-triton-float32]"),
    ),
    # --- Rows and classes ------------------------------------------------------------------------
    Mutation(
        "56",
        "weights of tokens are left out of the CE's gradient",
        edit(
            GRADIENT_KERNEL,
            "tl.where(on_ce != 0, on_ce * q_1_factor, 0.0)",
            "tl.where(on_ce != 0, q_1_factor, 0.0)",
        ),
        options("test_weights_of_rows[False-logits-triton-float32]"),
    ),
    Mutation(
        "56",
        "weights of tokens are left out of the divergence's gradient",
        edit(GRADIENT_KERNEL, "        kd *= on_kd\n", ""),
        options(
            "test_weights_of_rows_on_every_divergence[logits-forward_kl-triton]",
            "test_weights_of_rows_on_every_divergence[bucket-forward_kl-triton]",
        ),
    ),
    Mutation(
        "56",
        "a weight of 0 multiplies an infinite term",
        edit(MERGE, "ce = tl.where(on_ce != 0, on_ce * ce, 0.0)", "ce = on_ce * ce"),
        options("test_a_weight_of_zero_switches_an_infinite_row_off[triton]"),
    ),
    Mutation(
        "56",
        "statistics read the teacher's row whatever its weight",
        edit(
            STATISTICS_KERNEL,
            "is_read = (tl.load(kd_weights_ptr + row) != 0)",
            "is_read = (tl.load(kd_weights_ptr + row) >= 0)",
        ),
        tests("sad_kernels/test_bytes.py", "test_rows_of_weight_0_do_not_read_their_teacher[jsd]"),
    ),
    Mutation(
        "56",
        "a row that is not compared agrees with its teacher",
        edit(MERGE, "((column == other) & compared)", "(column == other)"),
        options(
            "test_a_weight_of_zero_reads_nothing_of_the_teachers_row[False-logits-forward_kl-triton]"
        ),
    ),
    Mutation(
        "56",
        "the gradient of either divergence is written to all rows",
        edit(
            GRADIENT_KERNEL,
            "        if tl.load(other_rows_ptr + row) != wanted:\n            return\n",
            "        pass\n",
        ),
        options("test_each_row_has_the_bits_of_its_own_divergence[logits-jsd-triton]"),
    ),
    Mutation(
        "56",
        "smoothing is not weighted by class",
        edit(
            TILE,
            "            a *= tl.load(shares.weight + columns, mask=mask, other=0.0)\n",
            "            pass\n",
        ),
        options("test_weights_of_classes[False-0.1-none-triton-float32]"),
    ),
    Mutation(
        "56",
        "the gradient of CE forgets how much the classes count together",
        edit(
            GRADIENT_KERNEL, "            mass *= tl.load(saved + MASS * N)\n", "            pass\n"
        ),
        options(
            "test_weights_of_classes[False-0.0-none-triton-float32]",
            "test_labels_that_are_probabilities[True-0.0-none-triton-float32]",
        ),
    ),
    Mutation(
        "56",
        "what fp16 stores between two products is scaled as without weights",
        edit(
            LINEAR,
            "if by_class is None and on_ce is None and on_kd is None:",
            "if by_class is None:",
        ),
        options("test_large_and_small_weights_keep_16_bit_gradients[mean-30000.0-triton]"),
    ),
    Mutation(
        "56",
        "lse is in the order of the memory",
        edit(LOGITS, "layout.restore(lse.detach()).flatten()", "lse.detach()"),
        options("test_lse_is_in_the_callers_order[mean-triton]"),
    ),
    Mutation(
        "53",
        "in the kernel TVD's slopes count from 0",
        edit(MIXTURE_KERNEL, "(sign(difference) - reference)", "sign(difference)")
        + edit(GRADIENT_KERNEL, "            above -= scalars.reference\n", ""),
        digits("tvd-dense"),
    ),
    # --- Chunks, memory, grids -------------------------------------------------------------------
    Mutation(
        "7",
        "every chunk has a temporary of the whole weight's size",
        edit(
            CHUNKS,
            "add_times_(result.dweight[:V], g.T, x)",
            "result.dweight[:V].add_(times(g.T, x))",
        ),
        tests(
            "sad_kernels/test_memory.py",
            "test_chunks_around_the_kernels_share_one_gradient_of_the_weight",
        ),
    ),
    Mutation(
        "33",
        "a budget too small for one row gives no rows to a chunk",
        edit(TILES, "if rows >= 128 else max(1, rows)", "if rows >= 128 else rows"),
        regressions(
            "test_any_chunk_size[1-linear_cross_entropy-triton]",
            "test_any_chunk_size[3-linear_distill_loss-triton]",
        ),
        error="ZeroDivisionError",
    ),
    Mutation(
        "8",
        "rows are 32-bit offsets where sums are formed",
        edit(STATISTICS_KERNEL, f"{STATISTICS}.to(tl.int64)\n", f"{STATISTICS}\n"),
        far_apart("forward_kl") + far_apart("jsd"),
    ),
    Mutation(
        "8",
        "rows are 32-bit offsets where the terms of a mixture are formed",
        edit(MIXTURE_KERNEL, f"{MIXTURE}.to(tl.int64)\n", f"{MIXTURE}\n"),
        far_apart("jsd"),
    ),
    Mutation(
        "8",
        "rows are 32-bit offsets where gradients are formed",
        edit(GRADIENT_KERNEL, f"{GRADIENT}.to(tl.int64)\n", f"{GRADIENT}\n"),
        far_apart("forward_kl") + far_apart("jsd"),
    ),
    Mutation(
        "8",
        "rows are 32-bit offsets where the label's logit is read",
        edit(
            MERGE, "rows = tl.program_id(0).to(tl.int64) * ROWS", "rows = tl.program_id(0) * ROWS"
        ),
        far_apart("forward_kl") + far_apart("jsd"),
    ),
    Mutation(
        "8",
        "rows are 32-bit offsets in what is compiled for a GPU",
        edit(GRADIENT_KERNEL, f"{GRADIENT}.to(tl.int64)\n", f"{GRADIENT}\n"),
        compiled("cross_entropy"),
        says="must multiply the row index in 64 bits",
    ),
    Mutation(
        "8",
        "blocks are 32-bit offsets where the weight's gradient is scaled",
        edit(
            SCALE,
            "start = tl.program_id(0).to(tl.int64) * BLOCK",
            "start = tl.program_id(0) * BLOCK",
        ),
        compiled("scale"),
        says="must multiply the row index in 64 bits",
    ),
    Mutation(
        "9",
        "rows lie on the second axis of a grid",
        (
            Edit(
                LAUNCH,
                "statistics_kernel[(N, segments)](",
                "statistics_kernel[(segments, N)](",
            ),
            Edit(
                STATISTICS_KERNEL,
                f"{STATISTICS}.to(tl.int64)\n    segment = tl.program_id(1)\n",
                f"{STATISTICS[:-3]}(1).to(tl.int64)\n    segment = tl.program_id(0)\n",
            ),
            Edit(
                STATISTICS_KERNEL,
                "    step = tl.num_programs(1).to(tl.int64) * N  # from",
                "    step = tl.num_programs(0).to(tl.int64) * N  # from",
            ),
        ),
        regressions("test_rows_lie_on_the_first_axis_of_every_grid"),
    ),
    Mutation(
        "44",
        "in the kernel what a top-k teacher's ids leave is summed from the row's maximum",
        edit(
            STATISTICS_KERNEL,
            "        s, masked, cursor = mask_ids(s, start, ",
            "        every = s\n        s, masked, cursor = mask_ids(s, start, ",
        )
        + edit(
            STATISTICS_KERNEL,
            "    top = lane_max(s)\n",
            "    top = lane_max(to_lanes(every, LANES, VECTOR) if HAS_IDS else s)\n",
        ),
        tests(
            "sad_kernels/test_topk.py",
            "test_a_rest_that_underflows_beside_the_ids[1.0-triton]",
            "test_a_rest_that_underflows_beside_the_ids[2.0-triton]",
            "test_a_student_that_is_sure[0.5-forward_kl-bucket-triton]",
        ),
    ),
    Mutation(
        "44",
        "in the kernel columns without an id keep their own maximum beside those with one",
        edit(TOP_K, "d_1 = d_1 * decay_1 + tl.sum(exp_1, 1)", "d_1 = d_1 + tl.sum(exp_1, 1)"),
        tests(
            "sad_kernels/test_topk.py",
            "test_what_labels_teach_knows_nothing_of_the_ids[1.0-0.0-triton]",
            "test_what_labels_teach_knows_nothing_of_the_ids[2.7-0.1-triton]",
        ),
    ),
    Mutation(
        "44",
        "in the kernel a top-k teacher's ids count twice in the mean logit",
        edit(STATISTICS_KERNEL, "number -= masked", "number -= 0 * masked"),
        tests(
            "sad_kernels/test_topk.py",
            "test_what_labels_teach_knows_nothing_of_the_ids[1.0-0.1-triton]",
            "test_what_labels_teach_knows_nothing_of_the_ids[2.7-0.1-triton]",
        ),
    ),
    Mutation(
        "24",
        "a scalar keeps the precision in which a compiler hands it over",
        edit(
            MERGE,
            "inv_T, temperature, beta = to_fp32(inv_T), to_fp32(temperature), to_fp32(beta)",
            "inv_T, beta = to_fp32(inv_T), to_fp32(beta)",
        ),
        compiled("distill_loss"),
        says="must not compute in fp64",
    ),
    Mutation(
        "45",
        "in the kernel student and teacher are mixed the other way round",
        edit(
            TILE,
            "t = tl.fma(t, share + tl.zeros_like(t), s * (1 - share))",
            "t = tl.fma(s, share + tl.zeros_like(t), t * (1 - share))",
        ),
        tests(
            "sad_kernels/test_teacher_share.py",
            "test_no_gradient_flows_through_the_target[forward_kl-triton]",
        ),
    ),
    Mutation(
        "50",
        "a loss goes past the dispatch modes that want to see it",
        edit(OPERATOR, " or torch._C._len_torch_dispatch_stack() > 0", ""),
        tests(
            "sad_kernels/test_operators.py",
            "test_a_dispatch_mode_sees_operators[cross_entropy-mean-row_mean-row_gradient]",
            "test_a_dispatch_mode_sees_operators"
            "[linear_cross_entropy-none-linear_rows-linear_rows_gradient]",
        ),
        error="IndexError",
    ),
    # --- A vocabulary split over processes -------------------------------------------------------
    Mutation(
        "57",
        "the columns of a shard are counted as those of a segment",
        edit(
            MERGE,
            "count_b = tl.load(at + SHARD_COUNT * step, mask=counts, other=0.0)",
            "count_b = zero + tl.minimum(segment_length, V - segment * segment_length)",
        ),
        sharded("test_every_objective[triton-ce]"),
    ),
    Mutation(
        "57",
        "a label is looked for as if the shard began with the vocabulary",
        edit(GRADIENT_KERNEL, "label -= shard_start", "label -= 0"),
        sharded("test_weights_of_rows_and_classes[weighted_rows-triton]"),
    ),
    Mutation(
        "57",
        "each rank keeps its own part of the hidden states' gradient, in the kernels' path",
        edit(CHUNKS, "sum_(result.dhidden, spec.shard.group)", "_ = sum_"),
        sharded("test_every_objective[triton-ce]"),
    ),
    # --- Outcomes of two tokenizers --------------------------------------------------------------
    Mutation(
        "58",
        "an outcome that reaches over a tile loses what it had before",
        edit(OUTCOMES, "goes_on = (lanes == 0) & (outcome == before)", "goes_on = lanes < 0"),
        tests("sad_kernels/test_outcomes.py", "test_sums_that_reach_over_tiles"),
    ),
    Mutation(
        "58",
        "mass that no column of the student's can show is lost",
        edit(
            OUTCOMES,
            "beyond = torch.zeros_like(ours.maximum).masked_fill_(infinite, math.inf)",
            "beyond = torch.zeros_like(ours.maximum)",
        ),
        tests("sad_kernels/test_outcomes.py", "test_outcomes_without_mass[triton]"),
    ),
    # --- Logits as codes -------------------------------------------------------------------------
    Mutation(
        "59",
        "codes past the vocabulary, which load as 0, are decoded as the student's maximum",
        edit(
            COMPRESS,
            'x = tl.where(columns < last, x, float("-inf"))',
            "x = x",
        ),
        codes("test_distillation[reverse]"),
    ),
    Mutation(
        "59",
        "normalisers are of the exact logits, beside gradients of rounded ones",
        edit(
            COMPRESS,
            "exp_T, exp_1 = exponentials(y, inv_T, FLAGS.T_CASE)",
            "exp_T, exp_1 = exponentials(x - k[:, None], inv_T, FLAGS.T_CASE)",
        ),
        codes(
            "test_cross_entropy[bias, scale, valid_vocab]",
            "test_distillation[T 1]",
        ),
    ),
    Mutation(
        "59",
        "logits are rounded down to their codes, not to the nearest",
        edit(CODES, "tl.int32, bitcast=True) + HALF", "tl.int32, bitcast=True)"),
        codes("test_a_maximum_is_exact_and_all_else_within_two_to_the_minus_13[0.0]"),
    ),
    Mutation(
        "59",
        "distances are taken from a maximum plus 1/4, which is not exact beside a large offset",
        edit(
            CODES,
            "v = below * UP + QUARTER_UP",
            "v = ((k + 0.25) - x) * UP",
        ),
        codes("test_a_maximum_is_exact_and_all_else_within_two_to_the_minus_13[4095.9]"),
    ),
    Mutation(
        "59",
        "finite logits far below their maximum become -inf",
        edit(CODES, "v = tl.minimum(v, FARTHEST)", "v = v"),
        codes("test_infinities_nan_and_what_is_too_far_below"),
    ),
    Mutation(
        "59",
        "groups of columns are added up as if all had one maximum",
        edit(FOLD, "tl.sum(d_1 * rate_1, 0)", "tl.sum(d_1, 0)"),
        codes("test_cross_entropy[plain]"),
    ),
    Mutation(
        "59",
        "gradients take codes relative to their group for logits relative to their row",
        edit(CODES, "x = y + tl.reshape(shift, [BLOCK])", "x = y"),
        codes("test_cross_entropy[plain]"),
    ),
]
