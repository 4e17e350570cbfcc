"""Stages of a recipe: what each reads, does and writes. Defaults are the numbers of the paper each stage names.

These files import no torch, so that a recipe can be listed and forecast at once; the work is in `posttrain.work`.
"""

from posttrain.stages.base import Context, Overlong, Plan, Recipe, Stage, stage_model
from posttrain.stages.checked import EvaluateTask, MixRewards
from posttrain.stages.closing import Evaluate, EvaluatePreference, EvaluateReward, HeldOut, MeasurePreference, Merge
from posttrain.stages.making import Generate, Label, MakePrompts, Select
from posttrain.stages.online import PreferOnline
from posttrain.stages.quark import EvaluateQuark, Quark
from posttrain.stages.refining import AutoRate, Converse, Patch, Refine
from posttrain.stages.reinforcing import Reinforce
from posttrain.stages.safety import EvaluateSafety, RedTeam, ReinforceSafely
from posttrain.stages.scoring import TrainEnsemble, TrainScorer
from posttrain.stages.training import SFT, Prefer, PreferLabelled, Pretrain, Training, TrainReward

__all__ = [
    "SFT",
    "AutoRate",
    "Context",
    "Converse",
    "Evaluate",
    "EvaluatePreference",
    "EvaluateQuark",
    "EvaluateReward",
    "EvaluateSafety",
    "EvaluateTask",
    "Generate",
    "HeldOut",
    "Label",
    "MakePrompts",
    "MeasurePreference",
    "Merge",
    "MixRewards",
    "Overlong",
    "Patch",
    "Plan",
    "Prefer",
    "PreferLabelled",
    "PreferOnline",
    "Pretrain",
    "Quark",
    "Recipe",
    "RedTeam",
    "Refine",
    "Reinforce",
    "ReinforceSafely",
    "Select",
    "Stage",
    "TrainEnsemble",
    "TrainReward",
    "TrainScorer",
    "Training",
    "stage_model",
]
