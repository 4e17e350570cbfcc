"""Rewards that stages name: a trained reward model, one that needs only its name, or a function of texts."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

from posttrain.models.load import load_reward
from posttrain.models.policy import Model
from posttrain.registry import load_object
from posttrain.rewards.base import Reward, from_function
from posttrain.rewards.comparing import comparison_reward
from posttrain.rewards.model import reward_model
from posttrain.rewards.named import REWARDS
from posttrain.stages import Context, Stage


def compares(reward: Stage | str) -> bool:
    """Whether a reward is ``module:function`` of (prompt, a, b): its scores are then probabilities to win."""
    return isinstance(reward, str) and ":" in reward and len(inspect.signature(load_object(reward)).parameters) == 3


def judge_dir(reward: Stage | str, ctx: Context) -> Path | None:
    """The directory of a reward model, None of a name or function."""
    if isinstance(reward, Stage):
        return ctx.inputs["reward"]
    return None if reward in REWARDS or ":" in reward else Path(reward)


def reward_of(reward: Stage | str, ctx: Context, *, dtype: torch.dtype, max_tokens: int) -> Reward:
    """The reward that a stage's field names; a reward model's scores are less the mean that it gave demonstrations."""
    place = judge_dir(reward, ctx)
    if place is not None:
        return scored_by(load_reward(str(place), dtype=dtype), place, max_tokens=max_tokens)
    if reward in REWARDS:
        return REWARDS[str(reward)]()
    function: Any = load_object(str(reward))
    return comparison_reward(function) if compares(reward) else from_function(function, function.__name__)


def scored_by(scorer: Model, judge: Path, *, max_tokens: int) -> Reward:
    """The reward of a model that is loaded from a directory, less the mean that it gave demonstrations."""
    mean = json.loads((judge / "reward.json").read_text())["mean"]
    return reward_model(scorer, mean=mean, max_tokens=max_tokens)
