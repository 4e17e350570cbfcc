"""Names to functions, only where a string arrives (command line, JSON); Python callers pass functions."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from posttrain.errors import ConfigError, suggest

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Mapping[str, Any]):
    """A read-only mapping from name to object; values may be import strings ``pkg.mod:name`` that load on first use.

    Args:
        kind: what it holds, for error messages ("recipe", "preference loss").
        lazy: names to import strings, so that listing imports nothing.
        ambiguous: names that mean several things, to the candidates; asking for one is an error that lists them.
        data: what its functions learn from, for lists ("pairs").
    """

    def __init__(
        self,
        kind: str,
        lazy: dict[str, str] | None = None,
        ambiguous: Mapping[str, str] | None = None,
        data: str = "",
    ) -> None:
        self.kind, self.data = kind, data
        self._ambiguous = dict(ambiguous or {})
        self._items: dict[str, Any] = dict(lazy or {})
        self._facts: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Return a decorator that adds a function under ``name``, with facts about it; a name registered twice is an error."""

        def add(item: T) -> T:
            if name in self._items:
                raise ConfigError(f"{self.kind} '{name}' is registered twice; give the second one another name")
            self._items[name] = item
            self._facts[name] = facts
            return item

        return add

    def facts(self, item: str | Callable[..., Any]) -> Mapping[str, Any]:
        """What was stated of a name or a function (or a partial of it) when it was registered; nothing of one that was not."""
        function = self[item] if isinstance(item, str) else getattr(item, "func", item)
        return next((facts for name, facts in self._facts.items() if self._items[name] is function), dict[str, Any]())

    def bound(self, item: str | Callable[..., Any], options: Mapping[str, float]) -> Callable[..., Any]:
        """Return the function of a name (or the function given) with its keyword-only options fixed.

        Raises:
            ConfigError: an option that it does not have, or that is not a finite number.
        """
        function: Callable[..., Any] = self[item] if isinstance(item, str) else item
        known = keyword_defaults(function)
        name = item if isinstance(item, str) else getattr(item, "__name__", str(item))
        for key, value in options.items():
            if key not in known:
                raise ConfigError(f"{self.kind} '{name}' has no option '{key}'; {suggest(key, known)}")
            if not math.isfinite(value):
                raise ConfigError(f"{self.kind} '{name}', option '{key}': got {value!r}; expected a finite number")
        return partial(function, **options)

    def __getitem__(self, name: str) -> Any:
        if name in self._items:
            item = self._items[name]
            return load_object(item) if isinstance(item, str) else item
        if ":" in name:
            return load_object(name)
        self.refuse_ambiguous(name)
        raise ConfigError(f"unknown {self.kind} '{name}'; {suggest(name, self._items)}")

    def refuse_ambiguous(self, name: str) -> None:
        """Raise `ConfigError` for a name that means several things, with the candidates."""
        if name in self._ambiguous:
            raise ConfigError(f"{self.kind} '{name}' may be several methods; say which: {self._ambiguous[name]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items


def keyword_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's keyword-only parameters with their defaults: its options."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def load_object(path: str) -> Any:
    """Import ``pkg.mod:name``; raises `ConfigError` that says which half was not found."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"can't import '{path}': {error}; expected package.module:name on the Python path") from error
    if not hasattr(module, attribute):
        names = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"'{module_name}' has no '{attribute}'; {suggest(attribute, names)}")
    return getattr(module, attribute)


AMBIGUOUS = {
    "rpo": "iterative_rpo (reasoning: DPO and likelihood), reward_aware_po, reward_aware_po_model_target, "
    "reward_aware_po_squared or reward_aware_po_k (score gaps as targets), dpo_nll (DPO held by likelihood)",
    "spo": "sppo or sppo_hard (win rates as targets), or the self-play scores that `posttrain label --reward MODULE:COMPARISON` "
    "gives, with any method that reads scores",
    "dro": "dro_v (scalar rewards with a value network), robust_dpo (labels flipped at a known rate)",
}
"""Names that papers share, with the methods that they may mean."""

RECIPES = Registry(
    "recipe",
    {
        "chatglm_rlhf": "posttrain.recipes.chatglm_rlhf:chatglm_rlhf",
        "dno": "posttrain.recipes.dno:dno",
        "dapo": "posttrain.recipes.dapo:dapo",
        "deepseek_r1": "posttrain.recipes.deepseek_r1:deepseek_r1",
        "deepseek_v2": "posttrain.recipes.deepseek_v2:deepseek_v2",
        "dpo": "posttrain.recipes.dpo:dpo",
        "expert_iteration": "posttrain.recipes.expert_iteration:expert_iteration",
        "gemini": "posttrain.recipes.gemini:gemini",
        "gemma2": "posttrain.recipes.gemma2:gemma2",
        "hermes3": "posttrain.recipes.hermes3:hermes3",
        "instructgpt": "posttrain.recipes.instructgpt:instructgpt",
        "internlm2": "posttrain.recipes.internlm2:internlm2",
        "llama3": "posttrain.recipes.llama3:llama3",
        "nemotron4": "posttrain.recipes.nemotron4:nemotron4",
        "phi3": "posttrain.recipes.phi3:phi3",
        "quark": "posttrain.recipes.quark:quark",
        "qwen2": "posttrain.recipes.qwen2:qwen2",
        "raft": "posttrain.recipes.raft:raft",
        "rest": "posttrain.recipes.rest:rest",
        "reward_model": "posttrain.recipes.reward_model:reward_model",
        "rso": "posttrain.recipes.rso:rso",
        "safe_rlhf": "posttrain.recipes.safe_rlhf:safe_rlhf",
        "slic_hf": "posttrain.recipes.slic_hf:slic_hf",
        "small": "posttrain.recipes.small:small",
        "spin": "posttrain.recipes.spin:spin",
        "sppo": "posttrain.recipes.sppo:sppo",
        "starling": "posttrain.recipes.starling:starling",
        "tool_use": "posttrain.recipes.tool_use:tool_use",
        "zephyr_orpo": "posttrain.recipes.zephyr_orpo:zephyr_orpo",
    },
)

_ALGORITHMS = {
    "apa", "awr", "cispo", "dapo", "dr_grpo", "grpo", "grpo_process", "grpo_sequence", "gspo", "p3o", "ppo_dual_clip",
    "reinforce_baseline", "reinforce_pp", "reinforce_pp_baseline", "remax", "rloo",
}  # fmt: skip

METHODS = Registry(
    "method",
    {
        "dpo": "posttrain.recipes.methods:dpo",
        "ensemble": "posttrain.recipes.methods:ensemble",
        "online_dpo": "posttrain.recipes.online:online_dpo",
        "ppo": "posttrain.recipes.methods:ppo",
        "quark": "posttrain.recipes.quark:train",
        "reward": "posttrain.recipes.methods:reward",
        "safe_rlhf": "posttrain.recipes.safety:safe_rlhf",
        "sft": "posttrain.recipes.methods:sft",
    }
    | {name: f"posttrain.recipes.policy:{name}" for name in sorted(_ALGORITHMS)},
    AMBIGUOUS,
)
"""What ``posttrain train`` takes: recipes of one stage."""
