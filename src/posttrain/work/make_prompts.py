"""Prompts that a chat model writes itself."""

from __future__ import annotations

from typing import Any

from posttrain.errors import ConfigError, ModelError
from posttrain.models.load import load_policy
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.stages import Context, MakePrompts
from posttrain.train.journal import Journal
from posttrain.train.progress import progress
from posttrain.types import Example, Message
from posttrain.work.generate import write_part
from posttrain.work.inputs import choose_dtype, start_from

_SAID = "Zq-prompt-qZ"  # what no template writes


def run(stage: MakePrompts, ctx: Context) -> None:
    """Draw lot by lot, each on disk before the next, until there are enough.

    Raises:
        ConfigError: too few different prompts in all draws that are allowed.
    """
    start = start_from(stage.model, ctx)
    ids = user_begins(start.tokenizer)
    policy = load_policy(start.path, dtype=choose_dtype(stage.dtype, start.path))
    engine = LocalEngine(policy, start.stop_ids, stage.slots)
    sampling = Sampling(max_new_tokens=stage.max_new_tokens, temperature=stage.temperature, top_p=stage.top_p)
    journal, found = Journal(ctx.dir / "journal"), dict[str, None]()
    cut = drawn = 0
    with progress(ctx.console, "prompts", stage.count) as update:
        while len(found) < stage.count and drawn < stage.count * stage.tries:
            lot = [Request(ids, (ctx.seed, "prompt", drawn + k)) for k in range(stage.at_once)]

            def make(lot: list[Request] = lot) -> list[Any]:
                return [(r.ids, r.stopped) for r in engine.generate(lot, sampling)]

            said = journal.once(drawn, f"prompts {ids} {sampling}", make)
            drawn += len(lot)
            cut += sum(not stopped for _, stopped in said)
            found |= {text: None for own, stopped in said if stopped and (text := start.decode(own))}
            update(min(len(found), stage.count), "")
    if len(found) < stage.count:
        raise ConfigError(
            f"{drawn} draws gave {len(found)} different prompts ({cut} had no end), expected {stage.count}; ask for fewer, or give "
            "a higher temperature or more max_new_tokens"
        )
    again = drawn - cut - len(found)
    ctx.console.print(
        f"{drawn} draws: {len(found)} prompts; {again} empty or repeated, {cut} without end", highlight=False
    )
    kept = list(found)[: stage.count]
    write_part(ctx, "prompts", (Example(prompt=(Message(role="user", content=text),)) for text in kept))


def user_begins(tokenizer: Any) -> tuple[int, ...]:
    """The ids after which a user's first words stand in the model's chat template.

    Raises:
        ModelError: a template that does not write them as they are.
    """
    text = tokenizer.apply_chat_template([{"role": "user", "content": _SAID}], tokenize=False)
    if text.count(_SAID) != 1:
        raise ModelError(
            "the chat template does not write a user's words once, as they are; can't sample prompts from it"
        )
    return tuple(tokenizer(text.partition(_SAID)[0], add_special_tokens=False)["input_ids"])
