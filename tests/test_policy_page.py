"""The page of all algorithms with equal samples, from runs made up for it."""

from __future__ import annotations

from benchmarks import policy_page


def run(reward, gold, **more):
    return {
        "numbers": {"reward": reward, "gold": gold, "kl": 1.5, "length": 12.0, "ended": 1.0},
        "curve": [],
        "cpu": 7.0,
    } | more


def test_a_line_has_means_and_changes_from_the_start_with_intervals():
    runs = {
        "start": {k: run(0.1 * k, 0.4) for k in range(3)},
        "grpo": {k: run(0.1 * k + 0.5 + 0.01 * k, 0.4 + 0.1 * (k - 1)) for k in range(3)},
        "raft": {0: run(0.5, 0.5)},
    }
    head, _, start, grpo, raft = policy_page.table(runs, list(runs))
    assert head.startswith("| algorithm | reward | change | gold | change | KL |")
    assert start == "| `start` | +0.10 |  | 0.400 |  | 1.50 (1.5 to 1.5) | 12.0 | 1.00 | 7.0 | 3 |"
    cells = [cell.strip() for cell in grpo.split("|")]
    assert cells[2] == "+0.61" and cells[3].startswith("+0.510 [+0.4") and cells[5].startswith("+0.000 [-0.")
    assert [c.strip() for c in raft.split("|")][3] == "+0.500"  # too few seeds for an interval


def test_what_algorithms_compare_responses_with():
    kinds = {n: policy_page.kind(n) for n in ("ppo", "grpo", "p3o", "reinforce_pp", "raft", "start")}
    assert list(kinds.values()) == ["critic", "groups", "groups", "neither", "selecting", "selecting"]


def test_the_picture_is_drawn(tmp_path):
    step = {"reward": 0.2}
    runs = {"start": {0: run(0.0, 0.4)}, "ppo": {0: run(0.9, 0.5, curve=[step, step])}}
    policy_page.draw(runs, list(runs), tmp_path / "images" / "policy.png")
    assert (tmp_path / "images" / "policy.png").read_bytes().startswith(b"\x89PNG")
