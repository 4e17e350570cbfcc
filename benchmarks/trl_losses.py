"""Losses beside TRL's on the same made-up log-probabilities: ``python -m benchmarks.trl_losses``, then ``... page``.

Both sides get the same logits of a policy and a reference over the same six pairs and make their own log-probabilities, so
what is compared is the loss with everything that stands between a network and it. Where values differ, the reason given is
tried: our loss, changed in the way it says, must give TRL's value.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.compare.peers import ROOT, python_of
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from posttrain.losses import Labelled, PairLogps, TokenLogps, TokenPairs, preference, token_losses, unpaired_losses
from posttrain.losses.preference import lengths, log_ratios
from posttrain.losses.tokenwise import pair_sums

RESULTS = ROOT / "benchmarks" / "results" / "trl-losses.json"
PAGE = ROOT / "docs" / "results" / "trl-losses.md"
PAIRS, VOCABULARY, PROMPT, LONGEST = 6, 11, 3, 6
EQUAL = 1e-6
"""What rounding may part: TRL computes some of them in fp32."""


# ---------------------------------------------------------------------------- data


def made_up() -> dict[str, Tensor]:
    """Six pairs of one to six tokens as padded rows, the chosen ones first, and logits of two networks; drawn from one seed.

    The first pair is likely under the policy.

    ``other_ids`` are the same prompts with the answer of the row before, for KTO.
    """
    draw = torch.Generator().manual_seed(0)
    rows = 2 * PAIRS
    prompts = torch.randint(1, VOCABULARY, (PAIRS, PROMPT), generator=draw).repeat(2, 1)
    answers = torch.randint(1, VOCABULARY, (rows, LONGEST), generator=draw)
    size = torch.randint(1, LONGEST + 1, (rows,), generator=draw)
    place = torch.arange(PROMPT + LONGEST)

    def batch(answers: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        there = (place < PROMPT + size[:, None]).long()
        return torch.cat([prompts, answers], 1) * there, there, there * (place >= PROMPT)

    ids, attention, mask = batch(answers, size)
    other, other_attention, other_mask = batch(answers.roll(1, 0), size.roll(1))
    shape = (rows, PROMPT + LONGEST, VOCABULARY)
    logits = {
        name: 1.5 * torch.randn(shape, generator=draw, dtype=torch.float64) for name in ("policy", "other_policy")
    }
    for row in (0, PAIRS):  # a pair that the policy is likely to have written
        logits["policy"][row].scatter_add_(
            1, ids[row].roll(-1)[:, None], torch.full((len(place), 1), 4.0, dtype=torch.float64)
        )
    moved = {name: x + 0.7 * torch.randn(shape, generator=draw, dtype=torch.float64) for name, x in logits.items()}
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "completion_mask": mask,
        "label": torch.arange(rows) < PAIRS,
        "other_ids": other,
        "other_attention_mask": other_attention,
        "other_completion_mask": other_mask,
        "policy_logits": logits["policy"],
        "other_policy_logits": logits["other_policy"],
        "reference_logits": moved["policy"],
        "other_reference_logits": moved["other_policy"],
    }


@dataclass(frozen=True)
class Given:
    """What our losses read, of the same logits."""

    pairs: PairLogps
    tokens: TokenPairs
    labelled: Labelled
    likelihood: Tensor  # of every token of the chosen rows, prompt included, [PAIRS, T - 1], 0 at padding
    real: Tensor  # where there is such a token


def given(data: dict[str, Tensor]) -> Given:
    """Records of our losses; gradient flows to ``policy_logits``."""
    ids, mask = data["input_ids"][:, 1:], data["completion_mask"][:, 1:].bool()

    def logp(name: str, ids: Tensor) -> Tensor:
        return data[name][:, :-1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    policy, reference = logp("policy_logits", ids), logp("reference_logits", ids)
    squares = data["policy_logits"][:, :-1].softmax(-1).square().sum(-1)
    sides = [
        TokenLogps(logp=policy[half], ref_logp=reference[half], mask=mask[half], sum_p2=squares[half])
        for half in (slice(0, PAIRS), slice(PAIRS, None))
    ]
    tokens = TokenPairs(chosen=sides[0], rejected=sides[1])
    others = data["other_ids"][:, 1:]
    wanted = data["other_completion_mask"][:, 1:].bool()
    labelled = Labelled(
        logp=torch.cat([(policy * mask).sum(1), (logp("other_policy_logits", others) * wanted).sum(1)]),
        ref_logp=torch.cat([(reference * mask).sum(1), (logp("other_reference_logits", others) * wanted).sum(1)]),
        length=torch.cat([mask.sum(1), wanted.sum(1)]),
        label=torch.cat([data["label"], torch.zeros_like(data["label"])]),
        matched=torch.arange(4 * PAIRS) < 2 * PAIRS,
    )
    real = data["attention_mask"][:PAIRS, 1:].bool()
    return Given(pair_sums(tokens), tokens, labelled, policy[:PAIRS] * real, real)


# ---------------------------------------------------------------------------- cases


Ours = Callable[[Given], Tensor]


@dataclass(frozen=True)
class Case:
    """A loss of TRL's, ours, and if they differ why, with our loss changed in that way."""

    name: str
    trainer: str
    options: dict[str, Any]
    ours: str
    loss: Ours | None
    why: str = ""
    changed: Ours | None = None
    dtype: str = "float64"


def of_pairs(name: str, **options: float) -> Ours:
    """A loss of pairs by name, as a mean over pairs."""
    return lambda x: preference[name](x.pairs, **options).mean()


def of_tokens(name: str, **options: float) -> Ours:
    """A token-level loss by name."""
    return lambda x: token_losses[name](x.tokens, **options).mean()


def of_labelled(name: str, **options: float) -> Ours:
    """A loss of labelled answers by name, as a mean over the answers to their own prompts."""
    return lambda x: unpaired_losses[name](x.labelled, **options).sum() / (2 * PAIRS)


def token_mean(x: Given) -> Tensor:
    """Negative log-likelihood of all chosen tokens of the batch, each of equal weight."""
    return -x.pairs.chosen.sum() / lengths(x.pairs)[0].sum()


def with_token_mean(name: str, share: float, /, **options: float) -> Ours:
    """A loss whose likelihood term, a mean of each response's own mean, is replaced by the mean over tokens."""

    def loss(x: Given) -> Tensor:
        own = (-x.pairs.chosen / lengths(x.pairs)[0]).mean()
        return preference[name](x.pairs, **options).mean() + share * (token_mean(x) - own)

    return loss


def bco_without_shift(x: Given) -> Tensor:
    """BCO of pairs with delta 0, the two answers added up."""
    chosen, rejected = log_ratios(x.pairs)
    return (-logsigmoid(0.1 * chosen) - logsigmoid(-0.1 * rejected)).mean()


def wpo_unclamped(x: Given) -> Tensor:
    """WPO whose weight may be above 1."""
    exponents = [
        ((s.logp - s.sum_p2.log()) * s.mask).sum(1) / s.mask.sum(1)  # pyright: ignore[reportOptionalMemberAccess]
        for s in (x.tokens.chosen, x.tokens.rejected)
    ]
    return ((exponents[0] + exponents[1]).detach().exp() * preference["dpo"](x.pairs, beta=0.1)).mean()


def orpo_with_prompt(x: Given) -> Tensor:
    """ORPO whose likelihood is over the prompt's tokens too, a mean over all tokens of the batch."""
    own = (-x.pairs.chosen / lengths(x.pairs)[0]).mean()
    return preference["orpo"](x.pairs, lam=0.1).mean() - own - x.likelihood.sum() / x.real.sum()


TOKENS = (
    "TRL averages the likelihood over all chosen tokens of the batch, so that long answers count more and the value changes with "
    "the batch; ours is each answer's mean"
)
NONE = "no counterpart here"

CASES = (
    Case("sigmoid", "dpo", {}, "`dpo`", of_pairs("dpo")),
    Case("hinge", "dpo", {"loss_type": ["hinge"]}, "`gpo_hinge`", of_pairs("gpo_hinge", beta=0.1)),
    Case("ipo", "dpo", {"loss_type": ["ipo"]}, "`ipo`", of_pairs("ipo", tau=0.1)),
    Case("sigmoid_norm", "dpo", {"loss_type": ["sigmoid_norm"], "beta": 5.0}, "`dpo_norm`", of_pairs("dpo_norm", beta=5.0)),
    Case(
        "exo_pair",
        "dpo",
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        "`exo`",
        of_pairs("exo", beta=0.1, label_smoothing=1e-3),
    ),
    Case("nca_pair", "dpo", {"loss_type": ["nca_pair"]}, "`nca`", of_pairs("nca", beta=0.1)),
    Case(
        "robust", "dpo", {"loss_type": ["robust"], "label_smoothing": 0.2}, "`robust_dpo`",
        of_pairs("robust_dpo", label_smoothing=0.2),
    ),
    Case(
        "sigmoid, label_smoothing 0.2", "dpo", {"label_smoothing": 0.2}, "`cdpo`", of_pairs("cdpo", label_smoothing=0.2),
        "TRL 1.16 reads `label_smoothing` in `exo_pair`, `robust`, `aot` and `aot_unpaired` only: its value is DPO's",
        of_pairs("dpo"),
    ),
    Case("sppo_hard", "dpo", {"loss_type": ["sppo_hard"]}, "`sppo_hard`", of_pairs("sppo_hard", beta=0.1)),
    Case(
        "bco_pair", "dpo", {"loss_type": ["bco_pair"]}, "`bco`", of_labelled("bco", beta=0.1),
        "TRL leaves out the shift delta, halfway between the mean rewards of good and of bad answers, and adds a pair's two "
        "terms up; ours is the paper's, a mean over answers",
        bco_without_shift,
    ),
    Case(
        "aot, label_smoothing 0.1", "dpo", {"loss_type": ["aot"], "label_smoothing": 0.1}, "`aot`",
        of_pairs("aot", label_smoothing=0.1),
    ),
    Case("aot_unpaired", "dpo", {"loss_type": ["aot_unpaired"]}, "`aot_unpaired`", of_pairs("aot_unpaired")),
    Case("apo_zero", "dpo", {"loss_type": ["apo_zero"]}, "`apo_zero`", of_pairs("apo_zero", beta=0.1)),
    Case("apo_down", "dpo", {"loss_type": ["apo_down"]}, "`apo_down`", of_pairs("apo_down", beta=0.1)),
    Case(
        "sigmoid + 0.2 sft", "dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, "`dpo_nll`",
        of_pairs("dpo_nll", weight=0.2), TOKENS, with_token_mean("dpo_nll", 0.2, weight=0.2),
    ),
    Case(
        "sigmoid + sft", "dpo", {"loss_type": ["sigmoid", "sft"]}, "`iterative_rpo`", of_pairs("iterative_rpo", alpha=1.0),
        TOKENS, with_token_mean("iterative_rpo", 1.0, alpha=1.0),
    ),
    Case("discopop", "dpo", {"loss_type": ["discopop"]}, NONE, None),
    Case("forward_kl", "dpo", {"f_divergence_type": "forward_kl"}, "`fdpo_forward_kl`", of_pairs("fdpo_forward_kl")),
    Case("js_divergence", "dpo", {"f_divergence_type": "js_divergence"}, "`fdpo_js`", of_pairs("fdpo_js")),
    Case(
        "alpha_divergence, 0.3", "dpo", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        "`fdpo_alpha`, alpha 0.3", of_pairs("fdpo_alpha", alpha=0.3),
        "TRL's coefficient is 1 less the paper's alpha; they agree at 0.5, the default of both", of_pairs("fdpo_alpha", alpha=0.7),
        dtype="float32",
    ),
    Case("ld_alpha 0.5", "dpo", {"ld_alpha": 0.5}, "`ld_dpo`", of_tokens("ld_dpo", alpha=0.5)),
    Case(
        "use_weighting", "dpo", {"use_weighting": True}, "`wpo`", of_tokens("wpo", beta=0.1),
        "TRL lets the weight of a pair be above 1; the authors' code, and ours, hold it at 1", wpo_unclamped,
    ),
    Case("KTO", "kto", {"loss_type": "kto"}, "`kto`", of_labelled("kto", beta=0.1)),
    Case(
        "KTO, undesirable_weight 1.3", "kto", {"loss_type": "kto", "undesirable_weight": 1.3}, "`kto`",
        of_labelled("kto", beta=0.1, undesirable=1.3),
    ),
    Case(
        "apo_zero_unpaired", "kto", {"loss_type": "apo_zero_unpaired"}, "`apo_zero_unpaired`",
        of_labelled("apo_zero_unpaired", beta=0.1),
    ),
    Case("ORPO", "orpo", {"beta": 0.1}, "`orpo`", of_pairs("orpo", lam=0.1),
         "TRL's likelihood is over prompt and answer, a mean over all tokens of the batch; ours over the answer, each answer's "
         "mean", orpo_with_prompt),
    Case("CPO, cpo_alpha 0", "cpo", {"loss_type": "sigmoid", "cpo_alpha": 0.0}, "`cpo`, lam 0", of_pairs("cpo", lam=0.0)),
    Case(
        "CPO", "cpo", {"loss_type": "sigmoid"}, "`cpo`", of_pairs("cpo", lam=1.0), TOKENS,
        with_token_mean("cpo", 1.0, lam=1.0),
    ),
    Case(
        "CPO hinge, cpo_alpha 0", "cpo", {"loss_type": "hinge", "cpo_alpha": 0.0}, "`slic`, delta 10, lam 0",
        of_pairs("slic", delta=10.0, lam=0.0), "TRL's is ours times beta (0.1)",
        lambda x: relu(1 - 0.1 * (x.pairs.chosen - x.pairs.rejected)).mean(),
    ),
    Case(
        "SimPO, cpo_alpha 0", "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.5}, "`simpo`",
        of_pairs("simpo", beta=2.0, gamma=0.5),
    ),
    Case("CPO ipo, cpo_alpha 0", "cpo", {"loss_type": "ipo", "cpo_alpha": 0.0}, NONE, None),
    Case(
        "AlphaPO, alpha 0.25", "cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "alpha": 0.25}, NONE, None,
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------- values


def values(loss: Ours, data: dict[str, Tensor]) -> tuple[float, Tensor]:
    """A loss of ours and its gradient with respect to the policy's logits."""
    leaf = data["policy_logits"].detach().clone().requires_grad_(True)
    value = loss(given(data | {"policy_logits": leaf}))
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad


def peer(data: dict[str, Tensor]) -> dict[str, Any]:
    """TRL's side, in a process of its environment."""
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        cases = [{"name": c.name, "trainer": c.trainer, "options": c.options, "dtype": c.dtype} for c in CASES]
        lists = {name: x.tolist() for name, x in data.items()}
        job.write_text(json.dumps({"data": lists, "cases": cases, "result": str(result)}))
        call = [str(python_of("trl")), str(ROOT / "benchmarks" / "compare" / "peer_losses.py"), str(job)]
        done = subprocess.run(call, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"TRL's side failed with status {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def compared(case: Case, data: dict[str, Tensor], theirs: dict[str, Any]) -> dict[str, Any]:
    """One case: both values, and by how much gradients differ at most; the same for the changed loss."""
    row: dict[str, Any] = {"name": case.name, "trainer": case.trainer, "trl": theirs["loss"]}
    gradient = torch.tensor(theirs["gradient"], dtype=torch.float64)
    for word, loss in (("ours", case.loss), ("changed", case.changed)):
        if loss is not None:
            value, slope = values(loss, data)
            row |= {word: value, f"{word}_gradient": float((slope - gradient).abs().max())}
    return row


def run() -> None:
    """Compare, and write the values."""
    data = made_up()
    theirs = peer(data)
    rows = [compared(case, data, theirs["cases"][case.name]) for case in CASES]
    found = {"date": datetime.date.today().isoformat(), "versions": theirs["versions"], "cases": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


# ---------------------------------------------------------------------------- page


TEXT = """# Preference losses beside TRL's

Made by `python -m benchmarks.trl_losses` from `benchmarks/results/trl-losses.json`: TRL {trl}, {date}. Six made-up pairs of one to
six tokens over a vocabulary of eleven; both sides get the same logits and make their own log-probabilities, TRL in its own
trainer and process. Values are means over the batch; gradients, with respect to the policy's logits, were compared as well.
*Equal* is to 1e-6, value and gradient. Where they differ, the reason was tried: our loss, changed as it says, gives TRL's value
and gradient, to within the last column.

Losses that TRL 1.16 does not have and this page therefore leaves out: everything else in [the list](../losses/index.md). It has no
trainer for BCO, XPO or Nash-MD any more.

{table}

{found}
"""


def page(found: dict[str, Any]) -> str:
    """The page of what was found."""
    lines = [
        "| TRL | its value | ours | our value | difference | why | left with that changed |",
        "|---|--:|---|--:|--:|---|--:|",
    ]
    counts = {"equal": 0, "differ": 0, "none": 0}
    for case, row in zip(CASES, found["cases"], strict=True):
        assert case.name == row["name"], f"{RESULTS.name} is of other cases; run python -m benchmarks.trl_losses"
        value, gap, why, left = "", "", case.why, ""
        if "ours" in row:
            value, apart = f"{row['ours']:.6f}", max(abs(row["ours"] - row["trl"]), row["ours_gradient"])
            equal = apart < EQUAL
            gap = "equal" if equal else f"{row['ours'] - row['trl']:+.6f}"
            assert equal == (not case.why), f"{case.name}: {apart:.2e} apart, and the reason given is '{case.why}'"
            counts["equal" if equal else "differ"] += 1
        else:
            counts["none"] += 1
        if "changed" in row:
            rest = max(abs(row["changed"] - row["trl"]), row["changed_gradient"])
            assert rest < EQUAL, f"{case.name}: changed, it is still {rest:.2e} apart"
            left = f"{rest:.0e}"
        lines.append(f"| {case.name} | {row['trl']:.6f} | {case.ours} | {value} | {gap} | {why} | {left} |")
    said = (
        f"{counts['equal']} are equal, {counts['differ']} differ for the reasons given, {counts['none']} of TRL's have no "
        "counterpart here."
    )
    return TEXT.format(trl=found["versions"]["trl"], date=found["date"], table="\n".join(lines), found=said)


def main() -> None:
    """Compare and write the page, or only the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("run", "page"), default="run")
    if parser.parse_args().what == "run":
        run()
    PAGE.write_text(page(json.loads(RESULTS.read_text())))
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
