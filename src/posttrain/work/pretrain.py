"""Training the small model from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.data import smallworld
from posttrain.data.chat import render
from posttrain.forest import Branch, Row
from posttrain.models.load import load_policy, save_merged
from posttrain.models.small import new_small, train_tokenizer
from posttrain.stages import Context, Pretrain
from posttrain.train.loop import fit
from posttrain.train.objectives import Supervised
from posttrain.train.sources import demonstration_source
from posttrain.types import Message
from posttrain.work.supervised import optimiser, training_run

VOCABULARY_DOCUMENTS = 4000  # of each kind; more changes no entry that matters


def run(stage: Pretrain, ctx: Context) -> None:
    """Train the tokenizer and then the model, every token of every document, and write both."""
    texts = smallworld.pretraining_text(stage.documents, ctx.seed)
    talks = smallworld.transcripts(stage.documents, ctx.seed)
    words = [row["text"] for row in texts[:VOCABULARY_DOCUMENTS]]
    words += [m["content"] for row in talks[:VOCABULARY_DOCUMENTS] for m in row["messages"]]
    tokenizer = train_tokenizer(words)
    start = ctx.dir / "start"
    net: Any = new_small(ctx.seed)
    net.save_pretrained(start)
    tokenizer.save_pretrained(start)
    rows = list(documents(tokenizer, texts, talks))
    source = demonstration_source(rows, per_step=stage.rows_per_step, seed=ctx.seed)
    model = load_policy(str(start), dtype=net.dtype, train=True)
    run = training_run(stage, ctx, source.steps_per_epoch, "pretrain")
    fit({"policy": model}, Supervised(), source, optim=optimiser(stage), run=run)
    save_merged(model, str(start), ctx.dir, tokenizer)


def documents(tokenizer: Any, texts: list[dict[str, Any]], talks: list[dict[str, Any]]) -> Iterator[Row]:
    """Each document as its first token and one branch, all of it trained."""
    for row in texts:
        ids = [
            tokenizer.bos_token_id,
            *tokenizer(row["text"], add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        yield Row(ids[:1], [Branch(ids[1:], {"loss": [True] * (len(ids) - 1)})])
    for row in talks:
        ids = render(tokenizer, [Message(role=m["role"], content=m["content"]) for m in row["messages"]]).ids
        yield Row(ids[:1], [Branch(ids[1:], {"loss": [True] * (len(ids) - 1)})])
