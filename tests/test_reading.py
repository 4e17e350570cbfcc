"""What a stage says of the rows it leaves out."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from posttrain.errors import DataError
from posttrain.recipes.reward_model import reward_model
from posttrain.stages import Context
from posttrain.work.inputs import read_part


def test_what_is_left_out_is_printed_in_one_line(tmp_path):
    pair = {"prompt": "p [b]", "chosen": "a", "rejected": "b"}
    rows = [pair, {**pair, "rejected": "a"}, {**pair, "chosen": ""}, pair]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = io.StringIO()
    ctx = Context(dir=tmp_path, inputs={}, console=Console(file=out, width=40))
    assert [e.row for e in read_part(path, ctx, None, 1)] == [1, 4]
    assert out.getvalue() == (
        "pairs.jsonl: 4 rows, 2 examples; 1 useless (identical answers, first row 2); 1 faulty, first: "
        f"{path} row 3, field 'chosen': empty text; fill it in or remove the row\n"
    )
    with pytest.raises(DataError, match="row 3, field 'chosen'"):
        read_part(path, ctx, None)
    path.write_text(json.dumps(pair) + "\n")
    read_part(path, ctx, None)
    assert out.getvalue().count("\n") == 1


def test_the_reward_model_recipe_allows_a_few_faulty_rows():
    assert [stage.skip_bad for stage in reward_model().stages.values()] == [16, 16]
    assert [stage.skip_bad for stage in reward_model(skip_bad=0).stages.values()] == [0, 0]
