"""Talk to a trained model in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from posttrain.data.chat import render_prompt, stop_ids
from posttrain.errors import ConfigError, ModelError, PosttrainError, suggest
from posttrain.evals.grids import clean_text
from posttrain.models.load import load_generation_config, load_policy, load_tokenizer
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.types import Message

LONGEST = 256  # tokens of an answer
COMMANDS = {
    "/reset": "forget the conversation",
    "/help": "list the commands",
    "/quit": "leave (so do Ctrl-D and Ctrl-C)",
}


def chat(path: Path, console: Console, *, ask: Callable[[str], str] | None = None) -> None:
    """Answer what is typed until /quit, Ctrl-D or Ctrl-C; the model sees the conversation so far.

    Args:
        path: a run's directory or a model's.
        console: where answers are printed, control characters of the model's text made visible.
        ask: reads a line after a prompt; raises EOFError at the end (default: ``console.input``).

    Raises:
        ConfigError: no model to talk to.
        ModelError: a model without chat template or stop token.
    """
    directory = find_trained(path)
    talk = _load(directory)
    say(console, f"{directory}: /help lists commands", "dim")
    try:
        while True:
            line = (ask or console.input)("> ").strip()
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(line, talk, console)
            elif line:
                with console.status("answering"):
                    answer, note = talk.answer(line)
                say(console, answer)
                say(console, note, "dim")
    except (EOFError, KeyboardInterrupt):
        console.print()


def find_trained(path: Path) -> Path:
    """Return the model directory: ``path`` itself, its ``model``, else its newest stage that is one.

    Stages that haven't finished don't count.

    Raises:
        ConfigError: none of them is one.
    """
    if (path / "config.json").is_file():
        if not _is_language_model(path):
            raise ConfigError(f"'{path}' is no language model but {_kind(path)}; give a run, or a model that answers")
        return path
    stages = [stage for stage in _finished(path) if _is_language_model(stage)]
    if stages:
        return max(stages, key=lambda stage: (stage.name == "model", (stage / "config.json").stat().st_mtime_ns))
    raise ConfigError(
        f"no trained language model in '{path}'; expected a run with a finished stage that writes one "
        "(sft, model), or a model directory"
    )


def say(console: Console, text: str, style: str = "") -> None:
    """Print text as it is: no markup, no control characters; nothing if it is empty."""
    if text:
        console.print(Text(clean_text(text), style), highlight=False, soft_wrap=not console.is_terminal)


def _finished(path: Path) -> Iterator[Path]:
    """Directories in a run with a whole model; ``stage.json`` is written before it, ``done.json`` after."""
    for config in path.glob("*/config.json"):
        if (config.parent / "done.json").exists() or not (config.parent / "stage.json").exists():
            yield config.parent


def _kind(path: Path) -> str:
    """The network's class, as ``config.json`` names it."""
    try:
        return str((json.loads((path / "config.json").read_text()).get("architectures") or ["unnamed"])[0])
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path / 'config.json'} can't be read ({error}); expected one of save_pretrained") from error


def _is_language_model(path: Path) -> bool:
    return _kind(path).endswith(("ForCausalLM", "LMHeadModel"))


def _command(line: str, talk: _Talk, console: Console) -> None:
    """Do what a line that starts with a slash asks for."""
    if line == "/reset":
        talk.history.clear()
        say(console, "forgotten", "dim")
    elif line == "/help":
        for name, about in COMMANDS.items():
            say(console, f"{name:<8}{about}")
    else:
        say(console, f"unknown command '{line}'; {suggest(line, COMMANDS)}", "red")


@dataclass
class _Talk:
    """A conversation with a model that reads at most ``window`` tokens; ``asked`` keys the draws."""

    tokenizer: Any
    engine: LocalEngine
    sampling: Sampling
    window: int
    history: list[Message] = field(default_factory=list[Message])
    asked: int = 0

    def answer(self, text: str) -> tuple[str, str]:
        """The model's answer and notes on it; a line that can't be answered stays out of the history."""
        self.asked += 1
        try:
            text.encode()  # typed bytes that are no UTF-8 become lone surrogates, which no tokenizer takes
            kept, ids = self._fit([*self.history, Message(role="user", content=text)])
        except (PosttrainError, UnicodeEncodeError) as error:
            return "", f"not answered: {error}"
        rollout = self.engine.generate([Request(tuple(ids), ("chat", self.asked))], self.sampling)[0]
        shown = rollout.ids if rollout.truncated else rollout.ids[:-1]
        reply = self.tokenizer.decode(shown, skip_special_tokens=True).strip()
        lost = (len(self.history) + 1 - len(kept)) // 2
        self.history = [*kept, Message(role="assistant", content=reply)]
        notes = {
            "(an empty answer)": not reply,
            f"(cut at {self.sampling.max_new_tokens} tokens)": rollout.truncated,
            f"(forgot your oldest lines, {lost} of them: the model reads {self.window} tokens)": lost,
        }
        return reply, " ".join(note for note, holds in notes.items() if holds)

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The newest turns that leave room for an answer, and their ids."""
        room = self.window - self.sampling.max_new_tokens
        for start in range(0, len(messages), 2):
            ids = render_prompt(self.tokenizer, messages[start:])
            if len(ids) <= room:
                return messages[start:], ids
        raise ConfigError(f"the line is too long: got {len(ids)} tokens, room for {room} beside an answer; shorten it")


def _load(directory: Path) -> _Talk:
    """Load a model directory; its template and stop token are tried at once."""
    try:
        tokenizer = load_tokenizer(str(directory))
        model = load_policy(str(directory), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"'{directory}' can't be loaded ({error}); expected weights and tokenizer") from error
    render_prompt(tokenizer, [Message(role="user", content="hello")])
    stops = stop_ids(tokenizer, load_generation_config(str(directory)))
    config: Any = model.net.config
    window = int(getattr(config, "max_position_embeddings", None) or 2**31)
    sampling = Sampling(max_new_tokens=min(LONGEST, window // 2), temperature=0.7, top_p=0.9)
    return _Talk(tokenizer, LocalEngine(model, stops, slots=1), sampling, window)
