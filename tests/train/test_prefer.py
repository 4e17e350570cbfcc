"""Preference objectives: what they compute, in one pass or two, by weight, against a kept reference."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import CheckError, ConfigError
from posttrain.forest import build_forest, split, take
from posttrain.losses.preference import margin
from posttrain.models import lora as adapters
from posttrain.models.lora import Lora, add_adapter
from posttrain.models.policy import Model
from posttrain.train.log import METRICS
from posttrain.train.loop import _accumulate, fit
from posttrain.train.objectives import Preference, RewardModel, Supervised
from posttrain.train.optim import Optim
from posttrain.train.reference import reference_key, reference_logp, row_logp
from posttrain.train.sources import demonstration_source, ranking_source

from .cases import gradients
from .test_invariance import rows_of
from .tiny import metrics, network, random_rows, role, run_in

SHAPE = [(5, [4, 7, 3]), (9, [6, 5]), (2, [8, 8]), (12, [5, 1, 9, 2])]
RANKS = [[0, 1, 2], [1, 0], [0, 1], [0, 2, 1, 1]]
near = partial(pytest.approx, rel=1e-9, abs=1e-9)


def centred(pairs, *, beta: float = 0.5):
    """A loss whose every pair depends on all the others."""
    d = beta * margin(pairs)
    return (d - d.mean()).square() + torch.nn.functional.softplus(-d) * d.detach().std()


class Coupled(Preference):
    coupled = True


def rankings(seed=2):
    return random_rows(seed, SHAPE)


def source_of(rows, *, weights=None, per_step=4, ranks=RANKS):
    ref = row_logp(role(7, trained=False), rows, max_tokens=10_000)
    return ranking_source(rows, ranks, per_step=per_step, seed=0, weights=weights, ref_logp=ref)


def same(one, two, atol=1e-10):
    (found, grads, _), (expected, theirs, _) = one, two
    assert found == near(expected) and grads.keys() == theirs.keys()
    assert max(float(g.abs().max()) for g in theirs.values()) > 1e-4
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name], atol=atol, rtol=atol, msg=name)


# ---------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("objective", [Preference("dpo", {"beta": 0.7}), Coupled(centred, {"beta": 0.7})])
def test_micro_batches_and_row_order_change_nothing(objective):
    models, batch = {"policy": role(0)}, source_of(rankings())(0)
    assert objective.coupled is isinstance(objective, Coupled)
    whole = gradients(models, objective, batch, 10_000)
    assert whole[2] == 1 and whole[0].keys() <= METRICS.keys()
    for max_tokens in (20, 40):
        cut = gradients(models, objective, batch, max_tokens)
        assert cut[2] > 1
        same(cut, whole)
    trees = [(t, range(len(tree.branches))) for t, tree in enumerate(batch.forest.trees)]
    same(gradients(models, objective, take(batch, [*reversed(trees)]), 20), whole)


def test_an_uncoupled_objective_gives_the_same_in_two_passes():
    models, batch = {"policy": role(0)}, source_of(rankings(), weights=[1.0, 0.5, 2.0, 1.0])(0)
    one = gradients(models, Preference("dpo", {"beta": 0.7}), batch, 20)
    two = gradients(models, Coupled("dpo", {"beta": 0.7}), batch, 20)
    assert one[2] > 2
    same(two, one)


def test_two_passes_are_needed_where_rows_are_coupled():
    models, batch = {"policy": role(0)}, source_of(rankings())(0)
    whole = gradients(models, Preference(centred), batch, 10_000)
    wrong = gradients(models, Preference(centred), batch, 40)
    assert wrong[0]["loss/preference"] != near(whole[0]["loss/preference"])


def test_all_pairs_of_a_ranking_by_plain_rows():
    beta, rows = 0.7, rankings()
    models, batch = {"policy": role(0)}, source_of(rows)(0)
    found, grads, _ = gradients(models, Preference("dpo", {"beta": beta}), batch, 30)
    net, reference = network(0), network(7)

    def logps(net):
        sums, tokens = [], []
        for prompt, response, marks in rows_of(batch.forest):
            logits = net(torch.cat([prompt, response])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(1)[torch.arange(len(response)), response][marks["loss"]]
            sums.append(logp.sum())
            tokens.append(logp)
        return sums, torch.cat(tokens)

    policy, own = logps(net)
    with torch.no_grad():
        ref, theirs = logps(reference)
    rank, group = batch.branches["rank"].tolist(), batch.forest.group.tolist()
    losses, rewards, right = [], [], []
    for tree in range(len(batch.forest.trees)):
        members = [i for i, g in enumerate(group) if g == tree]
        pairs = [(i, j) for i in members for j in members if rank[i] < rank[j]]
        gaps = [beta * ((policy[i] - ref[i]) - (policy[j] - ref[j])) for i, j in pairs]
        losses.append(torch.stack([(1 + (-g).exp()).log() for g in gaps]).mean())
        rewards.append(beta * sum(float(policy[i] - ref[i]) for i, _ in pairs) / len(pairs))
        right.append(sum(float(g > 0) for g in gaps) / len(gaps))
    loss = torch.stack(losses).mean()
    assert found["loss/preference"] == found["loss/total"] == near(loss.item())
    assert found["reward/chosen"] == near(sum(rewards) / 4) and found["accuracy/pairs"] == near(sum(right) / 4)
    assert found["reward/margin"] == near(found["reward/chosen"] - found["reward/rejected"])
    d = (own - theirs).detach()
    assert found["kl/data"] == near((d.exp() - 1 - d).mean().item())
    loss.backward()
    for key, parameter in net.named_parameters():
        torch.testing.assert_close(grads[f"policy/{key}"], parameter.grad, atol=1e-9, rtol=0)


# ---------------------------------------------------------------------------- weights


def supervised(rows, weights=None):
    return {"policy": role(0)}, Supervised(), demonstration_source(rows, per_step=9, seed=0, weights=weights)(0)


def ranked(rows, weights=None, ranks=RANKS):
    source = ranking_source(rows, ranks, per_step=9, seed=0, weights=weights)
    return {"reward": role(0, scalar=True)}, RewardModel(), source(0)


def preferred(rows, weights=None, ranks=RANKS):
    return {"policy": role(0)}, Preference(), source_of(rows, weights=weights, per_step=9, ranks=ranks)(0)


@pytest.mark.parametrize("make", [supervised, ranked, preferred])
def test_a_row_of_weight_2_counts_as_two_rows_and_one_of_weight_0_as_none(make):
    rows = rankings()
    twice = [rows[0], rows[1], rows[1], rows[3]]
    given = {} if make is supervised else {"ranks": [RANKS[0], RANKS[1], RANKS[1], RANKS[3]]}
    found, grads, _ = gradients(*make(rows, [1.0, 2.0, 0.0, 1.0]), 30)
    expected, theirs, _ = gradients(*make(twice, **given), 30)
    unweighted = {"score/mean"}  # of responses as they are forwarded
    for key in expected.keys() - unweighted:
        assert found[key] == near(expected[key]), key
    for name, grad in grads.items():
        torch.testing.assert_close(grad, theirs[name], atol=1e-10, rtol=1e-10, msg=name)
    scaled = gradients(*make(rows, [3.0, 6.0, 0.0, 3.0]), 30)
    same(scaled, (found, grads, 0))  # only their proportions count
    plain = gradients(*make(rows, None), 30)
    assert plain[0]["loss/total"] != near(found["loss/total"])


def test_weights_that_mean_nothing_are_refused():
    rows = rankings()
    with pytest.raises(ConfigError, match="got 2 weights for 4 rows"):
        demonstration_source(rows, per_step=2, seed=0, weights=[1, 1])
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"row 1 \(from 0\) has weight"):
            demonstration_source(rows, per_step=2, seed=0, weights=[1, bad, 1, 1])
    with pytest.raises(ConfigError, match="got 0 rows"):
        demonstration_source(rows, per_step=2, seed=0, weights=[0, 0, 0, 0])


# ---------------------------------------------------------------------------- the first step


def start(tmp_path, policy_seed, steps=2, objective=None):
    models, run = {"policy": role(policy_seed)}, run_in(tmp_path, steps=steps, save_every=1)
    fit(models, objective or Preference(), source_of(rankings(), per_step=2), optim=Optim(lr=0.05), run=run)
    return run.console.file.getvalue()


def test_a_policy_that_is_its_reference_starts_at_log_2(tmp_path):
    printed = start(tmp_path, 7, steps=6, objective=Preference(tolerance=1e-9))
    assert "0.693147 at the reference" in printed and "FAILED" not in printed
    lines = metrics(tmp_path)
    assert lines[0]["loss/preference"] == near(math.log(2)) and lines[0]["reward/margin"] == near(0)
    assert lines[0]["kl/data"] == near(0) and lines[-1]["kl/data"] > 1e-3
    assert lines[-1]["loss/preference"] < 0.65 and lines[-1]["accuracy/pairs"] > 0.7


def test_a_run_that_goes_on_is_not_held_to_the_start(tmp_path):
    objective = Preference(tolerance=1e-9)
    start(tmp_path, 7, steps=2, objective=objective)
    printed = start(tmp_path, 7, steps=4, objective=objective)
    assert "continuing after step 2" in printed and "FAILED" not in printed
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]


def test_another_policy_than_the_reference_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(CheckError, match=r"margin to the reference: got at most .* nats, expected 0 within 0\.001"):
        start(tmp_path, 0)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("step-*"))


# ---------------------------------------------------------------------------- the kept reference


def kept(model, rows, cache, said=None):
    lines = [] if said is None else said
    return reference_logp(model, rows, max_tokens=30, cache=cache, say=lines.append)


def test_the_reference_is_computed_once_and_read_back_to_the_bit(tmp_path):
    model, rows, said = role(7, trained=False), rankings(), []
    first = kept(model, rows, tmp_path, said)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    second = kept(model, rows, tmp_path, said)
    assert [len(x) for x in first] == [sum(lengths) for _, lengths in SHAPE]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert file.stat().st_mtime_ns == before and said == []
    masks = [torch.tensor([m for b in row.branches for m in b.masks["loss"]]) for row in rows]
    assert all((x[~m] == 0).all() and (x[m] < 0).all() for x, m in zip(first, masks, strict=True))


def test_a_reference_is_kept_for_each_packing(tmp_path):
    """Packed otherwise, last bits differ: a run must not get another's, which may be there today and gone tomorrow."""
    model, rows = role(7, trained=False, dtype=torch.float32), rankings()
    for max_tokens in (30, 10_000, 30):
        found = reference_logp(model, rows, max_tokens=max_tokens, cache=tmp_path)
        own = row_logp(model, rows, max_tokens=max_tokens)
        assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_kept_reference_that_is_wrong_is_named_and_made_again(tmp_path):
    model, rows, said = role(7, trained=False), rankings(), []
    first = kept(model, rows, tmp_path)
    (file,) = tmp_path.iterdir()
    values = load_file(file)["logp"].clone()  # not a view of the file that is overwritten below
    for content, words in (
        ({"logp": values + 0.5}, "rows computed again differ by"),
        ({"logp": values * math.nan}, "rows computed again differ by nan"),
        ({"logp": values[:-1]}, "tokens, of another data set"),
        ({"other": values}, "can't be read"),
        (None, "can't be read"),
    ):
        if content is None:
            file.write_bytes(file.read_bytes()[:40])
        else:
            save_file(content, file)
        again = kept(model, rows, tmp_path, said)
        assert words in said[-1] and str(file) in said[-1] and "computing" in said[-1]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(load_file(file)["logp"], values)
    assert len(said) == 5


def test_the_key_holds_all_that_decides_the_numbers():
    rows, model = rankings(), role(7, trained=False)
    forest = build_forest(rows)
    keys = {"same": reference_key(role(7), forest, "loss")}
    assert keys["same"] == reference_key(model, forest, "loss")
    one = role(7)
    with torch.no_grad():
        one.net.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    keys["weight"] = reference_key(one, forest, "loss")
    keys["dtype"] = reference_key(role(7, dtype=torch.float32), forest, "loss")
    keys["plain"] = reference_key(replace(model, plain=True), forest, "loss")
    other = role(7)
    other.net.config.rms_norm_eps *= 2
    keys["configuration"] = reference_key(other, forest, "loss")
    for name, change in (("ids", 1), ("positions", 1), ("masks", None)):
        changed = replace(forest)
        if name == "masks":
            changed = replace(forest, masks={"loss": ~forest.masks["loss"]})
        else:
            tensor = getattr(forest, name).clone()
            tensor[3] += change
            changed = replace(forest, **{name: tensor})
        keys[name] = reference_key(model, changed, "loss")
    assert len(set(keys.values())) == len(keys)


def test_an_adapter_that_is_off_leaves_the_key_and_one_that_is_on_does_not():
    rows, model = rankings(), role(7, trained=False)
    forest = build_forest(rows)
    plain = reference_key(model, forest, "loss")
    add_adapter(model.net, model.net.base_model, "policy", Lora(rank=2, alpha=4), 0)
    assert reference_key(Model(model.net), forest, "loss") == plain
    on = Model(model.net, adapter="policy")
    keys = [plain, reference_key(on, forest, "loss")]
    with torch.no_grad():
        next(iter(adapters.parameters(model.net, "policy").values())).add_(1.0)
    keys.append(reference_key(on, forest, "loss"))
    add_adapter(model.net, model.net.base_model, "other", Lora(rank=2, alpha=4), 1)
    assert len(set(keys)) == 3 and reference_key(on, forest, "loss") == keys[-1]


def test_a_step_has_the_reference_of_its_own_rows():
    rows = rankings()
    source, objective = source_of(rows, per_step=3), Preference()
    for step in range(4):
        batch = source(step)
        found = _accumulate({"policy": role(7)}, objective, batch, split(batch, 30, True), step)
        assert found["reward/chosen"] == near(0) and found["kl/data"] == near(0)
