"""How bf16 weights follow their fp32 masters: rounded at random, so that steps smaller than a bf16 weight can show are not lost."""

from __future__ import annotations

import torch
from torch import Tensor


def rounded(master: Tensor, moment: Tensor | None) -> Tensor:
    """An fp32 master between two bf16 numbers as one of them, the upper with probability ``(master - lower) / (upper - lower)``.

    Its mean is the master; the nearest would stay where it began until the master moved by half of ``2^-8`` of it: a hundred
    steps of 1e-6 from a weight of 0.03. What bf16 can hold is left as it is. The chance is drawn from the sixteen lowest
    bits of the first moment, so that it costs nothing and is the same after a checkpoint; without a moment, or where it is 0,
    it is the nearest (Gupta et al. 2015, arXiv 1502.02551, section 3).
    """
    if moment is None:
        return master
    draw = moment.view(torch.int32).bitwise_and(0xFFFF).bitwise_xor_(0x8000)
    return draw.add_(master.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
