"""``python -m benchmarks.preference run PLAN | effects | page``: runs go on where they were stopped."""

from __future__ import annotations

import sys


def main() -> None:
    """Choose what to do by the first word."""
    words = sys.argv[1:]
    if not words or words[0] not in ("run", "effects", "page"):
        raise SystemExit(__doc__)
    from posttrain.machine import deterministic_kernels

    deterministic_kernels()
    if words[0] == "run":
        from benchmarks.preference.table import main as run

        run(words[1:])
    elif words[0] == "effects":
        from benchmarks.preference.effects import main as effects

        effects(words[1:])
    else:
        from benchmarks.preference.page import main as page

        page()


main()
