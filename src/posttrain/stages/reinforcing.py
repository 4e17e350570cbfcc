"""The stage of policy gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from posttrain.errors import ConfigError
from posttrain.stages.base import PARAMETERS, TOKENS_A_ROW, Plan, Stage
from posttrain.stages.training import Training, refuse_uneven
from posttrain.train.algorithms import Algorithm, check_penalty, find_algorithm


@dataclass(frozen=True, kw_only=True)
class Reinforce(Training):
    """Policy gradients against a reward model; sizes are InstructGPT's (Ouyang et al. 2022, section 3.5 and appendix C.4).

    ``algorithm`` is a row of `posttrain.train.algorithms`, ``options`` keyword arguments of its loss (``clip`` is one of
    PPO's). ``penalty`` is where the KL to the start stands and which estimator of it, ``kl`` its coefficient; None: the
    algorithm's own. ``reward`` is a `TrainReward` stage, the directory that one wrote, a name (`posttrain.rewards.named`) or
    ``module:function`` of (prompt, answer). ``lr`` is the policy's and ``value_lr`` the critic's learning rate. The critic, where
    the algorithm has one, starts as the reward model, or, where there is none, as the policy does with a head of zeros; with
    ``value_rank`` 0 and adapters elsewhere only its head is trained. A response cut by length scores ``cut_score``, and
    with ``mask_cut`` is no part of the loss; ``overlong_share`` is the last share of the length over which scores fall by
    1. With ``rounds`` above 1, prompts whose responses all score the same are replaced by others. ``kl_target`` steers a
    penalty in the reward to so many nats a sequence. ``mismatch`` is the weight of tokens where the sampler is not the
    trainer (`posttrain.losses.shaping`). Where the KL of a rollout exceeds ``max_kl`` (nats a sequence) the stage stops,
    says why, and keeps the last checkpoint below it. Writes the policy (an adapter for peft, or a model directory).

    ``environment`` (`posttrain.rollout.environment`, or ``module:object``) answers the policy's turns, each of at most
    ``max_new_tokens``, until it has nothing to say; what it answers is read and not trained.

    ``ptx`` is the weight of the likelihood, nats a token, of demonstrations that the policy must not forget: those of ``ptx_data`` (None:
    of ``data``), ``ptx_share`` rows for each response that a step trains. In the first ``value_warmup`` rollouts only the critic
    learns. With ``ema`` the average of the policy's weights over updates, of that decay an update, is what is written.
    ``anchor`` is the share of the way to the policy that the KL's reference moves after each update (WARP, Ramé et al. 2024: 0.01).
    ``against_start`` samples so many answers of the start to each prompt, whose mean score is taken from every later one's.
    ``fused`` makes the optimiser's step within the backward pass, without clipping: gradients are not held together.

    ``gold`` is a reward like ``reward`` that is only measured, on the samples of every ``gold_every``-th rollout: ``gold/reward``
    in ``metrics.jsonl``, drawn with the proxy over the KL in ``overoptimisation.png``. Where over ``gold_window`` measurements the
    proxy rises while gold falls (`posttrain.evals.overoptimisation.parted`), that is printed and written to ``alarms.jsonl``.
    """

    WORK: ClassVar[str] = "posttrain.work.reinforce:run"
    FUNCTIONS: ClassVar[bool] = True
    MERGED: ClassVar[bool] = True
    DATA: ClassVar[tuple[str, ...]] = ("prompts",)
    TINY: ClassVar[Mapping[str, Any]] = {
        "model": "small", "data": "smallworld", "lora_rank": 8, "lr": 1e-3, "steps": 12, "prompts_per_step": 8, "samples_per_prompt": 2,
        "updates_per_rollout": 1, "max_new_tokens": 32,
    }  # fmt: skip
    reward: Stage | str
    algorithm: str = "ppo"
    options: dict[str, float] = field(default_factory=dict[str, float])
    penalty: str | None = None
    lr: float = 9e-6
    schedule: str = "constant"
    warmup_steps: int = 10
    value_lr: float = 9e-6
    value_rank: int = 0
    steps: int = 4000
    prompts_per_step: int = 512
    samples_per_prompt: int = 1
    updates_per_rollout: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    kl: float | None = None
    kl_target: float | None = None
    clip: float | None = None
    value_clip: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    cut_score: float | None = None
    mask_cut: bool = False
    overlong_share: float | None = None
    rounds: int | None = None
    mismatch: str | None = None
    max_kl: float | None = None
    environment: str | None = None
    ptx: float = 0.0
    ptx_data: str | Stage | None = None
    ptx_share: float = 8.0
    value_warmup: int = 0
    ema: float = 0.0
    anchor: float = 0.0
    against_start: int = 0
    fused: bool = False
    gold: Stage | str | None = None
    gold_every: int = 1
    gold_window: int = 20
    slots: int = 32

    def __post_init__(self) -> None:
        """Refuse values that would fail late."""
        super().__post_init__()
        refuse_uneven(self.prompts_per_step, self.steps, self.updates_per_rollout)
        row, samples = self.row(), self.samples_per_prompt
        if ("groups" in row.needs and samples < 2) or ("pairs" in row.needs and samples != 2):
            wanted = "2" if "pairs" in row.needs else "at least 2"
            raise ConfigError(
                f"{self.algorithm} compares the responses to one prompt: got samples_per_prompt={samples}, expected {wanted}"
            )
        if self.kl_target is not None and not row.penalty.startswith("reward"):
            raise ConfigError(
                f"got kl_target={self.kl_target:g}, which moves a penalty in the reward; {self.algorithm} has '{row.penalty}'"
            )
        self._refuse_beside(row)

    def _refuse_beside(self, row: Algorithm) -> None:
        """Refuse what can't stand beside the samples."""
        if self.ptx < 0 or self.ptx_share <= 0 or (self.ptx and self.temperature != 1.0):
            raise ConfigError(
                f"got ptx={self.ptx:g}, ptx_share={self.ptx_share:g}, temperature={self.temperature:g}; expected a weight of at "
                "least 0, a share above 0, and with ptx temperature 1: text and samples go through one pass"
            )
        if not 0 <= self.ema < 1 or self.against_start < 0 or self.gold_every < 1 or self.gold_window < 3:
            raise ConfigError(
                f"got ema={self.ema:g}, against_start={self.against_start}, gold_every={self.gold_every}, "
                f"gold_window={self.gold_window}; expected a decay from 0 to below 1, answers of at least 0, at least 1, at least 3"
            )
        if self.anchor and (not 0 < self.anchor < 1 or self.ema or self.lora_rank or self.against_start):
            raise ConfigError(
                f"got anchor={self.anchor:g} with ema={self.ema:g}, lora_rank={self.lora_rank}, against_start={self.against_start}; "
                "expected a rate between 0 and 1, the whole policy trained (lora_rank 0), and neither of the others"
            )
        if self.value_warmup < 0 or (self.value_warmup and "critic" not in row.needs):
            raise ConfigError(
                f"got value_warmup={self.value_warmup}; expected rollouts of at least 0, and an algorithm with a critic, which "
                f"{self.algorithm} {'has' if 'critic' in row.needs else 'has not'}"
            )
        if self.against_start and self.cut_score is not None:
            raise ConfigError(
                f"got cut_score={self.cut_score:g} with against_start={self.against_start}; a cut response's score would be no "
                "difference to the start's answers; expected cut_score None"
            )
        if self.fused and self.merging != "none":
            raise ConfigError("got fused with merging, which needs all of a step; expected one of them")

    def row(self) -> Algorithm:
        """The algorithm with what this stage changes of it: penalty, its coefficient, options of the loss.

        Raises:
            ConfigError: a penalty that can't be, or a coefficient without a penalty.
        """
        row = find_algorithm(self.algorithm)
        penalty = row.penalty if self.penalty is None else self.penalty
        check_penalty(penalty)
        if penalty == "none" and self.kl:
            raise ConfigError(
                f"got kl={self.kl:g} but {self.algorithm} has no KL penalty; give one, such as penalty='loss:k2', or kl 0"
            )
        numbers = {"kl": 0.0, "rounds": 1, "overlong_share": 0.0, **row.numbers}
        numbers |= {k: v for k in ("kl", "rounds", "overlong_share") if (v := getattr(self, k)) is not None}
        options = {**row.options, **self.options} | ({} if self.clip is None else {"clip": self.clip})
        return replace(row, penalty=penalty, numbers=numbers, options=options)

    def check(self) -> None:
        """Also refuse what the algorithm's loss or advantage does not read, or the reward can't give."""
        from posttrain.losses.advantages import advantages
        from posttrain.losses.policy import policy_losses
        from posttrain.losses.shaping import mismatch_weights
        from posttrain.registry import keyword_defaults

        row = self.row()
        policy_losses.bound(row.loss, row.options)
        if self.environment is not None:
            self._check_environment(row)
        if self.mismatch is not None:
            mismatch_weights.bound(self.mismatch, {})
        known = keyword_defaults(advantages[row.advantage])
        for name, usual in (("gamma", 1.0), ("lam", 0.95)):
            if getattr(self, name) != usual and name not in known and "critic" not in row.needs:
                raise ConfigError(
                    f"{self.algorithm} has no {name}: its advantage is '{row.advantage}'; leave it at {usual}"
                )
        if "steps" in row.needs:
            raise ConfigError(
                f"{self.algorithm} reads scores of steps of reasoning, which a reward model of whole responses does not give; "
                "use posttrain.train.rollouts.RolloutSource with a reward that does, or another algorithm"
            )
        super().check()

    def _check_environment(self, row: Algorithm) -> None:
        """Refuse an environment that can't be, or beside what counts one response."""
        from posttrain.rollout.environment import find_environment

        find_environment(str(self.environment))
        if row.numbers["overlong_share"] or self.against_start or "greedy" in row.needs:
            raise ConfigError(
                f"got environment='{self.environment}' with overlong_share={row.numbers['overlong_share']:g}, "
                f"against_start={self.against_start} and {self.algorithm}; expected neither (overlong_share 0, against_start 0), "
                "and an algorithm without a greedy response: they are of one turn"
            )

    def files(self) -> list[Path]:
        """Also those of the text that is kept and of the gold reward."""
        from posttrain.work.beside import beside_files

        return super().files() + beside_files(self)

    def plan(self) -> Plan:
        """Sampling, three forward passes and training for every response."""
        rollouts = self.steps // self.updates_per_rollout
        samples = rollouts * self.prompts_per_step * self.samples_per_prompt
        tokens = int(samples * (50 / self.samples_per_prompt + 0.7 * self.max_new_tokens))
        critic = 2.0 if self.lora_rank and not self.value_rank else 4.4
        flops = self.step_flops(tokens) + (2 * 3 + critic) * PARAMETERS * tokens
        if self.ptx:
            flops += self.step_flops(int(samples * self.ptx_share * TOKENS_A_ROW))
        return Plan(rows=samples, tokens=tokens, flops=flops, memory=2 * self.weights() + self.working())
