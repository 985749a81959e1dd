"""What a run asks of its machine, checked before anything is loaded or written."""

from __future__ import annotations

from sad_kernels._dispatch import choose_impl

from sad.config.schema import DistillConfig
from sad.environment import resolve_device
from sad.errors import UsageError
from sad.models.quantization import require_quantizer
from sad.report.trackers import require_installed


def check_machine(config: DistillConfig) -> None:
    """Raise ``UsageError`` for devices, kernels, trackers or quantizers that are not here."""
    for key, name in (("device", config.device), ("teacher_device", config.teacher_device)):
        if name is not None and resolve_device(name, key).type == "meta":
            raise UsageError(
                f"{key} must be a device that computes, got {name}; use auto, cpu or cuda"
            )
    device = resolve_device(config.device)
    try:
        choose_impl(config.impl, device.type, double=False)
    except (ValueError, ModuleNotFoundError) as error:
        raise UsageError(
            f"impl must be auto or torch on this machine, got {config.impl} for device {device}; "
            "leave the key out: Triton's kernels need a GPU"
        ) from error
    require_installed(config.report_to)
    require_quantizer(config)
