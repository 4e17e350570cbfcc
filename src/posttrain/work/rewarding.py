"""Rewards that stages name: a trained reward model, one that needs only its name, or a function of texts."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posttrain.models.load import load_reward, load_tokenizer
from posttrain.models.policy import Model
from posttrain.registry import load_object
from posttrain.rewards.base import Reward, from_function
from posttrain.rewards.comparing import comparison_reward
from posttrain.rewards.model import reward_model
from posttrain.rewards.named import REWARDS
from posttrain.rewards.panel import load_panel, panel_reward
from posttrain.stages import Context, Stage
from posttrain.work.mix_rewards import MIX, mixed

LONG = 1 << 20  # tokens: nothing is cut to be scored
_PROBE = [{"role": "user", "content": "What's 12 + 30, exactly?"}]


def compares(reward: Stage | str) -> bool:
    """Whether a reward is ``module:function`` of (prompt, a, b): its scores are then probabilities to win."""
    return isinstance(reward, str) and ":" in reward and len(inspect.signature(load_object(reward)).parameters) == 3


def judge_dir(reward: Stage | str, ctx: Context) -> Path | None:
    """The directory of a reward model, None of a name or function."""
    if isinstance(reward, Stage):
        return ctx.inputs["reward"]
    return None if reward in REWARDS or ":" in reward else Path(reward)


def reward_of(
    reward: Stage | str, ctx: Context, *, dtype: torch.dtype, max_tokens: int, tokenizer: Any = None
) -> Reward:
    """The reward that a stage's field names; a reward model's scores are less the mean that it gave demonstrations.

    ``tokenizer`` is that of the sampled ids, None where they are the reward model's own. A model of other tokens, or whose
    score is not one output of the answer alone, reads the text.
    """
    place = judge_dir(reward, ctx)
    if place is not None and record_of(place)["form"] == MIX:
        return mixed(place, partial(reward_of, ctx=ctx, dtype=dtype, max_tokens=max_tokens, tokenizer=tokenizer))
    if place is not None and not reads_ids(place, tokenizer):
        return panel_reward(load_panel(str(place), dtype=dtype, max_length=LONG, max_tokens=max_tokens))
    if place is not None:
        return scored_by(load_reward(str(place), dtype=dtype), place, max_tokens=max_tokens)
    if reward in REWARDS:
        return REWARDS[str(reward)]()
    function: Any = load_object(str(reward))
    return comparison_reward(function) if compares(reward) else from_function(function, function.__name__)


def reads_ids(judge: Path, tokenizer: Any) -> bool:
    """Whether a reward model scores sampled ids as they are: one output, higher for better, of tokens that are its own."""
    record = record_of(judge)
    return record["form"] == "responses" and record["sign"] > 0 and reads_alike(judge, tokenizer)


def network_of(judge: Path, tokenizer: Any, dtype: torch.dtype) -> Model | None:
    """A reward model's network, where a critic can stand on it: of one output an answer, and the policy's own tokens."""
    form = record_of(judge)["form"]
    if form not in ("responses", "domains") or not reads_alike(judge, tokenizer):
        return None
    return load_reward(str(judge), dtype=dtype, form=form)


def record_of(judge: Path) -> dict[str, Any]:
    """What a reward model's directory says of it."""
    return {"form": "responses", "sign": 1} | json.loads((judge / "reward.json").read_text())


def reads_alike(judge: Path, tokenizer: Any) -> bool:
    """Whether a reward model turns conversations into the ids that a tokenizer does (None: its own)."""
    if tokenizer is None:
        return True
    own = load_tokenizer(str(judge))
    ids = [t.apply_chat_template(_PROBE, add_generation_prompt=True, return_dict=False) for t in (own, tokenizer)]
    return own.get_vocab() == tokenizer.get_vocab() and ids[0] == ids[1]


def scored_by(scorer: Model, judge: Path, *, max_tokens: int) -> Reward:
    """The reward of a model that is loaded from a directory, less the mean that it gave demonstrations, over its temperature."""
    record = {"temperature": 1.0} | json.loads((judge / "reward.json").read_text())
    return reward_model(scorer, mean=record["mean"], temperature=record["temperature"], max_tokens=max_tokens)
