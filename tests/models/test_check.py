import math

import pytest
import torch

from posttrain.models.check import checked, forest_error
from posttrain.models.policy import Model
from tiny import FAMILIES, ours, plain_net


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_exact_share_their_prompts(family):
    model = Model(ours(plain_net(family)))
    assert forest_error(model) < 1e-6  # the network's eager softmax is in fp32
    assert checked(model) is model


def test_a_network_that_is_not_exact_falls_back_to_plain_rows_aloud():
    net = ours(plain_net("llama"))
    rotary = net.base_model.rotary_emb
    forward = rotary.forward
    # Positions that follow the packed stream instead of restarting with each branch: what a network that ignores them does.
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(position_ids.shape[1])[None])
    assert forest_error(Model(net)) > 1e-3
    with pytest.warns(UserWarning, match="every row is computed by itself"):
        assert checked(Model(net)).plain


def test_a_network_that_cannot_run_over_a_forest_is_infinitely_wrong():
    net = ours(plain_net("llama"))
    net.base_model.layers[0].self_attn.layer_idx = None
    del net.base_model.layers[0].self_attn.layer_idx
    assert math.isinf(forest_error(Model(net)))
