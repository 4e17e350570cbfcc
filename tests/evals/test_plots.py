from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from posttrain.errors import ConfigError, DataError
from posttrain.evals.plots import curve_png, curves, metric_files, read_metrics, running_mean, series, trade


def test_curves_of_a_run_a_stage_and_files(finished_run, tmp_path):
    sizes = []
    for source in (finished_run, finished_run / "ppo", [finished_run / "sft" / "metrics.jsonl"]):
        out = curves(source, tmp_path / "curves.png")
        image = Image.open(out)
        image.load()
        assert image.format == "PNG" and image.width == 1300
        assert len(np.unique(np.asarray(image))) > 20  # not blank
        sizes.append(image.height)
    assert sizes[0] > sizes[1] > sizes[2]  # three stages, three rows of panels, one row
    assert list(metric_files(finished_run)) == ["ppo", "reward", "sft"]


def test_only_what_is_present_is_drawn():
    def height(*keys: str) -> int:
        png = curve_png({"s": [{"step": i, **dict.fromkeys(keys, float(i))} for i in range(5)]})
        assert png is not None
        return Image.open(io.BytesIO(png)).height

    assert curve_png({"s": [{"step": 1, "optim/lr": 0.1}]}) is None and curve_png({}) is None
    assert curve_png({"s": [{"step": 1, "loss/total": None}]}) is None
    four = ("loss/total", "loss/policy", "loss/value", "entropy/mean")
    assert height("loss/total") == height(*four) == 295
    assert height(*four, "accuracy/pairs") == 545
    # reward and KL are two panels and, as both are there, a third: one against the other
    assert height("loss/total", "loss/policy", "reward/mean", "kl/mean") == 545


def test_the_same_log_gives_the_same_bytes():
    rows = [{"step": i, "loss/total": 1 / (i + 1)} for i in range(60)]
    assert curve_png({"a$b": rows}) == curve_png({"a$b": rows})


def test_series_gaps_and_repeats():
    rows = [
        {"step": 2, "loss/total": 5.0, "note": "text", "flag": True},
        {"step": 1, "loss/total": 7},
        {"step": 2, "loss/total": 6.0},
        {"step": 3, "loss/total": None, "kl/mean": 1.0, "reward/mean": 2.0},
        {"step": 4, "loss/total": math.inf, "kl/mean": 3.0},
    ]
    lines = series(rows)
    assert set(lines) == {"loss/total", "kl/mean", "reward/mean"}
    steps, values = lines["loss/total"]
    assert steps.tolist() == [1, 2, 3, 4] and values[:2].tolist() == [7, 6] and np.isnan(values[2:]).all()
    both = trade(rows)
    assert both is not None and [part.tolist() for part in both] == [[1.0], [2.0]]
    assert trade(rows[:2]) is None


def test_running_mean_is_centred_and_skips_gaps():
    got = running_mean(np.array([1.0, 2.0, np.nan, 6.0, 8.0]), 3)
    assert got.tolist() == [1.5, 1.5, 4.0, 7.0, 7.0]
    assert np.isnan(running_mean(np.array([np.nan, np.nan]), 2)).all()


def test_a_line_being_written_waits_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss/total": 1.0}\n{"step": 1, "loss/to')
    assert read_metrics(path) == [{"step": 0, "loss/total": 1.0}]
    path.write_text('{"step": 0}\n{"st\n')
    with pytest.raises(DataError, match=r"metrics.jsonl row 2, field 'step': not JSON"):
        read_metrics(path)
    path.write_text(json.dumps({"loss/total": 1}) + "\n")
    with pytest.raises(DataError, match="row 1, field 'step': no number"):
        read_metrics(path)


def test_curve_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"no metrics.jsonl in .*expected a stage or run directory"):
        curves(tmp_path, tmp_path / "x.png")
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        curves([tmp_path / "gone.jsonl"], tmp_path / "x.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "optim/lr": 1}\n')
    with pytest.raises(ConfigError, match="nothing to draw"):
        curves(tmp_path, tmp_path / "x.png")
