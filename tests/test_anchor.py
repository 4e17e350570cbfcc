"""A reference that follows the policy: the anchor of WARP's KL penalty."""

from __future__ import annotations

import json

import pytest
import torch

from caches import own_cache
from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.stages import Reinforce
from posttrain.train.ema import Average
from posttrain.train.optim import MasterAdamW, Optim
from train.tiny import role


def test_the_follower_is_the_average_after_each_update_and_after_a_checkpoint_is_read():
    policy, anchor = role(0), role(0)
    average = Average(0.75, into=dict(anchor.net.named_parameters()))
    optimizer = MasterAdamW({"policy": policy.parameters()}, Optim(lr=0.1, average=average))
    start = {name: p.detach().clone() for name, p in policy.parameters().items()}
    for p in policy.parameters().values():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    for name, p in anchor.net.named_parameters():
        torch.testing.assert_close(p.detach(), 0.75 * start[name] + 0.25 * policy.parameters()[name].detach())
    kept = {name: x.clone() for name, x in optimizer.tensors().items()}
    after = {name: p.detach().clone() for name, p in anchor.net.named_parameters()}
    for p in policy.parameters().values():
        p.grad = torch.ones_like(p)
    optimizer.step(1.0)
    optimizer.load(kept)
    assert all(torch.equal(p, after[name]) for name, p in anchor.net.named_parameters())


@pytest.mark.parametrize(
    "given", [{"anchor": 1.0}, {"anchor": -0.1}, {"anchor": 0.1, "lora_rank": 8}, {"anchor": 0.1, "ema": 0.9}]
)
def test_what_an_anchor_can_not_stand_beside(given):
    with pytest.raises(ConfigError, match=r"got anchor=.*expected a rate between 0 and 1, the whole policy trained"):
        Reinforce(reward="number", **given)


def test_the_kl_is_to_a_reference_that_follows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "short.py").write_text("def score(prompt, answer):\n    return -float(len(answer))\n")
    found = {}
    for anchor in ("0", "0.9"):
        options = f"--reward short:score --tiny --lora-rank 0 --lr 3e-4 --steps 4 --warmup-steps 1 --anchor {anchor}"
        assert main(["train", "rloo", *options.split(), "--name", f"run{anchor}"]) == 0
        rows = (tmp_path / f"runs/run{anchor}/rloo/metrics.jsonl").read_text().splitlines()
        found[anchor] = [json.loads(row)["kl/mean"] for row in rows]
    assert found["0"][0] == found["0.9"][0] == pytest.approx(0, abs=1e-4)
    assert found["0"][1] != found["0.9"][1] and abs(found["0.9"][3]) < abs(found["0"][3])
