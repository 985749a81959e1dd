"""The configuration of a run: keys, types, ranges, files and command line."""

from sad.config.identity import config_hash, flatten, trajectory_changes
from sad.config.schema import DistillConfig, ce_only, config_to_dict, config_to_yaml
from sad.config.sections import DataConfig
from sad.config.values import ConfigError

__all__ = [
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "ce_only",
    "config_hash",
    "config_to_dict",
    "config_to_yaml",
    "flatten",
    "trajectory_changes",
]
