"""The report: its figures are those of the logs, nothing in it is unescaped, nothing is loaded, nothing is too big."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_txssm.errors import UserError
from megatron_txssm.jobs.goodput import WITHIN_JOB, goodput, goodput_cells
from megatron_txssm.recipe.changes import Changes
from megatron_txssm.reporting.report import report
from tests.jobs.some_attempt import some_attempt
from tests.support.recipes import write_recipe


class Parsed(HTMLParser):
    """The page's elements and texts, as a browser sees them."""

    def __init__(self, page: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def after(self, text: str) -> str:
        return self.texts[self.texts.index(text) + 1]


def make_run(run: Path, lines: list[dict[str, Any]], changes: Changes | None = None) -> Path:
    fields: Changes = {"data.tokenizer_type": "NullTokenizer", "megatron.mock_data": True}
    write_recipe(run / "recipe.yaml", fields, changes or {}, run=run)
    add(run, lines)
    return run


def add(run: Path, lines: list[dict[str, Any]]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def steps(first: int, last: int, at: float = 1000.0, **fields: Any) -> list[dict[str, Any]]:
    """Of ten seconds each, the first of which ends at `at`."""
    return [
        {"iteration": n, "lm loss": 4 + 4 / n, "learning_rate": 1e-3, "grad_norm": 1.0, "consumed_tokens": 128 * n}
        | {"tokens_per_second": 12.8, "step_seconds": 10.0, "time": at + 10 * (n - first)}
        | fields
        for n in range(first, last + 1)
    ]


def start(began: float, **fields: Any) -> dict[str, Any]:
    about = {"host": "n7", "torch": "2.13.0"} | fields
    return {"iteration": 0, "start": {"world_size": 2}, "began": began, "environment": about}


def page_of(*runs: Path, out: Path) -> Parsed:
    assert report(runs, out=out) == 0
    return Parsed(out)


def test_goodput_is_that_of_the_logs(tmp_path: Path) -> None:
    """Three attempts on Slurm; the figures are worked out by hand in test_goodput.py."""
    run = make_run(tmp_path / "big", [])

    def attempt(number: int, started: float, ended: float, **fields: Any) -> None:
        size = (run / "metrics.jsonl").stat().st_size
        some_attempt(run, number, started=started, ended=ended, metrics_offset=size, exit_code=1, **fields).save()

    attempt(1, 100, 400, cause="node_failure", detail="n2 does not answer", last_step=20, saved_after=10)
    add(run, steps(1, 20, 210))
    attempt(2, 460, 800, cause="hung", action=f"the trainer was started again {WITHIN_JOB}", last_step=30)
    add(run, steps(11, 30, 560))
    attempt(3, 803, 1100, cause="finished", last_step=45)
    add(run, steps(26, 45, 870))
    page = page_of(run, out=tmp_path / "page.html")
    assert page.after("active") == "45.0%" and page.after("recovery") == "0:03:10 (2)"
    assert page.after("steps lost") == "15 of 45" and page.after("wall") == "0:16:40"
    found = goodput(run)
    assert found is not None
    assert {name: page.after(name) for name in goodput_cells(found)} == goodput_cells(found)
    place = page.texts.index("node failure; n2 does not answer")
    assert page.texts[place - 3 : place] == ["0:05:00", "20", "10"]


def test_attempts_of_a_run_without_slurm(tmp_path: Path) -> None:
    run = make_run(tmp_path / "local", [start(100.0), *steps(1, 4, 130)])
    add(run, [start(300.0, torch="2.14.0"), *steps(3, 6, 320)])
    ended = {"ended": 360.0, "exit_code": 143, "what": "it was told to stop (SIGTERM)", "log": ""}
    (run / "ended.json").write_text(json.dumps(ended))
    page = page_of(run, out=tmp_path / "page.html")
    # From 100 to 360; steps 3 and 4 were repeated; from the end of the first, at 160, to step 5 at 340.
    assert (page.after("active"), page.after("recovery")) == ("23.1%", "0:03:00 (1)")
    assert (page.after("steps lost"), page.after("wall"), page.after("attempts")) == ("2 of 6", "0:04:20", "2")
    assert "exit code 143; it was told to stop (SIGTERM)" in page.texts
    assert "2.13.0 → 2.14.0" in page.texts and page.after("host") == "n7"
    # One resume is marked in each chart over steps.
    assert sum(attributes.get("class") == "mark" for _, attributes in page.elements) == 4


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>'
    lines: list[dict[str, Any]] = [start(1.0, host=evil, **{evil: "x"}), *steps(1, 3)]
    lines += [{"iteration": 3, f"validation-{evil} lm loss": 4.0}]
    description = "</title>" + evil + " {{ 7 * 7 }}\x07"
    run = make_run(tmp_path / "<b onclick='x'>&", lines, {"description": description})
    (run / "conversions.jsonl").write_text(json.dumps({"step": 3, "out": evil, "layout": evil, "proof": [evil]}))
    sets = {evil: {"loss": 1.0, "perplexity": math.e, "tokens": 5}}
    add_to = run / "evaluation" / "history.jsonl"
    add_to.parent.mkdir()
    add_to.write_text(json.dumps({"step": 3, "sets": sets}))
    (add_to.parent / "harness").mkdir()
    found = {evil: {"metrics": {f"{evil},none": {"value": 0.25, "stderr": None}}, "num_fewshot": 5}, "part": {}}
    benchmarks = {"model": {"step": 3}, "settings": {"limit": 9}, "shown": [evil], "tasks": found}
    (add_to.parent / "harness" / "history.jsonl").write_text(json.dumps(benchmarks))
    page = page_of(run, out=tmp_path / "page.html")
    assert not [tag for tag, attributes in page.elements if "onclick" in attributes]
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert [found for found in scripts if found.get("type") != "application/json"] == [{}]
    assert page.open == []
    text = " ".join(page.texts)
    assert text.count(evil) >= 7 and f"{evil} (--limit)" in text and "0.2500" in text
    assert "{{ 7 * 7 }}" in text and "\\x07" in text


def test_nothing_is_loaded_and_only_our_script_may_run(tmp_path: Path) -> None:
    import base64
    import hashlib

    run = make_run(tmp_path / "run", steps(1, 3))
    page = page_of(run, out=tmp_path / "page.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base") and "src" not in attributes
        assert not (attributes.get("href") or "#").removeprefix("#").startswith(("http", "//"))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [found["content"] or "" for tag, found in page.elements if "http-equiv" in found]
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_page_is_accessible(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", [start(1.0), *steps(1, 3)]), out=tmp_path / "page.html")
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1 and tags.count("table") == tags.count("caption") > 2
    assert all(found.get("role") == "img" and found.get("aria-label") for tag, found in page.elements if tag == "svg")
    assert all(found.get("scope") in ("row", "col") for tag, found in page.elements if tag == "th")
    named = {found["href"] for tag, found in page.elements if tag == "a"}
    assert named <= {f"#{found['id']}" for tag, found in page.elements if tag == "section" and "id" in found}
    assert ("html", {"lang": "en"}) in page.elements


def test_runs_beside_one_another_show_what_differs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "a" / "one", steps(1, 3))
    two = make_run(tmp_path / "two", steps(1, 5), {"optimizer.learning_rate": 2e-3, "megatron.num_workers": 1})
    broken = make_run(tmp_path / "b" / "one", steps(1, 2))
    (broken / "recipe.yaml").write_text("model: [")
    page = page_of(one, two, broken, out=tmp_path / "page.html")
    place = page.texts.index("Fields that differ")
    # A field that a recipe leaves out has an empty cell.
    assert page.texts[place : place + 9] == [
        *("Fields that differ", "field", str(one), "two"),
        *("optimizer.learning_rate", "0.001", "0.002"),
        *("megatron.num_workers", "1"),
    ]
    assert page.texts[place + 9] == "Resolved recipe of " + str(one)
    # The broken one is named, and its curve is there.
    assert any(str(broken / "recipe.yaml") in text for text in page.texts)
    curves = [data for tag, data in page.elements if tag == "path" and "line" in (data.get("class") or "")]
    assert {data["class"] for data in curves} == {"line c0", "line c1", "line c2"}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        steps(1, 1),
        steps(1, 4, **{"lm loss": math.nan}),
        [{"iteration": n, "lm loss": 3.0, "grad_norm": None} for n in (1, 2)],
        [{"iteration": n, "grad_norm": 1.0, "tokens_per_second": 5.0} for n in (1, 2)],
    ],
    ids=["no step", "one step", "not finite", "no times", "no losses"],
)
def test_what_little_there_is_is_shown(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    run = make_run(tmp_path / "run", lines, {"data.corpus": str(tmp_path / "removed"), "megatron.mock_data": None})
    page = page_of(run, out=tmp_path / "page.html")
    assert page.after("state") == ("failed" if lines else "not started")
    assert any(text.startswith("The data are not readable here: ") for text in page.texts)
    if not lines:
        assert "No step has been logged yet." in page.texts


def test_a_run_without_metrics_and_one_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "new", [])
    (run / "metrics.jsonl").unlink()
    assert report(["new"]) == 0 and (run / "report.html").is_file()
    assert report(["new", make_run(tmp_path / "b", [])]) == 0 and (tmp_path / "report.html").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="'empty' is not a run"):
        report(["empty"])
    with pytest.raises(UserError, match="named twice"):
        report(["new", run])
    with pytest.raises(UserError, match=r"recipe.yaml does not end in .html"):
        report(["new"], out=run / "recipe.yaml")
    with pytest.raises(UserError, match="cannot be written: Not a directory; name another page with --out"):
        report(["new"], out=run / "recipe.yaml" / "page.html")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 steps."""
    folder = tmp_path_factory.mktemp("long")
    run = make_run(folder / "long", [start(900.0)])
    # Not one by one through json.dumps, which takes longer than the report.
    (step,) = map(json.dumps, steps(1, 1))
    form = step.replace('"iteration": 1,', '"iteration": %d,').replace('"lm loss": 8.0,', '"lm loss": %.4f,')
    losses = [9.0 if n == 43_210 else 2 + (37 * n % 101) / 500 for n in range(1, 100_001)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f"{form % line}\n" for line in enumerate(losses, 1))
    assert report([run]) == 0
    return run / "report.html"


def test_100_000_steps_are_less_than_2_MB(long_run: Path) -> None:
    assert long_run.stat().st_size < 2_000_000
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', long_run.read_text())[0])
    (curve,) = data["curves"]
    assert max(curve["high"]) == 9 and abs(curve["x"][curve["high"].index(9)] - 43_210) < 112


def test_a_browser_draws_it(long_run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium; install it: apt-get install chromium")
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command = [browser, *words, "--dump-dom", long_run.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    # Made by the script, which the page's own policy allows.
    assert done.stdout.count('<div class="tip" hidden=""></div>') == 5
