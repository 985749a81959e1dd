"""``python -m sad``: the same as the ``sad`` command."""

from __future__ import annotations

import sys

from sad.cli import main

sys.exit(main())
