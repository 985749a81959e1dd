#!/usr/bin/env bash
# Install if need be, then distil the bundled quickstart. Run again, it goes on where it stopped.
# Arguments go to `sad distill`, for example: ./scripts/quickstart.sh --output_dir runs/mine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh report,data
exec .venv/bin/sad distill quickstart --resume_from_checkpoint auto "$@"
