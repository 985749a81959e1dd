"""Faults of a whole run: what ends it needlessly or too late, what it exports, what it says."""

from __future__ import annotations

from mutations.planting import Mutation, edit, tests

EVALUATE = "sad/training/trainer.py"
EXPORT = "sad/checkpoint/run_directory.py"
REHEARSAL = "sad/training/rehearsal.py"
RUN = "sad/training/run.py"


def samples(*names: str) -> tuple[str, ...]:
    return tests("sad/training/test_samples.py", *names)


def rehearsal(*names: str) -> tuple[str, ...]:
    return tests("sad/training/test_rehearsal.py", *names)


def machine(*names: str) -> tuple[str, ...]:
    return tests("sad/training/test_machine.py", *names)


OWN_SETTINGS = "test_a_students_own_generation_settings_harm_no_run_and_survive_it"

MUTATIONS = [
    # --- What decorates a run --------------------------------------------------------------------
    Mutation(
        "80",
        "samples are made with the student's own generation settings",
        edit(
            "sad/training/samples.py",
            "            model.generation_config = _greedy(model, inputs.tokenizer.eos_token_id)\n",
            "",
        ),
        samples(f"{OWN_SETTINGS}[contrastive search]", f"{OWN_SETTINGS}[DoLa]"),
    ),
    Mutation(
        "80",
        "a tracker that fails is asked again and again",
        edit("sad/report/log.py", "            self._trackers.pop(package, None)\n", ""),
        tests(
            "sad/report/test_log.py",
            "test_a_tracker_that_fails_is_one_warning_and_dropped[log-ConnectionError]",
        ),
        error="ValueError",
        says="too many values",
    ),
    # --- What is found out late ------------------------------------------------------------------
    Mutation(
        "81",
        "a run with structural losses has no rehearsal",
        edit(RUN, "        if needs_rehearsal(config):\n", "        if False:\n"),
        rehearsal(
            "test_layers_with_other_windows_are_refused_with_a_pair_that_fits[False]",
            "test_projections_too_narrow_for_relations_are_refused",
            "test_whatever_a_later_phase_needs_is_tried",
        ),
        says="something took its time",
    ),
    Mutation(
        "81",
        "a rehearsal leaves the teacher's gates trainable",
        edit(REHEARSAL, "        teacher.requires_grad_(False)  # gates", "        pass  # gates"),
        rehearsal("test_a_rehearsal_leaves_no_trace[student_aware]"),
    ),
    Mutation(
        "49",
        "evaluations compute every structural loss",
        edit(EVALUATE, "        if not config.eval_all_losses:\n", "        if False:\n"),
        rehearsal("test_evaluation_computes_and_hooks_no_loss_that_has_no_weight_yet"),
    ),
    Mutation(
        "81",
        "what a student cannot save is found out at its first export",
        edit(RUN, "require_exportable(student.model, inputs.tokenizer))", "baseline)"),
        rehearsal("test_a_student_that_cannot_be_saved_again_is_not_trained[PreTrainedConfig]"),
        says="trained for nothing",
    ),
    Mutation(
        "81",
        "a machine is looked at when everything is loaded",
        edit(RUN, "    check_machine(config)\n", ""),
        machine(
            "test_what_is_not_here_is_refused_before_anything_is_loaded_or_written"
            "[{'report_to': ['wandb']}-report_to must name installed packages, got 'wandb']"
        ),
    ),
    Mutation(
        "81",
        "a teacher reads positions that it never learned",
        edit("sad/models/preflight.py", "known is not None and longest > known:\n", "False:\n"),
        machine("test_a_teacher_that_never_learned_a_rows_positions_is_refused"),
    ),
    # --- What is exported ------------------------------------------------------------------------
    Mutation(
        "82",
        "ids that a student suppresses are forgotten in its export",
        edit(EXPORT, "{*(settings.suppress_tokens or ()), *untrained}", "{*untrained}"),
        samples("test_untrained_ids_join_those_that_are_suppressed"),
    ),
    Mutation(
        "82",
        "an export has the dtype of training",
        edit(RUN, "        export_dtype=export_dtype(config),\n", ""),
        samples(
            "test_a_student_is_exported_in_the_dtype_in_which_it_came[False]",
            "test_a_student_is_exported_in_the_dtype_in_which_it_came[True]",
        ),
    ),
    Mutation(
        "82",
        "what a family keeps in fp32 is rounded in an export",
        edit(EXPORT, " or any(part in name for part in kept)", ""),
        samples("test_what_a_family_keeps_in_fp32_keeps_every_bit"),
    ),
    # --- Where a run stands ----------------------------------------------------------------------
    Mutation(
        "83",
        "a run that is stopped in its baseline names no checkpoint",
        edit(
            RUN,
            '            run_dir.write_status("running", checkpoint='
            'f"baseline/checkpoints/{newest}")\n',
            "            pass\n",
        ),
        machine(
            "test_the_status_names_the_checkpoint_of_the_phase_that_was_stopped[baseline]",
        ),
    ),
]
