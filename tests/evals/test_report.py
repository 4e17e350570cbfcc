from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from posttrain.errors import ConfigError, DataError
from posttrain.evals.report import show_run, write_report

NASTY = "</div><script>alert('pwned')</script><img src=x onerror=\"alert(1)\">&amp; ]]> \x1b[31m"
NASTY += " \u202e \ud800 end"

TAGS = frozenset(
    [
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "section",
        "h1",
        "h2",
        "h3",
        "h4",
        "dl",
        "dt",
        "dd",
        "p",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "br",
        "img",
        "details",
        "summary",
        "pre",
    ]
)
ATTRIBUTES = frozenset({"lang", "charset", "http-equiv", "content", "name", "class", "alt", "src", "dir"})


class Page(HTMLParser):
    """Collects tags, attributes and text, as a browser would see them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def shown(run) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show_run(run, console)
    return console.file.getvalue()


def test_report_holds_everything(finished_run):
    path = write_report(finished_run)
    assert path == finished_run / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    text = " ".join(page.texts)
    for part in (
        "instructgpt: supervised, reward model, PPO",
        "smollm2",
        "2026-11-23T09:00:00+00:00",
        "posttrain run instructgpt --tiny",
        "96 GFLOP/s",
        "a processor, 2 cores, 2 threads, 15.5 GiB memory",
        "Reinforce",
        "1 min 02 s",
        "Reward models: share of held-out pairs in the right order",
        "not shown at this scale",
        "mean reward fell by",
        '"beta": 0.02',
    ):
        assert part in text, part
    assert page.open == [] and page.tags.count("h2") == 6
    assert [v for _, n, v in page.attributes if n == "class"].count("sample") == 11
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == 3
    for image in images:
        assert base64.b64decode(image.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_page_loads_and_runs_nothing(tmp_path, make_run):
    source = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(source)
    assert set(page.tags) <= TAGS and {name for _, name, _ in page.attributes} <= ATTRIBUTES
    policy = next(v for _, n, v in page.attributes if n == "content" and "default-src" in (v or ""))
    style = re.search(r"<style>(.*?)</style>", source, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "url(" not in style and "@import" not in style and style.count("{") == style.count("}")
    assert source.index("Content-Security-Policy") < source.index("<style>")


def test_model_text_stays_text(tmp_path, make_run):
    run = make_run(tmp_path / "nasty", answer=NASTY)
    manifest = json.loads((run / "run.json").read_text())
    manifest["command"] = "posttrain run '<script>alert(2)</script>'"
    (run / "run.json").write_text(json.dumps(manifest))
    stage = json.loads((run / "sft" / "stage.json").read_text())
    stage["config"]["model"] = '"><svg onload=alert(3)>'
    (run / "sft" / "stage.json").write_text(json.dumps(stage))
    source = write_report(run).read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "svg" not in page.tags and page.tags.count("img") == 1
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "<script" not in source and "\x1b" not in source and "\u202e" not in source
    texts = [t for t in page.texts if "pwned" in t]
    assert len(texts) == 33  # three policies, six samples and five worst, each whole
    assert texts[0] == "[base] " + NASTY.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace(
        "\ud800", "\\ud800"
    )
    out = shown(run)
    assert "<script>" in out.replace("\n", "") and "\x1b" not in out


def test_show_run_prints_and_writes_curves(tmp_path, make_run):
    finished_run = make_run(tmp_path / "run")
    write_report(finished_run)
    out = shown(finished_run)
    assert max(len(line) for line in out.splitlines() if str(finished_run) not in line) <= 100
    for part in ("recipe   instructgpt", "Reinforce", "frozen_base", "Before and after, 6 of 6", "ppo - sft"):
        assert part in out
    assert f"curves   {finished_run / 'curves.png'}\n" in out and f"report   {finished_run / 'report.html'}\n" in out
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_says_what_is_missing(tmp_path, make_run):
    run = make_run(tmp_path / "half", finished=False, logged=("sft",))
    text = " ".join(Page(write_report(run).read_text()).texts)
    out = shown(run)
    for part in ("not finished", "no evaluation yet"):
        assert part in text and part in out
    assert out.count("not finished") == 4 and "report" in out
    (run / "sft" / "metrics.jsonl").unlink()
    assert "no curves" in shown(run)


def test_a_stage_of_another_configuration_is_not_finished(tmp_path, make_run):
    run = make_run(tmp_path / "changed")
    done = json.loads((run / "ppo" / "done.json").read_text())
    (run / "ppo" / "done.json").write_text(json.dumps(done | {"key": "another"}))
    assert shown(run).count("not finished") == 1


def test_nothing_worse_is_said(tmp_path, make_run):
    run = make_run(tmp_path / "fine")
    path = run / "evaluate" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"worst": []}))
    assert "no prompt's mean score fell" in shown(run)
    assert "no prompt&#x27;s mean score fell" in write_report(run).read_text()


def test_what_is_not_a_run_is_refused_by_name(tmp_path, finished_run):
    with pytest.raises(ConfigError, match=r"one stage of a run; expected the run: .*demo"):
        write_report(finished_run / "ppo")
    with pytest.raises(ConfigError, match=r"no run.json; give one of the runs in it: demo"):
        write_report(finished_run.parent)
    with pytest.raises(ConfigError, match=r"did you mean 'demo'\?"):
        show_run(finished_run.parent / "dmo", Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="expected runs/NAME"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(DataError, match="holds list; expected a JSON object"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        write_report(tmp_path)
