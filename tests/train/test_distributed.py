"""Two ranks train what one does; a rank that fails, hangs or differs ends the others with its rank, phase and reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.forest import build_forest, take
from posttrain.train.distributed import ALONE, World, assign, fingerprint

from .cases import close, gradients, make, names
from .ranks_child import MODES, narrow, reinforce, supervised
from .tiny import equal, metrics, random_rows, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """All modes, run once."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "train.ranks_child", str(directory), *MODES]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT / "tests", env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def ended(directory, mode, rank):
    """How a rank ended, and after how many seconds."""
    found = json.loads((directory / f"{mode}-{rank}.json").read_text())
    return found["said"], found["seconds"]


def test_gradients_of_two_ranks_are_those_of_one(ranks):
    first, second = (load_file(ranks / f"gradients-{rank}.safetensors") for rank in range(2))
    numbers = [json.loads((ranks / f"numbers-{rank}.json").read_text()) for rank in range(2)]
    for name in names():
        models, objective, batch = make(name)
        for label, step in ((name, batch), (f"{name}, one prompt", take(batch, [(3, range(4))]))):
            found, expected, _ = gradients(models, objective, step, 30)
            mine = {k.removeprefix(f"{label}/"): g for k, g in first.items() if k.startswith(f"{label}/")}
            assert all(torch.equal(g, second[f"{label}/{k}"]) for k, g in mine.items())
            close(mine, expected)
            pooled, parts = numbers[0][label]
            total = {k: sum(rank.get(k, 0.0) for rank in pooled) for k in found}
            assert total == pytest.approx(found, rel=1e-9, abs=1e-9)
            assert parts > 0 and (numbers[1][label][1] == 0) == label.endswith("one prompt")


@pytest.mark.parametrize(("mode", "alone"), [("supervised", supervised), ("reinforce", reinforce)])
def test_a_run_on_two_ranks_is_the_run_on_one(ranks, tmp_path, mode, alone):
    assert [ended(ranks, mode, rank)[0] for rank in range(2)] == ["done", "done"]
    one, two = (load_file(ranks / f"{mode}-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(x, two[key]) for key, x in one.items())
    expected = weights(alone(tmp_path, 0))
    for key, x in expected.items():
        torch.testing.assert_close(one[key], x, atol=1e-8, rtol=1e-8, msg=key)
    lines = json.loads((ranks / f"{mode}-0-metrics.json").read_text())
    for line, wanted in zip(lines, metrics(tmp_path / f"{mode}-0"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert list((ranks / f"{mode}-0").glob("checkpoints/step-*")) and not list(
        (ranks / f"{mode}-1").glob("checkpoints/step-*")
    )


def test_in_fp32_ranks_differ_from_one_by_the_order_of_sums_alone(ranks, tmp_path):
    """Where one process sums the same parts it ends with the same bits; another order is what another packing is."""
    two = load_file(ranks / "narrow-0.safetensors")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks: the optimiser's rounding depends on how threads share a tensor
    same, packed = (weights(narrow(tmp_path / str(n), 0, max_tokens=n)) for n in (8, 60))
    torch.set_num_threads(threads)
    assert equal(two, same)
    apart = torch.cat([(two[key] - x).abs().flatten() for key, x in packed.items()])
    assert 0 < apart.max() < 1e-4 and apart.mean() < 1e-6  # after 40 steps, of at most 0.01 an entry


def test_a_number_that_is_not_finite_on_one_rank_skips_the_step_on_all(ranks):
    assert [ended(ranks, "poisoned", rank)[0] for rank in range(2)] == ["done", "done"]
    one, two = (load_file(ranks / f"poisoned-{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(x, two[key]) for key, x in one.items())
    skipped = [
        [m["step/skipped"] for m in json.loads((ranks / f"poisoned-{r}-metrics.json").read_text())] for r in range(2)
    ]
    assert skipped == [[0, 1, 0]] * 2
    assert (ranks / "poisoned-0" / "faults" / "step-00000001" / "fault.json").exists()
    assert not (ranks / "poisoned-1" / "faults").exists()


def test_a_signal_to_one_rank_stops_all_and_none_takes_the_run_for_finished(ranks):
    assert [ended(ranks, "stopped", rank)[0] for rank in range(2)] == ["RuntimeError: terminated"] * 2
    assert [p.name for p in (ranks / "stopped-0" / "checkpoints").iterdir()] == ["step-00000002"]
    assert [m["step"] for m in metrics(ranks / "stopped-0")] == [0, 1]


def test_ranks_with_other_batches_are_refused(ranks):
    for rank in range(2):
        said, _ = ended(ranks, "apart", rank)
        assert (
            said.startswith("RankError: batch of step 0: ranks differ (rank 0: ") and "expected the same on all" in said
        )


def test_a_rank_that_fails_ends_the_other_with_its_reason(ranks):
    assert ended(ranks, "raises", 1)[0] == "ValueError: no disk under the data"
    said, seconds = ended(ranks, "raises", 0)
    assert said == (
        "RankError: rank 0 of 2 waited in 'batch of step 2' (deadline 20 s) and another rank did not come: rank 1 failed with "
        "ValueError: no disk under the data"
    )
    assert seconds < 15


def test_a_rank_that_hangs_is_not_waited_for_longer_than_the_deadline(ranks):
    said, seconds = ended(ranks, "hangs", 0)
    assert said == (
        "RankError: rank 0 of 2 waited in 'batch of step 2' (deadline 2 s) and another rank did not come: rank 1 was last in "
        "'end of step 1'"
    )
    assert seconds < 7


def test_a_rank_that_never_comes(ranks):
    said, seconds = ended(ranks, "absent", 0)
    assert said.startswith("RankError: rank 0 of 2 waited in 'start' for 2 s") and seconds < 10


def test_trees_are_spread_by_tokens():
    assert assign([5, 9, 1, 4], 2) == [[1, 2], [0, 3]]
    assert assign([3], 3) == [[0], [], []]
    assert assign([1] * 7, 3) == [[0, 3, 6], [1, 4], [2, 5]]
    costs = [(7 * i) % 13 + 1 for i in range(40)]
    loads = [sum(costs[i] for i in items) for items in assign(costs, 4)]
    assert sorted(i for items in assign(costs, 4) for i in items) == list(range(40))
    assert max(loads) - min(loads) <= max(costs)


def test_shares_cover_the_step_and_know_their_places():
    _, _, batch = make("preference:dpo")
    shares = [World(rank, 3).share(batch) for rank in range(3)]
    for name in ("targets", "branches"):
        whole = torch.cat([getattr(s, name) for s in shares])
        assert torch.equal(whole.sort().values, getattr(ALONE.share(batch), name))
    for share in shares:
        assert torch.equal(share.batch.forest.target, batch.forest.target[share.targets])
        assert torch.equal(share.batch.tokens["ref_logp"], batch.tokens["ref_logp"][share.targets])
        assert torch.equal(share.batch.branches["rank"], batch.branches["rank"][share.branches])
        assert share.batch.counts == batch.counts
    assert ALONE.share(batch).batch is batch


def test_a_fingerprint_sees_every_number():
    _, _, batch = make("supervised")
    seen = {fingerprint(batch)}
    batch.branches["weight"][3] += 1e-12
    seen.add(fingerprint(batch))
    batch.forest.masks["loss"][0] ^= True
    seen.add(fingerprint(batch))
    assert len(seen) == 3 and fingerprint(batch) in seen


def test_alone_nothing_is_asked_of_others():
    assert ALONE.gather({"a": 1}, "x") == [{"a": 1}]
    ALONE.agree("anything", "x")
    forest = build_forest(random_rows(0, [(2, [3])]))
    assert ALONE.whole("logp", forest.ids, ALONE.share(make("coupled")[2]), 5, "x") is forest.ids
