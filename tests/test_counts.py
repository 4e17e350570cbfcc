"""What the benchmarks count of memory, beside what torch keeps."""

from __future__ import annotations

import pytest
import torch
from benchmarks.compare.counts import Shape, kept_bytes, step_bytes
from benchmarks.scaling import SMALL
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from posttrain.forest import Branch, Row, build_forest
from posttrain.models.load import _prepare
from posttrain.models.policy import Model, hidden_states

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
    assert step_bytes(shape, 1e6, 2000, "bf16") == 2e9 + 2**27 + 1.2e8
    assert step_bytes(shape, 1e6, 10, "bf16") == 6 * 1.3e8
    assert step_bytes(shape, 1e6, 10, "fp32") == 4 * 1.3e8
