"""The comparison with peers: its rows, its counts, what it prints, and our side of the rows that sample."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from benchmarks import page
from benchmarks.compare import reinforce, report
from benchmarks.compare.counts import Shape, flops, optimiser_bytes, packed, padded
from benchmarks.compare.rollouts import FILL, ForcedEngine
from benchmarks.compare.session import Session, plan
from benchmarks.compare.workload import completed, lengths, near_ratio, rollouts
from transformers import AutoModelForCausalLM

from posttrain.forest import Branch, Row
from posttrain.models.load import find_model
from posttrain.models.policy import forward_stats
from posttrain.rollout.engine import Request, Sampling
from posttrain.train.reference import row_logp
from train.tiny import role

STOP = 2
ITEMS = [
    {"prompt": [3 + k, *range(5, 5 + k)], "branches": [list(range(10, 20 + k % 7)), list(range(40, 44))]}
    for k in range(60)
]


def test_forced_lengths_are_skewed_and_prompts_near_the_ratio():
    rows = rollouts(ITEMS + ITEMS, per_step=2, steps=14, samples=8, longest=40, ratio=2.0)
    drawn = [n for row in rows for n in row["lengths"]]
    assert len({tuple(row["prompt"]) for row in rows}) == len(rows) == 30
    assert fmean(drawn) == pytest.approx(0.35 * 40, rel=0.15)
    assert min(drawn) >= 1 and all(row["lengths"][0] == 40 for row in rows[::2])
    sizes = [len(row["prompt"]) for row in rows]
    # 2 x 0.35 x 40; a tenth off is near enough
    assert sizes.count(28) == 26 and set(sizes) == set(range(26, 31))
    assert rollouts(ITEMS, 2, 14, 8, 40, 2.0) == rows
    with pytest.raises(SystemExit, match="60 different prompts at hand, 62 wanted"):
        rollouts(ITEMS, per_step=2, steps=30, samples=8, longest=40)


def test_completions_have_the_forced_lengths_end_once_and_advantages_are_standardised():
    rows = completed(rollouts(ITEMS, 2, 3, 8, 40, 2.0), ITEMS, STOP)
    for row in rows:
        assert [len(b) for b in row["branches"]] == row["lengths"]
        assert all(b[-1] == STOP and STOP not in b[:-1] for b in row["branches"])
        assert fmean(row["advantage"]) == pytest.approx(0, abs=1e-12)
        assert fmean(a * a for a in row["advantage"]) == pytest.approx(1)
        assert row["advantage"].index(max(row["advantage"])) == row["lengths"].index(max(row["lengths"]))


def test_rows_near_a_ratio_keep_their_order():
    rows = near_ratio(ITEMS, 4.0, 5)
    places = [k for row in rows for k, item in enumerate(ITEMS) if item["prompt"] == row["prompt"]]
    assert len(places) == 7 and places == sorted(places)
    assert all(abs(len(row["prompt"]) / fmean(map(len, row["branches"])) - 4) < 0.4 for row in rows)


def test_prompts_far_from_the_ratio_are_cut_or_led_by_other_text():
    long = [item | {"prompt": item["prompt"] * 9} for item in ITEMS[30:]]
    for items in (long, ITEMS[:10]):
        for row in near_ratio(items, 4.0, 8):
            assert abs(len(row["prompt"]) / fmean(map(len, row["branches"])) - 4) <= 0.4
            assert any(item["prompt"][-3:] == row["prompt"][-3:] for item in items)


SHAPE = Shape(trunk=100, head=10, pair=2, parameters=110)
CALIBRATION = [{"gflops": 1e-6, "gbs": 1.0}] * 2  # 1,000 operations a second


def session(row: str = "grpo", repeats: int = 2, **more) -> Session:
    """Two steps a process after a warm-up, of one prompt of 8 tokens and completions of 1 and 3."""
    header = {"row": row, "device": "cpu", "dtype": "bf16", "shape": SHAPE._asdict(), "batch": 1, "longest": 6}
    header |= {"items": [{"prompt": 8, "branches": [1, 3]}] * 2, "repeats": repeats, "peer": "trl"} | more
    results = []
    for part, ours, theirs in (("repeat", 2.0, 6.0), ("step", 4.0, 14.0)):
        for r in range(1, repeats + 1):
            for column, spent in (("ours", ours), ("defaults", theirs), ("tuned", theirs - 1)):
                step = {"total": spent, "forward": spent} | ({"rollout": spent / 2} if part == "step" else {})
                results.append(
                    {
                        "part": f"{part} {r}",
                        "column": column,
                        "side": "ours" if column == "ours" else "trl",
                        "steps": [step, step],
                        "shapes": [[2, 11]] * 3,
                        "scored": [6] * 3,
                        "calibration": CALIBRATION,
                        "above": 1e6,
                    }
                )
    for result in results:
        if result["column"] == "ours" and result["part"].startswith("step"):
            result["sync"] = 0.02
    return Session(Path("none"), header, results)


def test_the_first_figure_followed_by_x_is_the_ratio_of_updates_to_the_peers_defaults():
    lines = report.ratio_lines(session(), "trl")
    assert [line.partition(":")[0] for line in lines] == [
        "grpo update vs trl defaults",
        "grpo step vs trl defaults",
        "grpo update vs trl tuned",
        "grpo step vs trl tuned",
    ]
    assert re.findall(r"(\d+\.\d+)x", "\n".join(lines)) == ["3.00", "3.50", "2.50", "3.25"]


def test_bounds_and_limits_follow_from_token_counts():
    s = session()
    ours, defaults, tuned = s.results[:3]
    mine, theirs = packed(s.header["items"]), padded([[2, 11]] * 2)
    assert mine == (24, 8, 2 * (8 * 8 / 2 + (8 + 0.5) + (3 * 8 + 4.5)))
    assert theirs == (44, 44, 2 * 2 * 11 * 11 / 2)
    update = 2 * (3 * (100 * 24 + 2 * mine.pairs) + 4 * 10 * 8)
    assert report.operations(s, ours, "update") == update
    assert report.operations(s, defaults, "update") == 2 * (4 * (100 * 44 + 2 * 242) + 4 * 10 * 44)
    assert report.operations(s, tuned, "update") == 2 * (3 * (100 * 44 + 2 * 242) + 4 * 10 * 44)
    # sampling: a forward pass more; the peer scores every row up to the longest
    assert report.operations(s, ours, "step") - update == flops(SHAPE, mine, train=False)
    more = report.operations(s, tuned, "step") - report.operations(s, tuned, "update")
    assert more == 2 * (100 * 44 + 2 * 242 + 10 * 12)
    bound = report.ratios(s, "defaults", "update")["bound"]
    assert bound == report.operations(s, defaults, "update") / update
    least = (update + flops(SHAPE, mine, train=False)) / 1000 + (6 * 110 * 2 + 2 * optimiser_bytes(SHAPE, "bf16")) / 1e9
    assert report.limit_share(s, s.results[6], "step") == pytest.approx(least / 8)


def test_on_a_gpu_the_peers_kernels_score_completions_only():
    s = session(device="cuda")
    assert report.operations(s, s.results[2], "update") == 2 * (3 * (100 * 44 + 2 * 242) + 4 * 10 * 8)


def test_sampling_and_weight_sync_are_told_from_whole_steps():
    assert report.rate_lines(session()) == [
        "sampling, ours: 2.0 tokens/s (2.0 to 2.0)",
        "sampling, defaults: 0.6 tokens/s (0.6 to 0.6)",
        "sampling, tuned: 0.6 tokens/s (0.6 to 0.6)",
    ]
    assert report.sync_lines(session())[0].endswith("merged and taken out again 0.020 s, 0.50% of a step")
    names = [line["column"] for line in report.table(session())]
    assert names == [f"{c} {k}" for c in ("ours", "defaults", "tuned") for k in ("update", "step")]
    assert list(report.table(session())[1]["shares"]) == ["rollout", "forward"]


def test_a_page_shows_each_variant_once_it_is_complete(tmp_path, monkeypatch):
    whole, part = session(), session(variant="--ratio 0.5")
    assert page.complete(whole) and page.complete(part)
    part.results.pop()
    assert not page.complete(part)
    found = [whole, session(variant="--ratio 0.5"), session(variant="--ratio 0.5", batch=7), part]
    monkeypatch.setattr(page, "read_sessions", lambda file: found)
    assert [s.header.get("batch") for s in page.newest(tmp_path)] == [1, 7]


def test_columns_take_turns_forwards_and_backwards_updates_before_steps():
    jobs = {part: {c: {} for c in ("ours", "defaults")} for part in ("check", "repeat", "step")}
    told = [(t.part, t.column) for t in plan(jobs, 2, "trl")]
    assert told[2:] == [
        ("repeat 1", "ours"),
        ("repeat 1", "defaults"),
        ("step 1", "ours"),
        ("step 1", "defaults"),
        ("repeat 2", "defaults"),
        ("repeat 2", "ours"),
        ("step 2", "defaults"),
        ("step 2", "ours"),
    ]


def test_the_forced_engine_ends_each_sample_at_its_own_length():
    stops = frozenset({STOP, 96})
    forced = {(5, 9, 11): [3, 1, 7], (7,): [2, 7, 5]}
    engine = ForcedEngine(role(0), stops, slots=4, forced=forced)
    requests = [Request(ids, (0, "p", k)) for ids in forced for k in range(3)]
    out = engine.generate(requests, Sampling(max_new_tokens=7))
    assert [len(r.ids) for r in out] == [3, 1, 7, 2, 7, 5]
    assert all(r.ids[-1] == STOP and not stops & set(r.ids[:-1]) for r in out)
    assert FILL not in stops
    rows = [Row(r.request.ids, [Branch(r.ids, {"sampled": [True] * len(r.ids)})]) for r in out]
    again = torch.cat(row_logp(engine.model, rows, max_tokens=60, mask="sampled"))
    assert [x for r in out for x in r.logp] == pytest.approx(again.tolist(), abs=1e-9)


def test_our_grpo_update_is_the_clipped_loss_of_plain_padded_rows(tmp_path):
    """The batch as the peer gets it: each completion with its own copy of the prompt, through transformers' own forward."""
    model = find_model("small").path
    rows = completed(rollouts(ITEMS, 2, 0, 4, 12, 2.0), ITEMS, STOP)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    reinforce.write_old_logp(model, str(file))
    job = {"model": model, "dtype": "fp32", "device": "cpu", "per_step": 2}
    job["rows"] = json.loads(file.read_text())
    assert lengths(job["rows"])[0] == {"prompt": len(rows[0]["prompt"]), "branches": rows[0]["lengths"]}
    models, objective, source = reinforce.grpo_update(job, {})
    batch = source(0)
    terms = objective({"policy": forward_stats(models["policy"], batch.forest, frozenset({"logp"}))}, batch)
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss = total = count = 0.0
    clipped = 0
    for row in job["rows"]:
        for ids, a, old in zip(row["branches"], row["advantage"], row["old_logp"], strict=True):
            whole = torch.tensor([row["prompt"] + ids])
            scores = net(whole).logits[0, len(row["prompt"]) - 1 : -1].log_softmax(-1)
            mine = scores.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            for x, before in zip(mine, old, strict=True):
                ratio = float(torch.tensor(x - before).exp())
                loss -= min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                clipped += not 0.8 <= ratio <= 1.2
            total, count = total + sum(mine), count + len(ids)
    assert clipped > 0
    assert terms["loss/policy"].sum.item() / batch.counts["tokens"] == pytest.approx(loss / count, abs=2e-6)
    assert terms["logp/mean"].sum.item() / batch.counts["tokens"] == pytest.approx(total / count, abs=2e-6)
