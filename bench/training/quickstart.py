"""What distillation gains in the quickstart: its result table over several seeds."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from typing import Any

from sad.config.load import load_config
from sad.metrics import table_metrics
from sad.training.run import distill


def measure(seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """The table's rows for each seed, and mean and spread of each metric."""
    runs = [_run(seed) for seed in seeds]
    table = []
    for i, row in enumerate(runs[0]["results"]):
        names = [column.name for column in table_metrics() if row[column.name] is not None]
        values = {name: [run["results"][i][name] for run in runs] for name in names}
        table.append(
            {"name": row["name"], "parameters": row["parameters"]}
            | {m: {"mean": statistics.fmean(v), "seeds": v} for m, v in values.items()}
        )
    return {
        "case": "quickstart",
        "seeds": list(seeds),
        "table": table,
        "seconds": [run["seconds"] for run in runs],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _run(seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("quickstart", ("--output_dir", folder, "--seed", str(seed)))
        begin = time.perf_counter()
        results = distill(config).results
        return {"results": results, "seconds": time.perf_counter() - begin}
