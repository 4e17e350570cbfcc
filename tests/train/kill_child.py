"""Kills runs of the small model and compares each, resumed, with the one that nobody disturbed.

The process imports everything once; each run is a child forked from it. ``python kill_child.py DIRECTORY --kills N`` does
N kills and prints a summary as JSON; called again on the same directory it goes on. A kill is SIGKILL: from outside at a
random instant of the run ("clock") or after a save began ("save"), or by the process itself right after so many saves became
visible, backward passes or updates were made ("saved", "backward", "update").
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # so that no child pays for it
from rich.console import Console

import posttrain
from posttrain import stages
from posttrain.runner import run_recipe
from posttrain.stages import SFT, Recipe, Reinforce, TrainReward
from posttrain.train.log import METRICS

DATA = {"data": "smallworld", "dtype": "float32", "lora_rank": 0, "lr": 1e-3}
MODELS = {"base": "small-base", "instruct": "small"}
FEW: dict[str, Any] = {}  # fewer rows and steps, for a model that is slow
OWN = ("checkpoints", "journal", "tensorboard")  # what a stage keeps for itself


def reward(**changes: Any) -> TrainReward:
    numbers: dict[str, Any] = {"limit": 12, "prompts_per_step": 4, "epochs": 2.0, "max_tokens": 300} | FEW | changes
    return TrainReward(model=MODELS["instruct"], **DATA, **numbers)


def sft() -> Recipe:
    """Two epochs of three steps, several micro-batches each."""
    numbers: dict[str, Any] = {"limit": 12, "prompts_per_step": 4, "epochs": 2.0, "max_tokens": 64, "save_every": 1}
    numbers |= FEW
    return Recipe("sft", {"stage": SFT(model=MODELS["base"], **DATA, **numbers)})


def reward_model() -> Recipe:
    return Recipe("reward", {"stage": reward(save_every=1)})


def ppo() -> Recipe:
    """Three rollouts with two updates each."""
    numbers: dict[str, Any] = {"prompts_per_step": 4, "samples_per_prompt": 2, "updates_per_rollout": 2, "steps": 6}
    numbers |= {"max_new_tokens": 12, "limit": 8, "max_tokens": 64, "save_every": 1, "value_lr": 1e-3}
    if FEW:  # two rollouts
        numbers |= {"limit": 4, "prompts_per_step": 2, "steps": 4, "max_new_tokens": 6}
    scorer = reward(limit=2 if FEW else 4, epochs=1.0)
    more = DATA | {"lora_rank": 4}
    stage = Reinforce(model=MODELS["instruct"], reward=scorer, **more, **numbers)
    return Recipe("ppo", {"scorer": scorer, "stage": stage})


def dpo() -> Recipe:
    numbers: dict[str, Any] = {"limit": 12, "prompts_per_step": 4, "epochs": 2.0, "max_tokens": 200, "save_every": 1}
    numbers |= {"warmup_steps": 2} | FEW
    return Recipe("dpo", {"stage": stages.Prefer(model=MODELS["instruct"], **DATA, **numbers)})


METHODS: dict[str, Callable[[], Recipe]] = {"sft": sft, "reward": reward_model, "ppo": ppo}
if hasattr(stages, "Prefer"):
    METHODS["dpo"] = dpo


# ---------------------------------------------------------------------------- one child


def watch(pipe: int, strike: int) -> None:
    """Tell the parent when a save begins (b) and when it is about to become visible (r); die after ``strike`` are visible."""
    seen = [0]

    def heard(event: str, args: tuple[Any, ...]) -> None:
        with suppress(OSError):  # nobody listens
            if event == "os.mkdir" and ".step-" in str(args[0]):
                os.write(pipe, b"b")
            elif event == "os.rename" and ".step-" in str(args[0]) and "/.step-" not in str(args[1]):
                os.write(pipe, b"r")
        if strike and event == "open" and str(args[0]).endswith("/checkpoints"):  # to force the new name to disk
            seen[0] += 1
            if seen[0] == strike:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)


def strike_after(owner: Any, name: str, count: int) -> None:
    """Kill this process right after the ``count``-th call of a function of torch."""
    original, calls = getattr(owner, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def child(recipe: Recipe, place: Path, kind: str, count: int) -> tuple[int, int]:
    """Fork a process that runs the recipe in ``place``; returns its id and the end of a pipe that it tells saves on."""
    inward, outward = os.pipe()
    pid = os.fork()
    if pid:
        os.close(outward)
        return pid, inward
    code = 70
    try:
        os.close(inward)
        place.mkdir(parents=True, exist_ok=True)
        log = os.open(place / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
        watch(outward, count if kind == "saved" else 0)
        if kind == "backward":
            strike_after(torch.Tensor, "backward", count)
        elif kind == "update":
            strike_after(torch.optim.AdamW, "step", count)
        with os.fdopen(1, "w", buffering=1, closefd=False) as file:
            run_recipe(recipe, root=place, name="run", console=Console(file=file, width=200), command="again")
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(code)


def told(pipe: int, wanted: bytes, count: int, limit: float = 120.0) -> bool:
    """Wait until the child told the ``count``-th event of a kind; False if it ended before."""
    seen, end = 0, time.monotonic() + limit
    while time.monotonic() < end:
        if select.select([pipe], [], [], 1.0)[0]:
            byte = os.read(pipe, 1)
            if not byte:
                return False
            seen += byte == wanted
            if seen == count:
                return True
    return False


def finish(pid: int, pipe: int, sig: int | None = None) -> int:
    """Signal a child, if asked to, and wait for it; returns its exit status, negative for a signal's."""
    if sig is not None:
        os.kill(pid, sig)
    os.close(pipe)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------------------- comparison


def outcome(place: Path) -> dict[str, str]:
    """Hashes of all that a run leaves and that must not depend on interruptions: weights, samples, metrics, last checkpoint."""
    found: dict[str, str] = {}
    for path in sorted((place / "run" / "stage").rglob("*")):
        name = path.relative_to(place / "run" / "stage")
        if path.is_dir() or name.parts[0] in OWN or path.name in ("stage.json", "done.json"):
            continue
        found[str(name)] = digest(timeless(path) if path.name == "metrics.jsonl" else path.read_bytes())
    last = max((place / "run" / "stage" / "checkpoints").glob("step-*"))
    found[f"checkpoints/{last.name}"] = digest((last / "tensors.safetensors").read_bytes())
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def timeless(path: Path) -> bytes:
    """Metrics without those that measure time or memory."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k == "step" or not METRICS[k].wall_clock} for line in lines]
    return json.dumps(kept).encode()


def differences(one: dict[str, str], two: dict[str, str]) -> list[str]:
    return [name for name in sorted({**one, **two}) if one.get(name) != two.get(name)]


# ---------------------------------------------------------------------------- trials


class Method:
    """A recipe, its undisturbed run, and how long that took."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self.recipe, self.whole = name, METHODS[name](), root / f"whole-{name}"
        timing = root / f"whole-{name}.json"
        if not timing.exists():
            shutil.rmtree(self.whole, ignore_errors=True)
            if len(self.recipe.stages) > 1:  # earlier stages first: what is timed and killed is the last
                pid, pipe = child(Recipe("r", dict(list(self.recipe.stages.items())[:-1])), self.whole, "", 0)
                assert finish(pid, pipe) == 0, (self.whole / "log.txt").read_text()
            self.earlier = sorted(p.name for p in (self.whole / "run").glob("*/")) if self.whole.exists() else []
            began = time.monotonic()
            pid, pipe = child(self.recipe, self.whole, "", 0)
            begins, ends = [], []
            while byte := os.read(pipe, 1):
                (begins if byte == b"b" else ends).append(time.monotonic() - began)
            assert finish(pid, pipe) == 0, (self.whole / "log.txt").read_text()
            timing.write_text(json.dumps([time.monotonic() - began, begins, ends, self.earlier]))
        self.seconds, begins, ends, self.earlier = json.loads(timing.read_text())
        self.saves, self.save_seconds = len(begins), sum(ends) / len(ends) - sum(begins) / len(begins)
        self.expected = outcome(self.whole)

    def prepare(self, place: Path) -> None:
        """A directory with the stages before the last one finished."""
        shutil.rmtree(place, ignore_errors=True)
        for name in self.earlier:
            shutil.copytree(self.whole / "run" / name, place / "run" / name)


def kill(method: Method, place: Path, kind: str, count: int, delay: float) -> bool:
    """Run and kill; False if the run ended first."""
    pid, pipe = child(method.recipe, place, kind, count)
    if kind == "clock":
        time.sleep(delay)
    elif kind == "save":
        told(pipe, b"b", count)
        time.sleep(delay)
    own = kind in ("saved", "backward", "update")
    return finish(pid, pipe, None if own else signal.SIGKILL) == -signal.SIGKILL


def trial(method: Method, place: Path, kind: str, count: int, delay: float) -> dict[str, Any] | None:
    """One kill and the run that goes on from it; None if there was nothing left to kill."""
    method.prepare(place)
    if not kill(method, place, kind, count, delay):
        return None
    inside = any((place / "run" / "stage" / "checkpoints").glob(".step-*.tmp"))
    (place / "log.txt").unlink(missing_ok=True)
    status = finish(*child(method.recipe, place, "", 0))
    log = (place / "log.txt").read_text()
    resumed = re.search(r"continuing after step (\d+)", log)
    wrong = differences(method.expected, outcome(place)) if status == 0 else [f"exit {status}: {log[-2000:]}"]
    record = {"method": method.name, "kind": kind, "count": count, "delay": round(delay, 6), "inside": inside}
    record |= {"resumed": int(resumed[1]) if resumed else 0, "refused": log.count("can't be used"), "wrong": wrong}
    if not wrong:
        shutil.rmtree(place)
    return record


def draws(method: Method, seed: str) -> Iterator[tuple[str, int, float]]:
    """Random instants: three in five anywhere in the run, two in five aimed at a save."""
    draw = random.Random(seed)
    while True:
        if draw.random() < 0.6:
            yield "clock", 0, draw.uniform(0, method.seconds)
        else:
            yield "save", draw.randint(1, method.saves), draw.uniform(0, 1.2 * method.save_seconds)


def trials(root: Path, kills: int, seed: int, names: list[str]) -> list[dict[str, Any]]:
    """``kills`` trials over the methods in turn, going on from those recorded in ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    file = root / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    methods = {name: Method(root, name) for name in names}
    for number in range(len(done), kills):
        method = methods[names[number % len(names)]]
        for instant in draws(method, f"{seed} {number}"):
            began = time.monotonic()
            record = trial(method, root / f"trial-{number}", *instant)
            if record is not None:
                break
        record = {"number": number, **record, "seconds": round(time.monotonic() - began, 2)}
        done.append(record)
        with file.open("a") as out:
            out.write(json.dumps(record) + "\n")
    return done


def fixed(root: Path) -> list[dict[str, Any]]:
    """Kills at chosen places."""
    cases = [
        ("sft", "backward", 2),  # in the middle of the first step's gradient
        ("sft", "update", 3),  # the last update of an epoch, not yet logged
        ("sft", "saved", 3),  # between two epochs
        ("ppo", "saved", 3),  # between two updates on one rollout
        ("ppo", "backward", 7),
    ]
    out = []
    for method, kind, count in cases:
        record = trial(Method(root, method), root / f"fixed-{method}-{kind}-{count}", kind, count, 0.0)
        out.append(
            record or {"method": method, "kind": kind, "count": count, "wrong": ["the run ended before the kill"]}
        )
    return out


def once(root: Path, names: list[str]) -> list[dict[str, Any] | None]:
    """Each method killed after its third save, which for PPO lies between two updates on one rollout."""
    out = []
    for name in names:
        out.append(trial(Method(root, name), root / f"once-{name}", "saved", 3, 0.0))
        if out[-1] and not out[-1]["wrong"]:  # half a gigabyte of weights
            (root / f"whole-{name}.json").unlink()
            shutil.rmtree(root / f"whole-{name}")
    return out


def polite(root: Path, name: str, sig: int) -> dict[str, Any]:
    """Ask a run to stop after its second save began; it must end by itself, with a checkpoint of the step it was making."""
    method, place = Method(root, name), root / f"polite-{name}-{sig}"
    method.prepare(place)
    pid, pipe = child(method.recipe, place, "", 0)
    told(pipe, b"b", 2)
    status = finish(pid, pipe, sig)
    log = (place / "log.txt").read_text()
    left = sorted(path.name for path in (place / "run" / "stage" / "checkpoints").iterdir())
    again = finish(*child(method.recipe, place, "", 0))
    resumed = re.search(r"continuing after step (\d+)", (place / "log.txt").read_text())
    wrong = differences(method.expected, outcome(place)) if again == 0 else [f"exit {again}"]
    return {"status": status, "log": log, "left": left, "resumed": int(resumed[1]) if resumed else 0, "wrong": wrong}


def warm() -> None:
    """Import all that a child would import, so that it starts at once and every child runs the same code."""
    for module in pkgutil.walk_packages(posttrain.__path__, "posttrain."):
        importlib.import_module(module.name)
    from posttrain.models.load import find_model, load_policy, load_tokenizer
    from posttrain.models.lora import Lora

    for name in set(MODELS.values()):
        path = find_model(name).path
        load_tokenizer(path)
        load_policy(path, dtype=torch.float32, lora=Lora(rank=4, alpha=8), train=True, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--polite", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--model", help="train adapters of this model, on fewer rows, instead of all of the small one")
    args = parser.parse_args()
    if args.model:
        MODELS.update(base=args.model, instruct=args.model)
        DATA["lora_rank"] = 4
        FEW.update(limit=4, prompts_per_step=2, epochs=2.0)  # four steps, of which PPO makes two a rollout
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    warm()
    began = time.monotonic()
    report: dict[str, Any] = {"trials": []}
    if args.kills:
        report["trials"] = trials(args.directory, args.kills, args.seed, args.methods)
    if args.fixed:
        report["fixed"] = fixed(args.directory)
    if args.once:
        report["once"] = once(args.directory, args.methods)
    if args.polite:
        report["polite"] = [polite(args.directory, "ppo", s) for s in (signal.SIGTERM, signal.SIGINT)]
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
