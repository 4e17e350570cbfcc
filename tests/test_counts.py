"""What benchmarks count of memory and time, beside what torch keeps, and what they say of two dtypes."""

from __future__ import annotations

import pytest
import torch
from benchmarks.compare.counts import Shape, kept_bytes, step_bytes
from benchmarks.compare.workload import lengths
from benchmarks.precision import apart, chosen, line
from benchmarks.scaling import PANELS, SMALL, held, limit, rows_of
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from posttrain.forest import Branch, Row, build_forest
from posttrain.models.load import _prepare
from posttrain.models.policy import Model, hidden_states
from posttrain.models.small import small_path

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kept(net, forest) -> int:
    """Bytes of the tensors, each once, that the graph of one pass over a forest holds, but weights."""
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = hidden_states(Model(net, trained=True), forest)
    return sum(found.values()) if out.requires_grad else 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kept_bytes_are_those_of_the_graph(tmp_path, dtype):
    """Of a layer, by which networks of 3 and 2 differ; scores of a short forest, which are not counted, are few."""
    forest = build_forest([Row([5] * 40, [Branch([6] * 40, {}), Branch([7] * 40, {})])])
    found, counted = [], []
    for layers in (2, 3):
        config = LlamaConfig(**SMALL | {"num_hidden_layers": layers}, vocab_size=97)
        config.save_pretrained(tmp_path)
        net = _prepare(AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])).requires_grad_(True)
        found.append(kept(net, forest))
        counted.append(kept_bytes(str(tmp_path), dtype) * 120)
    assert 1.0 < (found[1] - found[0]) / (counted[1] - counted[0]) < 1.06


def test_a_step_holds_its_pass_or_all_gradients():
    shape = Shape(trunk=1e8, head=3e7, pair=0, parameters=1.3e8)
    assert step_bytes(shape, 1e6, 2000, 1e8, "bf16") == 2e9 + 2**27 + 1.2e8
    assert step_bytes(shape, 1e6, 2000, 1e6, "bf16") == 2e9 + 8e6 + 1.2e8
    assert step_bytes(shape, 1e6, 10, 0, "bf16") == 6 * 1.3e8
    assert step_bytes(shape, 1e6, 10, 0, "fp32") == 4 * 1.3e8


def test_seconds_and_bytes_counted_of_growing_steps():
    """A prompt is computed once for its responses; bytes stop growing with pairs at the most tokens of a pass."""
    shape = Shape(trunk=1e8, head=3e7, pair=0, parameters=1.3e8)

    def record(panel, x):
        items = lengths(rows_of(PANELS[panel][1][x], 50, 1))
        speed = {"gflops": 1.0, "gbs": 1e9}
        return {
            "items": items,
            "shape": shape._asdict(),
            "dtype": "fp32",
            "kept": 1e6,
            "vocabulary": 1000,
            "calibration": speed,
        }

    seconds = {k: limit(record("responses", k)) for k in (2, 16)}
    tokens = {2: 256 + 2 * 64, 16: 256 + 16 * 64}
    for k, n in tokens.items():
        assert seconds[k] == pytest.approx(2 * (1e8 * 4 * n + 3e7 * 5 * 64 * k) / 1e9, rel=1e-6)
    assert [held(record("pairs", n)) for n in (4, 8, 16)] == [
        trees * (192e6 + 8 * 128e3) + 1.2e8 for trees in (4, 5, 5)
    ]


def test_rows_of_two_dtypes_are_drawn_again_where_the_data_has_fewer_and_their_ends_compared(monkeypatch):
    monkeypatch.delenv("POSTTRAIN_REAL_DATA", raising=False)
    _, pairs = chosen(str(small_path("instruct")), "dpo", 30, 3)
    _, best = chosen(str(small_path("instruct")), "sft", 30, 3)
    assert len(pairs) == 240 and len({str(p) for p in pairs}) < 240
    assert [b["branches"] for b in best] == [p["branches"][:1] for p in pairs]
    runs = {"fp32": {"loss": [9.0] * 20 + [0.5] * 10}, "bf16": {"loss": [1.0] * 20 + [0.506] * 10}}
    assert apart({"runs": runs}) == pytest.approx((0.5, 0.506, 0.012))
    said = "dpo: mean loss of the last 10 of 30 steps 0.50000 in fp32, 0.50600 in bf16: 1.20% apart, NOT within 1%"
    assert line({"row": "dpo", "runs": runs}) == said
