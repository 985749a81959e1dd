"""Faults of the trainer: windows, averages, learning rates, resumption, files, skipped updates."""

from __future__ import annotations

from mutations.planting import Mutation, edit, tests

ACCUMULATE = "sad/accumulate.py"
CHECKPOINT = "sad/checkpoint/store.py"
EMA = "sad/ema.py"
EVALUATE = "sad/training/evaluate.py"
FILES = "sad/checkpoint/atomic_files.py"
PARTS = "sad/checkpoint/parts.py"
OPTIMIZER = "sad/optim/optimizer.py"
PRECISION = "sad/optim/precision.py"
RESUME = "sad/training/resume.py"
SCHEDULE = "sad/optim/schedule.py"
SELFTEST = "sad/selftest.py"
STATE = "sad/checkpoint/state.py"
TRAINING = "sad/training/trainer.py"


def training(*names: str) -> tuple[str, ...]:
    return tests("sad/training/test_trainer.py", *names)


def resuming(*names: str) -> tuple[str, ...]:
    return tests("sad/training/test_resume.py", *names)


def structural(*names: str) -> tuple[str, ...]:
    return tests("sad/losses/test_structural.py", *names)


ANY_STOP = training("test_a_stop_after_any_micro_batch_changes_no_bit")
ANY_SPLIT = training("test_one_micro_batch_or_eight_give_one_gradient")
LAST_GRADIENT = training(
    "test_a_non_finite_gradient_changes_nothing_and_three_stop_the_run[precision0]",
    "test_a_non_finite_gradient_changes_nothing_and_three_stop_the_run[precision1]",
)

MUTATIONS = [
    # --- Windows ---------------------------------------------------------------------------------
    Mutation(
        "14",
        "each micro-batch is divided by its own targets",
        edit(
            TRAINING,
            "self.student(batch, teacher, self.objective(weights), counts, weights)",
            "self.student(batch, teacher, self.objective(weights), batch.counts, weights)",
        ),
        ANY_SPLIT,
    ),
    Mutation(
        "14",
        "gradients are averaged over the micro-batches of a window once more",
        edit(
            TRAINING,
            "self.precision.backward(result.loss)",
            "self.precision.backward(result.loss / accumulator.size)",
        ),
        ANY_SPLIT,
    ),
    Mutation(
        "14",
        "the student divides by the targets of its batch, whatever it is told",
        edit(
            "sad/training/student.py",
            "num_items = max(counts.targets, 1)",
            "num_items = max(batch.num_targets, 1)",
        ),
        training("test_every_split_of_a_batch_gives_the_same_gradient"),
    ),
    Mutation(
        "38",
        "a short last window is divided as if it were whole",
        edit(
            TRAINING,
            "        counts = self.batches.counts(window)\n",
            "        counts = self.batches.counts(window)\n"
            "        whole = counts.targets * accumulator.accumulation_steps // window.size\n"
            "        counts = counts._replace(targets=whole)\n",
        ),
        ANY_SPLIT,
    ),
    Mutation(
        "38",
        "a short last window never closes",
        edit(
            ACCUMULATE,
            "self._position + 1 == self._size",
            "self._position + 1 == self.accumulation_steps",
        ),
        tests(
            "sad/test_accumulate.py",
            "test_100_batches_by_8_are_13_windows_the_last_with_4",
            "test_an_epoch_has_one_update_per_window[9-8]",
        )
        + training("test_100_batches_are_100_scheduler_steps_and_13_updates"),
    ),
    Mutation(
        "38",
        "the last window is planned as large as the others",
        edit(SCHEDULE, "min(self.accumulation_steps, left)", "self.accumulation_steps"),
        tests("sad/optim/test_schedule.py", "test_100_batches_by_8_are_13_windows"),
    ),
    # --- Evaluation ------------------------------------------------------------------------------
    Mutation(
        "25",
        "evaluation averages the means of its batches",
        edit(
            "sad/training/meters.py",
            "[part.double() for part in parts])\n        self._sums = sums if",
            "[part.double() / out.num_tokens for part in parts])\n        self._sums = sums if",
        ),
        training("test_evaluation_gives_the_figures_of_training"),
    ),
    Mutation(
        "25",
        "evaluation runs with dropout",
        edit("sad/models/heads.py", "    model.eval()\n    try:\n", "    try:\n"),
        training("test_evaluation_gives_the_figures_of_training"),
    ),
    Mutation(
        "25",
        "a teacher whose gates train is scored by hidden states from before",
        edit(
            "sad/config/schema.py",
            'shared = self.routing.mode == "teacher" and not self.structural_weights',
            "shared = not self.structural_weights",
        ),
        tests(
            "sad/training/test_evaluate.py",
            "test_a_teacher_that_changes_or_is_looked_into_runs_each_time[gates that train]",
        ),
    ),
    Mutation(
        "25",
        "rows of the same tokens share hidden states wherever their documents begin",
        edit(
            "sad/teachers/eval_teacher.py",
            "for tensor in (batch.input_ids, batch.position_ids):",
            "for tensor in (batch.input_ids,):",
        ),
        tests(
            "sad/teachers/test_eval_teacher.py",
            "test_whatever_the_teacher_reads_tells_batches_apart[part0]",
        ),
    ),
    Mutation(
        "26",
        "the self-test passes a NaN",
        edit(SELFTEST, "self.error <= self.budget", "not self.error > self.budget"),
        tests(
            "sad/test_selftest.py",
            "test_a_planted_fault_is_caught[cross_entropy-nan_in_ignored_rows]",
        ),
    ),
    Mutation(
        "26",
        "the self-test compares the kernels with themselves",
        edit(
            SELFTEST,
            "oracle = _results(check, reference, ",
            "oracle = _results(check, sad_kernels, ",
        ),
        tests(
            "sad/test_selftest.py",
            "test_a_planted_fault_is_caught[cross_entropy-wrong_value]",
            "test_a_planted_fault_is_caught[kl_div-wrong_gradient]",
        ),
    ),
    Mutation(
        "26",
        "the self-test looks at losses only, not at gradients",
        edit(SELFTEST, "if v.grad is not None}", "if False}"),
        tests(
            "sad/test_selftest.py",
            "test_a_planted_fault_is_caught[linear_cross_entropy-wrong_gradient]",
        ),
    ),
    # --- The moving average ----------------------------------------------------------------------
    Mutation(
        "35",
        "the average is kept in bf16",
        edit(
            EMA,
            "        self._num_updates += 1 if ok is None else ok\n",
            "        for shadow in self._shadows.values():\n"
            "            shadow.copy_(shadow.bfloat16())\n"
            "        self._num_updates += 1 if ok is None else ok\n",
        ),
        tests("sad/test_model_ema.py", "test_bf16_parameters_move_the_average"),
    ),
    Mutation(
        "36",
        "every name of a tied weight is averaged",
        edit(
            EMA,
            "{name: p for name, p in model.named_parameters() if p.requires_grad}",
            "{name: p for name, p in model.state_dict(keep_vars=True).items() if p.requires_grad}",
        ),
        tests("sad/test_model_ema.py", "test_tied_weights_are_averaged_once"),
    ),
    Mutation(
        "37",
        "average and weights change places by way of copies, rounded to the other's dtype",
        edit(
            EMA,
            "    def _swap_in(self) -> None:\n        ema_swap_(*self._exchanged())\n",
            "    def _swap_in(self) -> None:\n"
            "        for shadow, live in zip(*self._exchanged(), strict=True):\n"
            "            kept = live.detach().clone()\n"
            "            live.detach().copy_(shadow)\n"
            "            shadow.copy_(kept)\n",
        )
        + edit(
            EMA,
            "    def _swap_out(self) -> None:\n        ema_swap_(*self._exchanged())\n",
            "    def _swap_out(self) -> None:\n"
            "        for shadow, live in zip(*self._exchanged(), strict=True):\n"
            "            kept = live.detach().clone()\n"
            "            live.detach().copy_(shadow)\n"
            "            shadow.copy_(kept)\n",
        ),
        tests(
            "sad/test_model_ema.py",
            "test_swapped_model_is_the_rounded_average_and_comes_back[dtype1]",
            "test_exceptions_restore_every_bit[dtype1-ValueError]",
        ),
    ),
    Mutation(
        "37",
        "an exception during evaluation leaves the average in the model",
        edit(
            EMA,
            "        finally:\n            guard.remove()\n            self._swap_out()\n",
            "        finally:\n            guard.remove()\n"
            "        if True:\n            self._swap_out()\n",
        ),
        tests(
            "sad/test_model_ema.py",
            "test_exceptions_restore_every_bit[dtype0-ValueError]",
            "test_exceptions_restore_every_bit[dtype1-KeyboardInterrupt]",
        ),
    ),
    Mutation(
        "37",
        "the average starts anew on resumption",
        edit(
            EMA,
            "            shadow.copy_(read_like(saved, name, shadow))\n",
            "            pass\n",
        ),
        ANY_STOP,
    ),
    # --- Learning rates --------------------------------------------------------------------------
    Mutation(
        "39",
        "a schedule in micro-batches is stepped once per window",
        edit(
            TRAINING,
            'if closes or self.config.scheduler_unit == "batch":',
            "if closes:",
        ),
        training("test_100_batches_are_100_scheduler_steps_and_13_updates"),
    ),
    Mutation(
        "39",
        "a schedule in micro-batches ends after as many of them as there are windows",
        edit(
            SCHEDULE,
            "length = run_length.steps(config.scheduler_unit)",
            "length = run_length.windows",
        ),
        tests(
            "sad/optim/test_schedule.py",
            "test_100_batches_are_100_scheduler_steps[linear-8-()]",
            "test_100_batches_are_100_scheduler_steps[cosine-8-()]",
        ),
    ),
    Mutation(
        "39",
        "a warm-up given in windows is counted in micro-batches",
        edit(SCHEDULE, "int(steps) * run_length.accumulation_steps", "int(steps)"),
        tests(
            "sad/optim/test_schedule.py",
            "test_warmup_is_held_in_micro_batches[{'warmup_steps': 3}-24]",
        ),
    ),
    Mutation(
        "39",
        "a skipped update holds the schedule up",
        edit(
            TRAINING,
            'if closes or self.config.scheduler_unit == "batch":',
            "if self.meter.grad_norm.isfinite():",
        ),
        LAST_GRADIENT,
    ),
    # --- Resumption ------------------------------------------------------------------------------
    Mutation(
        "40",
        "numbers are drawn after the generators were restored",
        edit(
            "sad/training/state.py",
            "    if missing:\n",
            '    __import__("torch").rand(trainer.counters.micro_step)\n    if missing:\n',
        ),
        ANY_STOP,
    ),
    Mutation(
        "40",
        "the generators are not restored",
        edit(STATE, '    torch.set_rng_state(saved["torch"].clone())\n', ""),
        ANY_STOP,
    ),
    Mutation(
        "40",
        "the generators are restored when their turn comes, before other parts",
        edit(PARTS, "    restored_last = True", "    restored_last = False"),
        tests("sad/checkpoint/test_parts.py", "test_generators_are_restored_after_all_others"),
    ),
    Mutation(
        "40",
        "gradients of an unfinished window are lost",
        edit(
            PARTS,
            "        load_gradients(self._parameters, saved.tensors[self._group])\n",
            "        pass\n",
        ),
        ANY_STOP,
    ),
    Mutation(
        "41",
        "the order of the rows depends on where the process began",
        edit(
            "sad/training/batches.py",
            "    def row_numbers(self, micro_step: int) -> np.ndarray:\n",
            "    def row_numbers(self, micro_step: int) -> np.ndarray:\n"
            "        self._seed += micro_step * (self._order is None)\n",
        ),
        training("test_rows_come_once_per_epoch_of_a_resumed_run") + ANY_STOP,
    ),
    Mutation(
        "41",
        "a row may come twice in an epoch",
        edit(
            "sad/data/rows.py",
            'return np.argsort(z, kind="stable")',
            "return (z % np.uint64(num_rows))",
        ),
        tests("sad/data/test_rows.py", "TestRowOrder::test_each_row_once_per_epoch[1000]"),
    ),
    # --- Files -----------------------------------------------------------------------------------
    Mutation(
        "42",
        "a checkpoint is renamed onto one that is there",
        edit(
            FILES,
            "        OPERATIONS.rename(final, aside)\n    try:\n",
            "        pass\n    try:\n",
        ),
        tests(
            "sad/checkpoint/test_store.py", "test_an_equal_checkpoint_is_kept_and_another_replaced"
        ),
        error="CheckpointError",
    ),
    Mutation(
        "42",
        "a checkpoint that is there is removed before its successor arrives",
        edit(
            FILES,
            "        OPERATIONS.rename(final, aside)\n    try:\n",
            "        remove_tree(final)\n    try:\n",
        ),
        tests(
            "sad/checkpoint/test_store.py",
            "test_no_fault_costs_a_complete_checkpoint[ENOSPC-True-again]",
            "test_no_fault_costs_a_complete_checkpoint[exit before-False-again]",
        ),
    ),
    Mutation(
        "42",
        "a checkpoint's files arrive under its name one by one",
        edit(
            FILES,
            "        OPERATIONS.rename(tmp, final)\n    except OSError:\n",
            "        OPERATIONS.mkdir(final)\n"
            "        for child in sorted(tmp.iterdir()):\n"
            "            OPERATIONS.rename(child, final / child.name)\n"
            "    except OSError:\n",
        ),
        tests(
            "sad/checkpoint/test_store.py",
            "test_no_fault_costs_a_complete_checkpoint[exit before-False-first]",
            "test_no_fault_costs_a_complete_checkpoint[EIO-False-third]",
        ),
    ),
    Mutation(
        "42",
        "older checkpoints go before the new one has its name",
        edit(
            CHECKPOINT,
            "        if not is_same(tmp, target):\n",
            "        for old in _newest_first(target.parent)[save_total_limit - 1 :]:\n"
            "            files.discard(old)\n"
            "        if not is_same(tmp, target):\n",
        ),
        tests(
            "sad/checkpoint/test_store.py",
            "test_no_fault_costs_a_complete_checkpoint[ENOSPC-False-third]",
        ),
    ),
    Mutation(
        "42",
        "files are not forced to disk before they get their name",
        edit(
            FILES,
            "            _write_all(fd, memoryview(chunk))\n        OPERATIONS.fsync(fd)\n",
            "            _write_all(fd, memoryview(chunk))\n",
        )
        + edit(FILES, "    sync_tree(tmp)\n", ""),
        tests(
            "sad/checkpoint/test_store.py",
            "test_a_power_cut_at_any_moment_leaves_the_old_or_the_new[first]",
            "test_a_power_cut_at_any_moment_leaves_the_old_or_the_new[again]",
        )
        + tests(
            "sad/checkpoint/test_atomic_files.py",
            "test_write_atomic_survives_a_power_cut_at_any_moment",
        ),
    ),
    Mutation(
        "42",
        "a name is not forced to disk before older checkpoints go",
        edit(
            FILES,
            "    sync_directory(final.parent)\n    if aside",
            "    if aside",
        ),
        tests(
            "sad/checkpoint/test_store.py",
            "test_a_power_cut_at_any_moment_leaves_the_old_or_the_new[third]",
            "test_a_power_cut_at_any_moment_leaves_the_old_or_the_new[again]",
        ),
    ),
    # --- Updates that must not happen ------------------------------------------------------------
    Mutation(
        "43",
        "an update is applied whatever its gradient is",
        edit(
            PRECISION,
            "ok = can_update(optimizer, norm, max_grad_norm)",
            "ok = torch.ones_like(norm, dtype=torch.bool)",
        ),
        tests(
            "sad/optim/test_precision.py",
            "test_a_step_with_a_bad_gradient_leaves_every_bit[fp32-True-nan]",
            "test_a_step_with_a_bad_gradient_leaves_every_bit[bf16-False-inf]",
        )
        + LAST_GRADIENT,
    ),
    Mutation(
        "43",
        "an update is applied whatever its learning rate is",
        edit(PRECISION, "ok = can_update(optimizer, norm, max_grad_norm)", "ok = norm.isfinite()"),
        tests(
            "sad/optim/test_precision.py",
            "test_a_step_that_would_overflow_leaves_every_bit[fp32-1e+38]",
            "test_a_step_that_would_overflow_leaves_every_bit[masters-nan]",
        ),
    ),
    Mutation(
        "43",
        "the average takes a skipped update for one",
        edit(TRAINING, "self.ema.update(update.ok)", "self.ema.update()"),
        LAST_GRADIENT,
    ),
    Mutation(
        "43",
        "a fused optimizer is not told of a bad gradient",
        edit(OPTIMIZER, '"found_inf": (~ok).float()', '"found_inf": torch.zeros_like(ok).float()'),
        tests(
            "sad/optim/test_optimizer.py",
            "test_a_skipped_update_changes_no_bit[fused AdamW-nan]",
            "test_a_skipped_update_changes_no_bit[fused AdamW-inf]",
        ),
    ),
    Mutation(
        "46",
        "attention maps are soft-maxed twice",
        edit(
            "sad/losses/attention.py",
            "return scores.masked_fill(~mask, -torch.inf).log_softmax(-1)",
            "return scores.masked_fill(~mask, -torch.inf).softmax(-1).log_softmax(-1)",
        ),
        tests(
            "sad/losses/test_attention.py",
            "test_rows_of_maps_are_distributions_over_visible_keys"
            "[Case(student=(2, 2), teacher=(4, 4), window=None, softcap=None, block=3)]",
        ),
    ),
    Mutation(
        "47",
        "a structural term is divided by the units of its micro-batch",
        edit(
            "sad/training/student.py",
            "count = max(getattr(counts, self._unit_of(name)), 1)",
            "count = max(getattr(batch.counts, self._unit_of(name)), 1)",
        ),
        structural("test_the_split_of_a_window_does_not_matter"),
    ),
    Mutation(
        "48",
        "projectors and queues are saved and not restored",
        edit(
            PARTS,
            "        self._view().load_state_dict(saved)\n",
            '        if self._group != "structure":\n'
            "            self._view().load_state_dict(saved)\n",
        ),
        structural("test_a_stop_after_any_micro_batch_changes_no_bit"),
    ),
    Mutation(
        "48",
        "the teacher's gates start anew after a stop",
        edit(
            "sad/teachers/policy.py",
            "self.router.load_state_dict(state)",
            "pass",
        ),
        structural("test_routing_survives_a_stop[student_aware]"),
    ),
    Mutation(
        "49",
        "a structural loss of weight 0 is computed all the same",
        edit(
            "sad/losses/structural.py",
            "return tuple(name for name in self.losses if of_losses.get(name, 0.0) > 0)",
            "return tuple(self.losses)",
        ),
        structural(
            "test_a_loss_that_is_off_is_not_computed", "test_without_weights_nothing_is_kept"
        ),
    ),
    Mutation(
        "52",
        "the configuration imports torch",
        edit("sad/config/schema.py", "import yaml\n", "import torch\nimport yaml\n"),
        tests("sad/test_cli.py", "test_words_that_need_no_model_import_nothing_heavy"),
    ),
    Mutation(
        "52",
        "a device is looked up in torch whatever it is",
        edit(
            "sad/config/schema.py",
            "return True  # without torch, whose import takes seconds\n",
            "pass\n",
        ),
        tests("sad/config/test_config.py", "test_the_usual_devices_are_taken_without_torch"),
        error="ModuleNotFoundError",
    ),
    # --- Runs that go on with another configuration ----------------------------------------------
    Mutation(
        "60",
        "a position is not counted in the new micro-batches",
        edit(RESUME, "    return int(position)\n", "    return saved.micro_step\n"),
        resuming(
            "test_another_split_of_windows_goes_on_with_the_same_rows_to_the_same_end[(8, 2)]",
            "test_another_split_of_windows_goes_on_with_the_same_rows_to_the_same_end[(2, 8)]",
            "test_checkpoints_that_count_other_micro_batches_are_set_aside",
        ),
    ),
    Mutation(
        "60",
        "rows that are no whole number of micro-batches are rounded down",
        edit(RESUME, "if position.denominator > 1:", "if False:"),
        resuming("test_rows_that_are_no_whole_number_of_micro_batches_are_refused"),
    ),
    Mutation(
        "60",
        "half a window goes on in one of another size",
        edit(RESUME, "        _require_same_window(moved, length)\n", "        pass\n"),
        resuming("test_inside_a_window_sizes_must_stay"),
        error="ValueError",  # the counter of micro-batches, in the place of one line
    ),
    Mutation(
        "60",
        "gradients go on at another scale",
        edit(RESUME, "    _require_same_precision(saved)\n    if", "    if"),
        resuming("test_precision_must_stay_inside_a_window"),
    ),
    Mutation(
        "60",
        "a window that begins in its middle has the size of a whole one",
        edit(SCHEDULE, "late = begins - first if first < begins <= micro_step else 0", "late = 0"),
        resuming(
            "test_other_windows_begin_where_the_checkpoint_is",
            "test_a_longer_run_takes_every_row_once_an_epoch",
        ),
    ),
    Mutation(
        "60",
        "a shorter run ends before its checkpoint",
        edit(RESUME, "if micro_step > length.micro_batches:", "if False:"),
        resuming("test_a_run_that_is_shorter_than_its_checkpoint_is_refused"),
        error="ValueError",
    ),
    Mutation(
        "60",
        "a finished baseline stays shorter than its student",
        edit(
            "sad/training/run.py",
            "return not any(key in LENGTH for key, _, _ in trajectory_changes(before, config))",
            "return True",
        ),
        resuming("test_a_baseline_is_as_long_as_the_student"),
    ),
    Mutation(
        "60",
        "checkpoints of the old numbering stay beside the new",
        edit(TRAINING, "set_aside(overtaken(ours, resumption), warn))", "None)"),
        resuming("test_checkpoints_that_count_other_micro_batches_are_set_aside"),
    ),
    Mutation(
        "39",
        "a scheduler stays where it was, whatever it counts now",
        edit(
            "sad/training/state.py",
            "move_scheduler(trainer.scheduler, scheduler_steps(resumption, trainer.config))",
            "pass",
        ),
        resuming(
            "test_another_unit_of_the_scheduler[batch]",
            "test_another_unit_of_the_scheduler[optimizer_step]",
            "test_another_split_of_windows_goes_on_with_the_same_rows_to_the_same_end[(2, 8)]",
        ),
    ),
    Mutation(
        "61",
        "an average that is switched on starts at the initial weights",
        edit(
            "sad/training/state.py",
            "                ema.restart()\n",
            "                pass\n",
        ),
        resuming("test_an_average_that_is_switched_on_starts_at_the_resumed_weights"),
    ),
    # --- Numbers that are not finite -------------------------------------------------------------
    Mutation(
        "62",
        "skipped updates are counted and stop nothing",
        edit(
            TRAINING,
            "            if closed and self.watch.in_a_row >= self.config.max_nonfinite_steps:\n",
            "            if False:\n",
        ),
        training("test_three_skips_in_a_row_stop_the_run_before_the_next_log_line"),
    ),
    Mutation(
        "62",
        "a run that ends before it hears of its last updates is finished",
        edit(TRAINING, "if self.watch.last() >= self.config.max_nonfinite_steps:", "if False:"),
        training("test_skips_that_are_heard_of_late_still_stop_the_run"),
    ),
    Mutation(
        "62",
        "a run whose evaluation is NaN is finished",
        edit(
            TRAINING,
            "        _require_scores(metrics, variants, counters.micro_step)\n",
            "",
        ),
        training(
            "test_an_evaluation_that_is_no_number_ends_the_run[nan]",
            "test_an_evaluation_that_is_no_number_ends_the_run[inf]",
        ),
    ),
    Mutation(
        "62",
        "a teacher of NaN is learned from",
        edit(
            "sad/training/teacher_score.py",
            '        require_finite_score(metrics, "eval_teacher", "the teacher")\n',
            "",
        ),
        training("test_a_teacher_without_a_finite_score_is_refused_at_the_start"),
    ),
    Mutation(
        "62",
        "a loss is multiplied in float32",
        edit("sad/training/meters.py", "out.loss.detach().double() *", "out.loss.detach() *"),
        training("test_a_loss_past_float32_is_shown_as_what_it_is"),
    ),
    Mutation(
        "62",
        "infinity times a weight of 0",
        edit(TRAINING, "for name, w in parts.items() if w)", "for name, w in parts.items())"),
        training("test_an_infinite_part_without_a_weight_is_no_part_of_the_held_out_loss"),
    ),
    Mutation(
        "62",
        "embedding and head are not looked at",
        edit("sad/models/preflight.py", "    require_finite_tables(model)\n    with", "    with"),
        tests(
            "sad/models/test_preflight.py",
            "test_a_damaged_row_is_called_by_its_name_though_no_token_is_in_it"
            "[embed-input embedding]",
            "test_a_damaged_row_is_called_by_its_name_though_no_token_is_in_it[head-head]",
        ),
    ),
    Mutation(
        "62",
        "the student is probed in another dtype than it is trained in",
        edit("sad/models/preflight.py", "    with autocast():\n", "    with nullcontext():\n"),
        tests(
            "sad/models/test_preflight.py",
            "test_a_student_that_overflows_under_autocast_is_told_so",
        ),
    ),
    # --- Pairs -----------------------------------------------------------------------------------
    Mutation(
        "63",
        "the student's own tokenizer is not compared",
        edit(
            "sad/training/inputs.py",
            '    if config.tokenizer is None or config.student_init != "pretrained":\n',
            "    if config.tokenizer is not None:\n",
        ),
        tests(
            "sad/training/test_inputs.py",
            "test_the_students_own_tokenizer_is_compared_too",
            "test_special_tokens_are_those_of_the_key_tokenizer",
        ),
    ),
    Mutation(
        "64",
        "the auxiliary loss is computed and left out of the gradient",
        edit(
            "sad/training/student.py",
            "structural | {BALANCE: self.balance.coef}",
            "structural",
        ),
        tests(
            "sad/losses/test_balance.py",
            "test_the_gradient_of_a_window_has_it[False]",
            "test_the_gradient_of_a_window_has_it[True]",
        ),
    ),
    Mutation(
        "64",
        "padding counts for the balance",
        edit(
            "sad/losses/balance.py",
            "self._loss(router_logits, *self._experts, mask)",
            "self._loss(router_logits, *self._experts, torch.ones_like(mask))",
        ),
        tests("sad/losses/test_balance.py", "test_padding_does_not_count"),
    ),
]
