"""Write the pages of preference losses from their docstrings, one a family: ``python docs/loss_pages.py``."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path

from posttrain.cli_list import learns_from, needed
from posttrain.losses import LOSSES, find_loss
from posttrain.registry import keyword_defaults

FOLDER = Path(__file__).parent / "losses"
MADE = "<!-- made by docs/loss_pages.py from the docstrings of posttrain.losses -->"
FILES = {
    "pairs": "pairs.jsonl",
    "lists": "rankings.jsonl",
    "labelled answers": "labelled.jsonl",
    "rated answers": "rated.jsonl",
}


@dataclass(frozen=True)
class Page:
    """A family: its losses in the order in which each adds one idea, and that idea."""

    name: str
    title: str
    intro: str
    losses: dict[str, str]


PAGES = (
    Page(
        "pairs",
        "Pairs: DPO, doubtful labels, lengths",
        "What all others start from: the margin between two responses, against a reference.",
        {
            "dpo": "the margin of log-ratios, through a logistic function: a reward model that is the policy itself",
            "cdpo": "labels are wrong at a rate, so margins are not pushed past what that allows",
            "robust_dpo": "the same rate, corrected for: on average over flipped labels this is DPO on clean ones",
            "dpo_norm": "to `dpo`: means over tokens in place of sums, so that length earns nothing",
            "ipo": "a target for the mean margin in place of a logistic function: labels without doubt don't push for ever",
            "ipo_sum": "the same target for sums",
        },
    ),
    Page(
        "links",
        "Links: other functions of the same margin",
        "DPO is a logistic function of the scaled margin. Any falling function will do; its tails say what becomes of pairs "
        "that are far right or far wrong.",
        {
            "gpo_logistic": "DPO under its name in the family",
            "gpo_exponential": "a heavier tail: pairs that are far wrong dominate",
            "gpo_squared": "a target instead of a tail",
            "gpo_hinge": "no push at all past the target",
            "gpo_truncated_quadratic": "the squared loss up to the target, nothing past it",
            "gpo_savage": "a light tail: pairs that are far wrong are given up",
            "rso_hinge": "the hinge, on pairs that were sampled from the policy that the reward allows",
            "rso_sigmoid": "the logistic function on such pairs",
            "exo": "the divergence the other way round: from the model to the labels",
        },
    ),
    Page(
        "margins",
        "Margins: DPO's function of something else",
        "What stands inside the logistic function changes: a length, a fine, another divergence from the reference.",
        {
            "r_dpo": "a charge for each token by which the chosen response is longer",
            "dpop": "a fine where the chosen response becomes less likely than at the start",
            "fdpo_forward_kl": "the forward KL in place of the reverse one as what holds the policy to the reference",
            "fdpo_js": "Jensen-Shannon, whose push ends where a response is far above the reference",
            "fdpo_alpha": "everything between the reverse and the forward KL, by one number",
        },
    ),
    Page(
        "anchored",
        "Anchored: a likelihood term beside the margin",
        "Only the margin is held by DPO, and the chosen response may sink with the rejected one. A likelihood holds it up.",
        {
            "dpo_nll": "a little likelihood of the chosen response",
            "dpo_nll_masked": "tokens of the format out of the margin, and into the likelihood",
            "iterative_rpo": "as much likelihood as margin, in rounds, for reasoning that can be checked",
            "con_j": "next to no likelihood, for pairs of judgements of which one agrees with the label",
        },
    ),
    Page(
        "separable",
        "Separable: each response by itself",
        "A margin says nothing of where both responses go. Here each has a term of its own.",
        {
            "apo_zero": "the chosen response up and the rejected one down, each bounded",
            "apo_down": "both down, the rejected one further: for data worse than the model",
            "nca": "each response against noise, so that the chosen one's own likelihood is held",
            "sppo_hard": "a target for each log-ratio",
            "cal_dpo": "these targets beside DPO's margin",
        },
    ),
    Page(
        "reference-free",
        "Without a reference",
        "The policy's own log-probabilities are compared, so that no second model is needed; a likelihood or a margin keeps "
        "the policy where it is.",
        {
            "slic": "a hinge between two log-probabilities, and a likelihood",
            "cpo": "DPO's function in place of the hinge",
            "cpo_sum": "its likelihood as a sum, as printed",
            "simpo": "means over tokens and a margin that is asked for, in place of the likelihood",
            "orpo": "odds in place of probabilities, beside the likelihood of fine-tuning: one stage for both",
        },
    ),
    Page(
        "batchwise",
        "Batches: pairs that depend on each other",
        "The loss of a pair reads the others of the step, which is therefore seen at once: a first pass collects, a second one "
        "learns, and micro-batches change nothing.",
        {
            "beta_dpo": "to `dpo`: beta follows the step's mean margin, and unusual pairs are left out",
            "aot": "to `dpo`: margins are compared as a distribution, sorted, not pair by pair",
            "aot_unpaired": "good and bad responses sorted apart, so that they need no common prompt",
        },
    ),
    Page(
        "tokens",
        "Tokens: more than a response's sum",
        "What a sum forgets: where in the response a token stands, how the reference's distribution looks there, how likely the "
        "policy is to have written it.",
        {
            "ld_dpo": "to `dpo`: tokens past the shorter response's length count less",
            "tdpo1": "the divergence from the reference at each token, as part of the margin",
            "tdpo2": "no gradient through the chosen response's divergence, and a weight",
            "wpo": "to `dpo`: pairs weighted by how likely the policy is to have written them; a weighting of any loss",
            "mallows": "to `dpo`: prompts to which answers vary little count more",
            "mallows_ipo": "the same with IPO's function",
        },
    ),
    Page(
        "scored",
        "Scores: how much better, and what explores",
        "An order says which response is better, a score by how much.",
        {
            "reward_aware_po": "to `dpo`: the gap of scores as the target of the margin, so that near-ties are left near",
            "reward_aware_po_model_target": "the same divergence the other way round",
            "reward_aware_po_squared": "their distance squared",
            "dno": "win rates in place of scores, as soft labels",
            "xpo": "to `dpo` on fresh samples: what the reference already writes becomes less likely",
        },
    ),
    Page(
        "lists",
        "Lists and games: any number of responses",
        "K responses to one prompt, with scores or with the probability to win.",
        {
            "info_nca": "a softmax over the responses in place of a margin of two",
            "nca_k": "each response's own likelihood held beside it",
            "exo_rw": "to `info_nca`: the divergence from the model to the target",
            "reward_aware_po_k": "to `info_nca`: the divergence from the target, scores in their own units",
            "d2o": "bad human answers alone, against many samples of the policy",
            "sppo": "a game between policies: each log-ratio drawn to its win rate",
            "nash_md": "the game played against a mixture of policy and reference",
        },
    ),
    Page(
        "unpaired",
        "Single answers: labels, ratings, unlearning",
        "No pairs at all: an answer is good or bad, or has a rating, or is to be forgotten.",
        {
            "apo_zero_unpaired": "good answers up and bad ones down, from the reference on",
            "kto": "from where the policy is anyway: how far answers to other prompts moved",
            "bco": "from halfway between good and bad, as a classifier",
            "npo": "bad answers only, forgotten without tearing the rest down as gradient ascent does",
            "npo_nll": "what is to be kept, by its likelihood",
            "npo_kl": "what is to be kept, by its divergence from the reference",
            "dro_v": "ratings in place of labels, and a value network that expects them",
        },
    ),
)


def text(page: Page) -> str:
    """A page."""
    place = PAGES.index(page)
    near = [f"before it: [{PAGES[place - 1].title}]({PAGES[place - 1].name}.md)"] if place else []
    near += [f"next: [{PAGES[place + 1].title}]({PAGES[place + 1].name}.md)"] if place + 1 < len(PAGES) else []
    head = [f"# {page.title}", "", MADE, "", page.intro, "", f"[All families](index.md); {'; '.join(near)}."]
    if not place:
        head += ["", SYMBOLS]
    return "\n".join([*head, *(line for name in page.losses for line in section(page, name))]) + "\n"


SYMBOLS = (
    "In all formulas `h` is a response's log-ratio `log pi(y) - log ref(y)` in nats, summed over its tokens, the stop token "
    "included; `w` the chosen and `l` the rejected one; `D = h_w - h_l` the margin; `z = beta D`; `|y|` a length in tokens. "
    "`pi` is the policy that is trained, `ref` the model that it started from."
)


def section(page: Page, name: str) -> list[str]:
    """The lines on one loss: what it adds, its docstring, and the facts."""
    registry = find_loss(name)
    facts, function = registry.facts(name), registry[name]
    about, _, rest = markdown(inspect.getdoc(function) or "").partition("\n\nRaises:\n")
    refused, _, source = rest.partition("\n\nSource: ") if rest else ("", "", "")
    if not rest:
        about, _, source = about.partition("\n\nSource: ")
    options = ", ".join(f"`{key}` {value:g}" for key, value in keyword_defaults(function).items())
    data = registry.data
    start = (
        f"; {facts['at_reference']:.6g} where policy and reference agree, at the defaults"
        if "at_reference" in facts
        else ""
    )
    idea = page.losses[name]
    lines = ["", f"## `{name}`", "", f"*Adds{'' if idea.startswith('to `') else ':'} {idea}.*", "", about, ""]
    lines += [f"- learns from {learns_from(registry, name)}; needs {', '.join(needed(facts)) or 'nothing else'}{start}"]
    lines += [f"- options: {options}"]
    lines += ["- refuses: " + re.sub(r"\s+", " ", refused.replace("ConfigError:", "")).strip(" .")] if refused else []
    lines += [f"- paper: {facts['paper']}" + place_in(source, facts["paper"])]
    command = (
        f"--data {FILES[data]}" if data in FILES else "--reward DIRECTORY"
    )  # what learns from fresh samples wants a judge
    return [*lines, f"- `posttrain train {name} {command}`"]


def place_in(source: str, paper: str) -> str:
    """What a docstring's source says beyond the paper's authors and year: the equation."""
    words = re.sub(r"\s+", " ", source).strip().rstrip(".")
    _, _, place = words.partition(", ")
    return f" ({place})" if place and place not in paper else ""


def markdown(doc: str) -> str:
    """A docstring as Markdown: code in single marks, names of losses as links to their sections."""
    doc = doc.replace("``", "`").replace("`posttrain.losses.games.sppo`", "`sppo`")
    doc = doc.replace("`posttrain.losses.tokenwise.dpo_nll_masked`", "`dpo_nll_masked`")
    pages = {name: page.name for page in PAGES for name in page.losses}
    return re.sub(r"`(\w+)`", lambda m: f"[`{m[1]}`]({pages[m[1]]}.md#{m[1]})" if m[1] in pages else m[0], doc)


def index() -> str:
    """The page of all families."""
    lines = ["# Preference losses", "", MADE, "", INTRO, ""]
    for number, page in enumerate(PAGES, 1):
        names = ", ".join(f"[`{name}`]({page.name}.md#{name})" for name in page.losses)
        lines += [f"{number}. **[{page.title}]({page.name}.md)** {page.intro} {names}"]
    return "\n".join([*lines, "", SYMBOLS]) + "\n"


INTRO = f"""\
{sum(len(registry) for registry in LOSSES)} ways to learn from preferences, each a function of log-probabilities; one is swapped
for another by name, on the same data. Families, and losses within them, are in an order in which each adds one idea to the one
before, or to the one that it names.

    posttrain train simpo --data pairs.jsonl --loss.gamma 1.2
    posttrain compare dpo simpo orpo --data pairs.jsonl --seeds 3
    posttrain train online_dpo --loss simpo --reward runs/train-reward/reward

`posttrain list losses` prints them; `posttrain train LOSS --help` the options of one; `examples/new_loss.py` adds one.
What each did on the small model: [results](../results/preference.md). Beside another library's: [TRL's](../results/trl-losses.md).
Three names mean several methods and are refused with the candidates: `rpo`, `spo`, `dro`."""


def pages() -> dict[Path, str]:
    """All pages by file.

    Raises:
        ValueError: a loss that stands on no page, or on two.
    """
    listed = [name for page in PAGES for name in page.losses]
    known = [name for registry in LOSSES for name in registry]
    if sorted(listed) != sorted(known):
        raise ValueError(f"each loss stands on one page of docs/loss_pages.py; not so: {set(listed) ^ set(known)}")
    return {FOLDER / f"{page.name}.md": text(page) for page in PAGES} | {FOLDER / "index.md": index()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in pages().items():
        file.write_text(content)
