"""TRL's losses on given logits, run by the Python of TRL's environment: ``python peer_losses.py JOB``.

Each trainer computes its loss itself; it is made without its constructor, and the network that it calls gives the job's logits.
Of every case come back the loss and its gradient with respect to the policy's logits of all rows.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from trl import DPOTrainer, KTOTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.cpo import CPOTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.orpo import ORPOTrainer  # pyright: ignore[reportMissingImports]

Job = dict[str, Any]

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)


class Network:
    """A network that has an answer ready for each batch of token ids: its logits ``[rows, T, V]``."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, known: list[tuple[Tensor, Tensor]]) -> None:
        self.known = known
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def __call__(self, input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> SimpleNamespace:
        """Logits, and of the labelled tokens what TRL's fused output layer gives: log-probabilities, 0 elsewhere."""
        logits = next(found for ids, found in self.known if torch.equal(ids, input_ids))
        logp = logits[:, :-1].log_softmax(-1)
        ids = input_ids if labels is None else labels
        wanted = ids[:, 1:] != -100
        chosen = logp.gather(-1, ids[:, 1:].clamp(min=0)[..., None])[..., 0]
        flat = torch.zeros_like(chosen)
        return SimpleNamespace(
            logits=logits,
            log_probs=torch.where(wanted, chosen, 0.0),
            log_sum_sq_probs=(2 * logp).logsumexp(-1),
            entropy=flat,
            mean_logits=flat,
            is_top1=flat > 0,
            aux_loss=None,
        )


def bare(kind: Any, **attributes: Any) -> Any:
    """A trainer without its constructor, with what its loss reads."""
    trainer = object.__new__(kind)
    common = {"accelerator": ACCELERATOR, "aux_loss_enabled": False, "_metrics": defaultdict(lambda: defaultdict(list))}
    common |= {"args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05)}
    common |= {"precompute_ref_logps": False, "_total_train_tokens": 0, "_tp_size": 1}
    for name, value in (common | attributes).items():
        object.__setattr__(trainer, name, value)
    return trainer


def dpo(policy: Network, reference: Network, data: dict[str, Tensor], options: Job) -> Tensor:
    """`DPOTrainer`: ``loss_type`` and its kin."""
    trainer = bare(
        DPOTrainer,
        model=policy,
        ref_model=reference,
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        loss_types=options.get("loss_type", ["sigmoid"]),
        loss_weights=options.get("loss_weights", [1.0] * len(options.get("loss_type", ["sigmoid"]))),
        beta=options.get("beta", 0.1),
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=options.get("use_weighting", False),
    )
    inputs = {name: data[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    return trainer._compute_loss(policy, inputs, False)


def kto(policy: Network, reference: Network, data: dict[str, Tensor], options: Job) -> Tensor:
    """`KTOTrainer`, whose rows are the same responses, each labelled, with other prompts' answers for its KL."""
    trainer = bare(
        KTOTrainer,
        model=policy,
        ref_model=reference,
        calculate_KL=options["loss_type"] == "kto",
        loss_type=options["loss_type"],
        beta=options.get("beta", 0.1),
        desirable_weight=options.get("desirable_weight", 1.0),
        undesirable_weight=options.get("undesirable_weight", 1.0),
    )
    inputs = {name: data[name] for name in ("input_ids", "attention_mask", "completion_mask")} | {
        "label": data["label"],
        "KL_input_ids": data["other_ids"],
        "KL_attention_mask": data["other_attention_mask"],
        "KL_completion_mask": data["other_completion_mask"],
    }
    return trainer._compute_loss(policy, inputs, False)


def sides(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Chosen and rejected rows as the trainers without a reference take them."""
    labels = data["input_ids"].masked_fill(data["completion_mask"] == 0, -100)
    out: dict[str, Tensor] = {}
    for k, side in enumerate(("chosen", "rejected")):
        out[f"{side}_input_ids"] = data["input_ids"].chunk(2)[k]
        out[f"{side}_attention_mask"] = data["attention_mask"].chunk(2)[k]
        out[f"{side}_labels"] = labels.chunk(2)[k]
    return out


def cpo(policy: Network, reference: Network, data: dict[str, Tensor], options: Job) -> Tensor:
    """`CPOTrainer`, SimPO among its losses."""
    settings = {"alpha": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "label_smoothing": 0.0, "beta": 0.1} | options
    trainer = bare(CPOTrainer, model=policy, is_encoder_decoder=False, pad_token_id=0, **settings)
    return trainer.get_batch_loss_metrics(policy, sides(data))[0]


def orpo(policy: Network, reference: Network, data: dict[str, Tensor], options: Job) -> Tensor:
    """`ORPOTrainer`."""
    trainer = bare(ORPOTrainer, model=policy, is_encoder_decoder=False, padding_value=0, beta=options["beta"])
    return trainer.get_batch_loss_metrics(policy, sides(data))[0]


TRAINERS = {"dpo": dpo, "kto": kto, "cpo": cpo, "orpo": orpo}


def solve(job: Job, case: Job) -> Job:
    """The loss of one case and its gradient."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    data = {name: torch.tensor(x) for name, x in job["data"].items() if not name.endswith("logits")}
    logits = {name: torch.tensor(x, dtype=dtype) for name, x in job["data"].items() if name.endswith("logits")}
    leaf = logits["policy_logits"].requires_grad_(True)
    policy = Network([(data["input_ids"], leaf), (data["other_ids"], logits["other_policy_logits"])])
    reference = Network(
        [
            (data["input_ids"], logits["reference_logits"]),
            (data["other_ids"], logits["other_reference_logits"]),
        ]
    )
    loss = TRAINERS[case["trainer"]](policy, reference, data, case["options"])
    loss.backward()
    assert leaf.grad is not None
    return {"loss": float(loss.detach()), "gradient": leaf.grad.double().tolist()}


def main() -> None:
    """Solve a job's cases and write what they gave."""
    job = json.loads(Path(sys.argv[1]).read_text())
    found = {case["name"]: solve(job, case) for case in job["cases"]}
    Path(job["result"]).write_text(
        json.dumps({"versions": {"trl": trl.__version__, "torch": torch.__version__}, "cases": found})
    )


if __name__ == "__main__":
    main()
