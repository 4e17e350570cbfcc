"""A preference loss of one's own: ``python examples/new_loss.py --data pairs.jsonl --loss.limit 2``."""

import sys

from torch import Tensor
from torch.nn.functional import softplus

from posttrain.cli import main
from posttrain.losses import PairLogps, preference
from posttrain.losses.preference import margin


@preference.register("cautious", paper="none, an example", needs=("reference",))
def cautious(pairs: PairLogps, *, beta: float = 0.1, limit: float = 4.0) -> Tensor:
    """DPO whose margin counts up to a limit only: ``log(1 + exp(-min(beta D, limit)))``."""
    return softplus(-(beta * margin(pairs)).clamp(max=limit))


if __name__ == "__main__":
    sys.exit(main(["train", "cautious", *sys.argv[1:]]))
