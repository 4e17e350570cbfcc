"""Rewards that need nothing but a name: checks of answers against what the data says is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posttrain.errors import RewardError
from posttrain.registry import Registry
from posttrain.rewards.answers import Check, choice, exact, number, verified
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.constraints import followed, share_followed

REWARDS = Registry("reward")
"""Name to a function that makes the reward."""


def checked(name: str, check: Check) -> Reward:
    """A reward that checks each response against its prompt's target; it abstains where there is none of its kind.

    Raises (when called):
        RewardError: it would abstain on everything: this data is not what it checks.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        targets = [c.example.target for c in completions]
        values = [t and check(t, c.text) for t, c in zip(targets, completions, strict=True)]
        if completions and all(v is None for v in values):
            kinds = sorted({t.kind if t else "none" for t in targets})
            raise RewardError(f"reward '{name}' checks none of these rows, whose targets are: {', '.join(kinds)}")
        return [Score(v) for v in values]

    return reward


def _of_check(name: str, check: Check) -> None:
    make: Callable[[], Reward] = lambda: checked(name, check)  # noqa: E731
    make.__doc__ = check.__doc__
    REWARDS.register(name)(make)


for _name, _check in {
    "number": number,
    "exact": exact,
    "choice": choice,
    "answer": verified,
    "constraints": followed,
    "constraints_share": share_followed,
}.items():
    _of_check(_name, _check)


@REWARDS.register("math")
def math() -> Reward:
    """Whether a number or an expression equals the target's (math-verify), under a deadline of ten seconds a response."""
    from posttrain.rewards.workers import killable

    return killable("posttrain.rewards.named:math_check")


def math_check(completion: str, target: dict[str, object] | None) -> float | None:
    """`posttrain.rewards.answers.mathematics` on what crosses to another process."""
    from posttrain.rewards.answers import mathematics
    from posttrain.types import Target

    kind, answer = (target or {}).get("kind"), str((target or {}).get("answer", ""))
    return mathematics(Target(kind=kind, answer=answer), completion) if kind in ("number", "text") else None


@REWARDS.register("reasoning_gym")
def reasoning_gym() -> Reward:
    """The checker of the prompt's own task of reasoning-gym, 0 to 1, under a deadline of ten seconds a response."""
    from posttrain.rewards import reasoning

    return reasoning.reasoning_gym()


@REWARDS.register("accuracy")
def accuracy() -> Reward:
    """1 where what stands in the last ``<answer>`` tag is right, by the prompt's target or its task of reasoning-gym."""
    from posttrain.rewards import tagged

    return tagged.accuracy()


@REWARDS.register("thought")
def thought() -> Reward:
    """The same plus 1 for the form ``<think>...</think><answer>...</answer>`` (DeepSeek-R1); both are logged."""
    from posttrain.rewards import tagged

    return tagged.thought()


@REWARDS.register("supported")
def supported() -> Reward:
    """1 where such an answer is right and stands in what an environment answered; a right guess scores 0."""
    from posttrain.rewards import tagged

    return tagged.supported()


@REWARDS.register("code")
def code() -> Reward:
    """1 where a program passes all tests of its target, in a sandbox."""
    from posttrain.rewards.code import code_tests

    return code_tests()


@REWARDS.register("code_share")
def code_share() -> Reward:
    """The share of its target's tests that a program passes, in a sandbox."""
    from posttrain.rewards.code import code_tests

    return code_tests(share=True)
