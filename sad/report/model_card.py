"""The model card of an exported student, and its upload to the Hugging Face Hub.

The card names teacher, student and data, never where these lie on this machine: of a folder it says
the last part of the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sad.config.schema import DistillConfig
from sad.environment import library_versions, quiet_libraries
from sad.errors import with_type
from sad.metrics import format_metric, metric, table_metrics
from sad.report.header import layers_phrase


def model_card(
    config: DistillConfig, metrics: Mapping[str, float], facts: Mapping[str, Any]
) -> str:
    """A ``README.md`` in the Hub's form: what was distilled, on what, how, and its score.

    ``metrics`` are those of the evaluation that scored these weights, ``facts`` what ``sad.json``
    says of them.
    """
    from huggingface_hub import EvalResult, ModelCardData

    prefix = str(facts["metric"]).partition("/")[0]
    scores = {
        shown.name: metrics[f"{prefix}/{shown.name}"]
        for shown in table_metrics()
        if f"{prefix}/{shown.name}" in metrics
    }
    adapters = config.peft.enabled and not config.merge_adapters
    name = hub_name(config)
    data = ModelCardData(
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        base_model=_on_hub(config.student),
        base_model_relation="adapter" if adapters else "finetune",
        datasets=[source for source in config.data.train if _on_hub(source)] or None,
        tags=["distillation", "student-aware-distillation"],
        model_name=name.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_name="held-out text",
                dataset_type="text",
                metric_type=score,
                metric_name=metric(score).title,
                metric_value=float(value),
            )
            for score, value in scores.items()
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_text(config, scores, facts, name)}"


def hub_name(config: DistillConfig) -> str:
    """The repository on the Hub: ``hub_model_id``, or the name of the run's directory."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def push_to_hub(config: DistillConfig, folder: Path) -> str:
    """Upload an exported student; return a line that says where it is, or a warning.

    Nothing that goes wrong here is worth a finished run: the folder is still there.
    """
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        with quiet_libraries():
            repo = api.create_repo(hub_name(config), private=config.hub_private_repo, exist_ok=True)
            api.upload_folder(
                repo_id=repo.repo_id,
                folder_path=folder,
                commit_message="Upload the student that scored best",
            )
    except Exception as error:  # the network, a token, a name, a right: all sorts of errors
        return (
            f"warning: the student is not on the Hub, got {with_type(error)}; log in "
            f"with `hf auth login` and upload {folder}"
        )
    return f"hub      {repo}"


def _text(
    config: DistillConfig, scores: Mapping[str, float], facts: Mapping[str, Any], name: str
) -> str:
    objective = config.objective()
    teacher = _shown(config.teacher) if config.teacher else "none: trained on text alone"
    lines = {
        "Teacher": teacher,
        "Student": _student(config),
        "Data": ", ".join(map(_shown, config.data.train)),
        "Objective": f"{objective.ce_weight:g} cross-entropy + {objective.kd_weight:g} "
        f"{objective.divergence} at temperature {objective.temperature:g}",
        "Weights": ("averaged (EMA)" if facts["weights"] == "ema" else "of the last step")
        + f", after {facts['micro_step']:,} micro-batches of {facts['micro_batch_rows']} rows",
        "Rows": f"{config.max_length} tokens",
    }
    table = [f"| {label} | {text} |" for label, text in lines.items()]
    held_out = [
        f"| {metric(score).title} | {format_metric(score, value)} |"
        for score, value in scores.items()
    ]
    versions = library_versions()
    return "\n".join(
        [
            f"# {name.rpartition('/')[2]}",
            "",
            "Distilled with Student-Aware Distillation.",
            "",
            "| | |",
            "|-|-|",
            *table,
            "",
            "On held-out text:",
            "",
            "| | |",
            "|-|-|",
            *held_out,
            "",
            f"Made with transformers {versions['transformers']} and torch {versions['torch']}.",
            "",
        ]
    )


def _student(config: DistillConfig) -> str:
    match config.student_init:
        case "layers":
            return f"{layers_phrase(config)} of {_shown(config.student)}"
        case "random":
            return f"the configuration of {_shown(config.student)}, with random weights"
        case _:
            adapters = ", through LoRA adapters" if config.peft.enabled else ""
            return _shown(config.student) + adapters


def _on_hub(name: str) -> str | None:
    """``name`` if it can only be one on the Hub."""
    path = Path(name).expanduser()
    local = path.exists() or path.is_absolute() or name.startswith(".")
    return None if local or name.count("/") != 1 else name


def _shown(name: str) -> str:
    """A name on the Hub, or the last part of a path."""
    return _on_hub(name) or Path(name).name
