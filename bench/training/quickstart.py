"""The quickstart's result table over several seeds: what distillation gains over CE only."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from typing import Any

from sad.config.load import load_config
from sad.metrics import table_metrics
from sad.training.run import distill


def measure(seeds: tuple[int, ...] = (0, 1, 2), recipe: str = "quickstart") -> dict[str, Any]:
    """Mean and per-seed values of every metric of the table."""
    runs = [_run(recipe, seed) for seed in seeds]
    table = []
    for i, row in enumerate(runs[0]["results"]):
        names = [column.name for column in table_metrics() if row[column.name] is not None]
        values = {name: [run["results"][i][name] for run in runs] for name in names}
        table.append(
            {"name": row["name"], "parameters": row["parameters"]}
            | {m: {"mean": statistics.fmean(v), "seeds": v} for m, v in values.items()}
        )
    return {
        "case": recipe.replace("-", "_"),
        "seeds": list(seeds),
        "table": table,
        "seconds": [run["seconds"] for run in runs],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _run(recipe: str, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(recipe, ("--output_dir", folder, "--seed", str(seed)))
        begin = time.perf_counter()
        results = distill(config).results
        return {"results": results, "seconds": time.perf_counter() - begin}
