"""``--tiny`` makes a run small except where a person typed a value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from measured import RUNS, measured
from posttrain import cli
from posttrain.errors import ConfigError
from posttrain.graph import describe, override, typed_fields
from posttrain.stages import Recipe, Reinforce

pytestmark = pytest.mark.usefixtures("here")


def run(*options: str, name: str = "a") -> int:
    return cli.main(["run", "measured:measured", "--tiny", "--until", "start", "--name", name, *options])


def size(name: str = "a") -> int:
    return (RUNS / name / "start" / "model.safetensors").stat().st_size


def recorded(name: str = "a") -> dict:
    return json.loads((RUNS / name / "run.json").read_text())["stages"]["start"]


def typed(recipe: str, **options: str) -> dict[str, set[str]]:
    return {name: set(fields) for name, fields in cli.build_recipe(recipe, options).typed.items() if fields}


@pytest.mark.parametrize(("given", "expected"), [([], 2), (["--start.size", "3"], 3), (["--start.size", "4"], 4)])
def test_a_typed_value_stands_even_where_it_is_the_recipes_own(given: list[str], expected: int):
    assert run(*given) == 0
    assert size() == expected
    assert recorded().get("resolved", recorded()["config"])["size"] == expected
    assert recorded().get("typed") == (["size"] if given else None)


def test_a_key_names_typed_values_only_where_they_make_a_difference():
    def key(recipe: Recipe, tiny: bool = True) -> str:
        return describe(recipe.stages, seed=0, tiny=tiny, typed=recipe.typed)["start"]["key"]

    asked = override(measured(), {"start": {"size": 4}})
    assert key(asked) != key(measured()) and key(asked, tiny=False) == key(measured(), tiny=False)
    small = override(measured(), {"start": {"size": 2}})  # what a tiny run takes anyway
    assert key(small) == key(Recipe("r", small.stages))


def test_a_run_goes_on_or_is_repeated_as_it_was_typed(capsys: pytest.CaptureFixture[str]):
    assert run("--start.size", "4") == 0
    capsys.readouterr()
    assert run() == 2
    assert "stage 'start': typed was ['size'], is None" in capsys.readouterr().err
    assert cli.main(["rerun", "a"]) == 0 and size("a-rerun") == 4
    assert run(name="b") == 0
    assert cli.main(["diff", "a", "b"]) == 1
    assert " start.size   4   2" in capsys.readouterr().out
    assert cli.main(["rerun", "b", "--name", "a"]) == 2  # one configuration as asked, and yet another run


def test_options_of_a_recipe_stand_wherever_they_arrive():
    files = {"dpo": {"model", "data"}, "evaluate": {"reference", "data"}}
    assert typed("dpo", model="somewhere", data="pairs.jsonl") == files
    assert typed("dpo", model="smollm2", data="pairs.jsonl") == files  # the default, typed
    assert typed("dpo", limit="2") == {}  # the stages' two epochs have nothing to do with it
    assert typed("instructgpt", model="smollm2") == {"sft": {"model"}, "evaluate": {"base"}}
    assert typed("small", documents="50") == {"instruct": {"data"}}
    assert typed("dpo", **{"dpo.epochs": "2"}) == {"dpo": {"epochs"}}


def test_an_option_that_a_recipe_cannot_do_without_is_known_by_its_value():
    def picky(data: str = "", size: int = 4) -> Recipe:
        if not data:
            raise ConfigError("give data")
        return replace(override(measured(), {"start": {"size": size}}), typed={})

    def fields(**given) -> frozenset[str]:
        return typed_fields(picky, given, picky(**given))["start"]

    assert fields(data="x") == frozenset() and fields(data="x", size=9) == {"size"} == fields(data="x", size=4)


def test_a_typed_value_that_does_not_fit_the_small_size_is_refused(tmp_path: Path):
    recipe = override(Recipe("r", {"ppo": Reinforce(model="small", reward="x")}), {"ppo": {"updates_per_rollout": 8}})
    with pytest.raises(ConfigError, match="got updates_per_rollout=8 with prompts_per_step=8 and steps=12"):
        describe(recipe.stages, seed=0, tiny=True, typed=recipe.typed)
