"""``python -m benchmarks.reward_kinds PROOF... --seeds 0 1 2``; seeds of 100 and more are pilots and are not kept."""

from __future__ import annotations

import argparse

from benchmarks.reward_kinds.proofs import PROOFS


def main() -> None:
    """Run proofs, one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("proofs", nargs="*", choices=[*PROOFS, []], default=list(PROOFS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    for seed in given.seeds:
        for name in given.proofs:
            PROOFS[name](seed)


if __name__ == "__main__":
    main()
