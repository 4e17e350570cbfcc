"""Noise on embeddings: drawn by (seed, step, row), scaled by length and width, and only where there is a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.forest import Branch, Row, build_forest
from posttrain.models.policy import forward_stats
from posttrain.stages import Prefer
from posttrain.train.noise import EmbeddingNoise, with_noise
from posttrain.train.reference import row_logp
from posttrain.train.sources import demonstration_source

from .tiny import role

ROWS = [Row([5, 6, 7], [Branch([8, 9], {"loss": [True] * 2})]), Row([5], [Branch([4], {"loss": [True]})])]
WANT = frozenset({"logp"})


def test_a_draw_depends_on_seed_step_and_row_alone():
    ids, positions = torch.tensor([5, 6, 7, 8, 9, 5, 4]), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    noise = EmbeddingNoise(alpha=5.0, seed=1, step=3)
    both = noise.noise(ids, positions, 8)
    torch.testing.assert_close(both[5:], noise.noise(ids[5:], positions[5:], 8), rtol=0, atol=0)
    for other in (EmbeddingNoise(5.0, 2, 3), EmbeddingNoise(5.0, 1, 4)):
        assert not torch.equal(other.noise(ids, positions, 8), both)


def test_it_is_uniform_within_alpha_over_the_root_of_length_and_width():
    ids, positions = torch.arange(200), torch.arange(200)
    found = EmbeddingNoise(5.0, 0).noise(ids, positions, 64)
    bound = 5 / math.sqrt(200 * 64)
    assert float(found.abs().max()) == pytest.approx(bound, rel=1e-3) and float(found.abs().max()) <= bound
    assert float(found.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(float(found.mean())) < 0.02 * bound


def test_responses_share_the_noise_of_their_prompt_and_have_their_own_length():
    forest = build_forest([Row([5, 6], [Branch([7], {}), Branch([8, 9, 4], {})])])
    found = EmbeddingNoise(1.0, 0).noise(forest.ids, forest.positions, 1024)
    assert forest.positions.tolist() == [0, 1, 2, 2, 3, 4]
    sizes = [float(part.abs().max()) * math.sqrt(1024) for part in (found[:3], found[3:])]
    assert sizes == pytest.approx([1 / math.sqrt(3), 1 / math.sqrt(5)], rel=0.01)


def test_only_passes_with_a_gradient_have_noise_and_the_step_sets_it():
    model = role(0)
    before = torch.cat(row_logp(model, ROWS, max_tokens=1000))
    source = with_noise(demonstration_source(ROWS, per_step=2, seed=0), model, 5.0, 0)
    forest = source(0).forest
    first = forward_stats(model, forest, WANT)["logp"]
    assert torch.equal(first, forward_stats(model, forest, WANT)["logp"]) and first.requires_grad
    source(1)
    second = forward_stats(model, forest, WANT)["logp"]
    assert not torch.allclose(first, second)
    assert torch.equal(torch.cat(row_logp(model, ROWS, max_tokens=1000)), before)
    source(0)
    assert torch.equal(forward_stats(model, forest, WANT)["logp"], first)


def test_without_alpha_nothing_is_attached():
    model, source = role(0), demonstration_source(ROWS, per_step=2, seed=0)
    assert with_noise(source, model, 0.0, 0) is source and not model.trunk._forward_pre_hooks


def test_losses_that_see_a_whole_step_take_none():
    with pytest.raises(ConfigError, match=r"got noise=5; losses that couple a whole step"):
        Prefer(model="small", data="smallworld", loss="aot", noise=5.0).check()
