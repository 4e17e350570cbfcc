"""Writing the aligned policy as a plain model directory."""

from __future__ import annotations

import torch

from posttrain.models.load import load_tokenizer, save_merged
from posttrain.stages import Context, Merge
from posttrain.work.reinforce import load_trained


def run(stage: Merge, ctx: Context) -> None:
    """Merge the policy's adapter into its base at full precision, and write weights, tokenizer and generation config."""
    base = str(ctx.inputs["base"])
    model = load_trained(ctx.inputs["policy"] / "policy", base, torch.float32)
    save_merged(model, base, ctx.dir, load_tokenizer(base))
