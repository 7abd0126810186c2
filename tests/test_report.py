"""`skv report`: the same figures in every form, what a reader must know beside each, and no folder that breaks it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_folders import METHODS, NOTE, answer, dummy, grid, manifest, measurements, write_run
from test_cli import mistake

from cli.main import main
from evals.bench.kernels.kernels import KernelRecord
from evals.bench.latency.profile import LatencyRecord
from evals.reporting.files import write_run as end_run
from evals.reporting.folders import find_runs
from evals.reporting.page import drawing
from evals.reporting.samples import PREDICTION_CHARS, first_difference, samples_of
from evals.reporting.visible import visible
from evals.runs.results import read_records, read_run
from evals.tables.summary import summarise

BASELINES = sorted(
    path.parent for path in (Path(__file__).parent.parent / "results" / "baselines").glob("*/summary.md")
)
KERNELS = Path(__file__).parent.parent / "results" / "baselines" / "kernels-compiled"
FILES = ("report.html", "summary.md", "summary.csv", "tasks.csv", "summary.tex")


class Elements(HTMLParser):
    """Every element of a page, with its attributes and the text that it begins with."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_data(self, data):
        if self.found:
            self.found[-1][2] += data

    def all(self, tag):
        return [(attrs, text.strip()) for name, attrs, text in self.found if name == tag]


def page_of(folder):
    return Elements((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", grid())


def test_one_run_is_reported_in_its_own_folder(run, capsys):
    before = (run / "samples.jsonl").read_bytes(), (run / "run.json").read_bytes()
    assert main(["report", str(run)]) == 0
    assert all((run / name).stat().st_size for name in FILES)
    assert ((run / "samples.jsonl").read_bytes(), (run / "run.json").read_bytes()) == before
    plots = {path.name for path in (run / "plots").iterdir()}
    names = {"score_by_length", "score_by_bytes", "heatmap"}
    assert plots == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert "report.html" in capsys.readouterr().out


def test_figures_are_those_of_the_summary_in_every_form(run):
    main(["report", str(run)])
    rows = summarise(read_run(run)[1])
    cells = [text for attrs, text in page_of(run).all("td") if "number" in attrs.get("class", "")]
    lines = (run / "summary.md").read_text().splitlines()
    with (run / "summary.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 6
    for row, line in zip(rows, table, strict=True):
        assert float(line["score"]) == row.score == (1.0 if row.method == "full" else 0.5)
        assert any(row.method in text and f"| {row.score:.2f} |" in text for text in lines)
    assert cells.count("0.50") == 8  # two methods at two lengths: score and agreement


def test_dummy_weights_are_said_at_every_table_and_in_every_plot(tmp_path):
    run = write_run(tmp_path / "run", grid(), dummy())
    main(["report", str(run)])
    page = (run / "report.html").read_text()
    figures = re.findall(r'<figure class="table">(.*?)</figure>', page, re.DOTALL)
    assert len(figures) == 1
    assert all(NOTE in figure and "[dummy weights]" in figure for figure in figures)
    markdown = (run / "summary.md").read_text()
    assert NOTE in markdown
    assert all("[dummy weights]" in line for line in markdown.splitlines() if line.startswith("#"))
    captions = re.findall(r"\\caption\{(.*)\}", (run / "summary.tex").read_text())
    assert captions
    assert all(NOTE in caption and "[dummy weights]" in caption for caption in captions)
    for name in ("summary.csv", "tasks.csv"):
        with (run / name).open() as file:
            assert all(NOTE in line["notes"] for line in csv.DictReader(file))
    drawn = list((run / "plots").glob("*.svg"))
    assert drawn
    assert all("[dummy weights]" in path.read_text() for path in drawn)


def test_ruler_is_a_matrix_whose_cells_are_shaded_by_their_percentage(tmp_path):
    answers = [
        replace(record, benchmark="ruler", task=task, score=0.25 if task == "vt" else record.score)
        for task in ("niah_single_1", "vt")
        for record in grid()
    ]
    run = write_run(tmp_path / "run", answers, manifest("ruler"))
    assert main(["report", str(run)]) == 0
    shades = {attrs["class"]: text for attrs, text in page_of(run).all("td") if "shade-" in attrs.get("class", "")}
    assert shades == {"number shade-10": "100.0", "number shade-2": "25.0", "number shade-5": "50.0",
                      "number shade-6": "62.5", "number shade-4": "37.5"}  # fmt: skip


def test_the_policy_allows_only_what_the_page_holds(run):
    main(["report", str(run)])
    text, page = (run / "report.html").read_text(), page_of(run)
    (policy,) = [a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, directive in (('script type="module"', "script-src"), ("style", "style-src")):
        (held,) = re.findall(rf"<{tag}>(.*?)</{tag.split()[0]}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(held.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    for _, attrs, _ in page.found:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        assert all(value.startswith(("data:image/svg+xml;base64,", "#")) for name, value in attrs.items()
                   if name in ("src", "href", "srcset"))  # fmt: skip


def test_text_of_a_run_never_becomes_markup(tmp_path):
    nasty = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    records = [replace(r, prediction=nasty, prompt_tail=nasty, references=[nasty], task=nasty) for r in grid()]
    records += [answer(nasty, n) for n in range(4)]
    described = manifest(notes=[nasty], methods={nasty: {}}, config={nasty: nasty}, sources={nasty: {nasty: nasty}})
    run = write_run(tmp_path / "run", records, described)
    assert main(["report", str(run)]) == 0
    page = page_of(run)
    assert len(page.all("script")) == 2  # data and code
    assert [attrs for attrs, _ in page.all("img") if "onerror" in attrs] == []
    (data,) = [json.loads(text) for attrs, text in page.all("script") if attrs.get("type") == "application/json"]
    assert data["rows"][0][12] == data["prompts"][0] == data["references"][0] == nasty


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\nünï 数", "plain\nünï 数"),
        ("\x1b[31mred\x00", "␛[31mred␀"),
        ("a\u202eb\u2066", "a⟨U+202E⟩b⟨U+2066⟩"),
        ("\x7f\x9b", "⟨U+007F⟩⟨U+009B⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\u2028", "⟨U+2028⟩"),
        ("a\xa0b", "a\xa0b"),
        ("x" * 12, "xxxxxxxxxx… (2 more characters)"),
    ],
)
def test_invisible_text_is_made_visible(text, shown):
    assert visible(text, 10 if text.startswith("xx") else 100) == shown
    shown.encode()


@pytest.mark.parametrize(
    ("mine", "full", "found"),
    [
        ([5, 6, 7], [5, 6, 7], (0, None, None)),
        ([5, 9, 7], [5, 6, 7], (2, 9, 6)),
        ([5], [5, 6], (2, None, 6)),
        ([5, 6, 7], [5, 6], (3, 7, None)),
        ([], [], (0, None, None)),
    ],
)
def test_the_first_token_that_leaves_full_attention_is_named(mine, full, found):
    assert first_difference(answer("quest", tokens=mine), answer(tokens=full)) == found


def test_nothing_is_said_of_tokens_that_cannot_be_compared():
    assert first_difference(answer("quest"), None) == (None, None, None)
    assert first_difference(answer("quest", score=None), answer()) == (None, None, None)


def test_huge_predictions_are_cut_and_say_so(tmp_path):
    run = write_run(tmp_path / "run", [replace(r, prediction="x" * 1_000_000) for r in grid()])
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size < 2_500_000
    shown = samples_of(find_runs([run]).runs)["rows"][0][12]
    assert shown == "x" * PREDICTION_CHARS + f"… ({1_000_000 - PREDICTION_CHARS:,} more characters)"


def _cut(run):
    path = run / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-40])


def _spoil(run):
    path = run / "samples.jsonl"
    lines = path.read_text().splitlines()
    lines[1:3] = ["{not json", lines[2].replace('"length": 1024', '"length": "long"')]
    path.write_text("\n".join(lines) + "\n")


def _rewrite(**changes):
    def spoil(run):
        path = run / "samples.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[1] |= changes
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return spoil


def _described(**changes):
    def spoil(run):
        told = json.loads((run / "run.json").read_text()) | changes
        (run / "run.json").write_text(json.dumps(told))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_cut, "samples.jsonl: line 24 is damaged or unfinished, left out"),
        (_spoil, "samples.jsonl: lines 2, 3 are damaged or unfinished, left out"),
        (_rewrite(score=float("nan")), "1 scores are not between 0 and 1 (or NaN) and count as unscored: quest"),
        (_rewrite(score=100.0), "1 scores are not between 0 and 1 (or NaN) and count as unscored: quest"),
        (_rewrite(meta={}), "1 answers without depth, left out: quest:budget=64 magic-number 1024 depth=0,round=0"),
        (_rewrite(benchmark="ruler"), "1 answers not of niah, left out: quest:budget=64"),
        (_rewrite(score=None, status="oom", error="out of memory"), "1 of 24 answers are unscored"),
        (_described(methods={"tova": {}}), "tova: no answer"),
        (lambda run: (run / "run.json").unlink(), "run.json is missing: model, settings and notes are unknown"),
        (lambda run: (run / "run.json").write_text("{"), "run.json cannot be read: model, settings and notes"),
        (_described(sources=7), "run.json cannot be read"),
        (_described(sessions=[]), None),
        (_described(model={"name": "m"}), None),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_reported_with_what_is_there(run, spoil, says, capsys):
    spoil(run)
    assert main(["report", str(run)]) == 0
    (found,) = find_runs([run]).runs
    said = " ".join(capsys.readouterr().err.split())
    for problem in found.problems:
        assert problem in (run / "summary.md").read_text()
        assert problem in [text.strip() for attrs, text in page_of(run).all("p") if attrs.get("class") == "problem"]
    if says is not None:
        assert any(says in problem for problem in found.problems), found.problems
        assert says in said


def test_a_score_that_is_no_number_is_no_zero(run):
    _rewrite(score=float("nan"))(run)
    scores = [r.score for r in find_runs([run]).runs[0].answers if r.method == METHODS[1] and r.length == 1024]
    assert scores.count(None) == 1
    main(["report", str(run)])
    with (run / "summary.csv").open() as file:
        (line,) = [row for row in csv.DictReader(file) if row["method"] == METHODS[1] and row["length"] == "1024"]
    assert (line["scored"], line["total"]) == ("3", "4")
    assert float(line["score"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "samples.jsonl").unlink(), "holds no results (samples.jsonl, forced.jsonl, "),
        (lambda run: (run / "samples.jsonl").write_text("oops\n"), "holds no whole record"),
        (_described(schema=99), "run.json is of schema 99; this version of skv reads schema 1"),
        (_described(benchmark="rulr"), "unknown benchmark 'rulr' (did you mean 'ruler'?)"),
    ],
)  # fmt: skip
def test_what_cannot_be_reported_is_refused_by_name(run, spoil, says, capsys, tmp_path):
    spoil(run)
    assert says in mistake(capsys, "report", str(run))
    other = write_run(tmp_path / "other", grid())
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both")]) == 1
    assert says in (tmp_path / "both" / "summary.md").read_text()
    assert "run is left out" in " ".join(capsys.readouterr().err.split())


def test_mistakes_are_one_line(run, capsys):
    assert "did you mean 'run'" in mistake(capsys, "report", str(run.parent / "runn"))
    assert "is given twice" in mistake(capsys, "report", str(run), f"{run}/../run")
    assert "did you mean 'parquet'" in mistake(capsys, "report", str(run), "--export", "parket")
    (run.parent / "file").write_text("")
    assert "cannot write" in mistake(capsys, "report", str(run), "--out", str(run.parent / "file"))


def test_runs_of_different_kinds_are_reported_together(tmp_path, capsys):
    one = write_run(tmp_path / "a" / "run", grid())
    two = write_run(tmp_path / "b" / "run", grid(["full"], [1024]), dummy())
    three = write_run(tmp_path / "c", measurements(), manifest("throughput", config={"machine": "here"}))
    out = tmp_path / "out"
    assert main(["report", str(one), str(two), str(three), "--out", str(out)]) == 0
    assert [text for _, text in page_of(out).all("h2")] == ["a/run", "b/run", f"{tmp_path.name}/c", "Answers"]
    assert (out / "plots" / "a" / "run" / "heatmap.svg").is_file()
    assert (out / "plots" / tmp_path.name / "c" / "throughput.svg").is_file()
    assert "one method only (full)" in (out / "summary.md").read_text()
    with (out / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["run"] for line in lines} == {"a/run", "b/run", f"{tmp_path.name}/c"}
    assert all((NOTE in line["notes"]) == (line["run"] == "b/run") for line in lines)


def test_a_sweep_without_run_json_is_reported(tmp_path, capsys):
    run = write_run(tmp_path / "run", measurements())
    (run / "run.json").unlink()
    assert main(["report", str(run)]) == 0
    assert "run.json is missing" in (run / "summary.md").read_text()
    assert "1.25 (1.25–1.25)" in (run / "summary.md").read_text()  # quest's steps take 8 ms for full attention's 10


def test_plots_that_a_run_has_outgrown_go_and_those_of_others_stay(tmp_path):
    few, many = METHODS, [*METHODS, *(f"quest:budget={budget}" for budget in range(1, 7))]

    def drawn(methods, lengths):
        ruler = [replace(r, benchmark="ruler", task="vt") for r in grid(methods, lengths, samples=1)]
        run = write_run(tmp_path / "run", ruler, manifest("ruler"))
        assert main(["report", str(run)]) == 0
        return {path.name for path in (run / "plots").glob("*.*")}

    def both(*names):
        return {f"{name}.{kind}" for name in names for kind in ("png", "svg")}

    assert drawn(few, [1024]) == both("scores", "score_by_bytes", "tasks_1024")
    (tmp_path / "run" / "plots" / "ablations.png").write_text("drawn by skv paper")
    assert drawn(few, [1024, 2048]) - {"ablations.png"} == both(
        "score_by_length", "score_by_bytes", "tasks_1024", "tasks_2048"
    )
    assert drawn(many, [1024, 2048]) == both("score_by_length", "score_by_bytes") | {"ablations.png"}


def test_a_report_has_the_lines_that_the_run_ended_with(tmp_path):
    sweep = manifest("throughput", config={"machine": "here", "synthetic_kv": True})
    for records, described in ((measurements(), sweep), (grid(), dummy())):
        run = write_run(tmp_path / described.benchmark, records, described)
        end_run(run)
        ended = {path: path.read_text() for path in run.glob("*.*") if path.name != "report.html"}
        assert {path.name for path in ended} >= {"summary.csv", "summary.md", "summary.tex"}
        assert main(["report", str(run)]) == 0
        assert {path: path.read_text() for path in ended} == ended


def test_plots_are_readable_on_a_dark_page_and_labels_are_no_formulas(tmp_path):
    records = [replace(r, method=r.method.replace("quest", "$x^{$")) for r in grid()]
    run = write_run(tmp_path / "run", records)
    assert main(["report", str(run)]) == 0
    made = drawing(run / "plots" / "score_by_length.png")
    light, dark = (base64.b64decode(uri.partition(",")[2]).decode() for uri in (made.light, made.dark))
    assert "$x^{$" in light
    assert "#000000" in light  # full attention's line
    assert "#000000" not in dark
    assert "#ffffff" not in dark
    assert 'fill="#e8e8e8"' in dark.partition(">")[0] + dark


def test_new_runs_record_the_end_of_each_prompt(tiny_folder, tmp_path):
    argv = ["eval", "niah", "--model", str(tiny_folder), "-m", "full", "--lengths", "512", "--depths", "1"]
    assert main([*argv, "--haystack", "synthetic", "--out", str(tmp_path / "run")]) == 0
    (record,) = read_run(tmp_path / "run")[1]
    assert 0 < len(record.prompt_tail) <= 64  # a token of this tokenizer is a byte
    assert "number" in record.prompt_tail
    assert samples_of(find_runs([tmp_path / "run"]).runs)["prompts"] == [record.prompt_tail]


def test_older_records_say_that_prompts_were_not_recorded(tmp_path):
    lines = [asdict(r) for r in grid()]
    for line in lines:
        del line["prompt_tail"]
    run = write_run(tmp_path / "run", grid())
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run)]) == 0
    assert samples_of(find_runs([run]).runs)["prompts"] == [""]


def test_a_profile_of_decode_steps_is_reported(tmp_path):
    records = [
        LatencyRecord(method, 1024, 1, 0, "ok", None, "here", "now", parts_ms={"attention": ms, "mlp": 2.0},
                      profiled_ms=ms + 2, plain_ms=ms, steps=3)
        for method, ms in (("full", 4.25), ("quest:budget=64", 1.75))
    ]  # fmt: skip
    described = manifest("latency", config={"machine": "here", "warmup_steps": 4})
    run = write_run(tmp_path / "run", records, replace(described, model={**described.model, "dummy": True}))
    assert main(["report", str(run)]) == 0
    cells = [text for _, text in page_of(run).all("td")]
    assert {"4.25", "1.75"} <= set(cells)
    assert (run / "plots" / "latency.svg").is_file()
    assert "Decode step by part [dummy weights]" in (run / "summary.md").read_text()


def test_kernels_are_reported_with_what_they_take_of_a_gpu(tmp_path):
    assert main(["report", str(KERNELS), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Compiled kernels" in page
    assert "rebuild_chunks" in page
    assert "sm_90" in page
    notes = read_records(KERNELS, KernelRecord)[0].notes
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert {line["notes"] for line in csv.DictReader(file)} == {"; ".join(notes)}


def test_a_folder_of_kernels_is_made_anew_whole(tmp_path):
    run = shutil.copytree(KERNELS, tmp_path / "run")
    for page in run.glob("*.md"):
        page.write_text("of an older run")
    assert main(["report", str(run)]) == 0
    assert all("of an older run" not in page.read_text() for page in run.glob("*.md"))
    assert not (run / "plots").exists(), "nothing was drawn"


@pytest.mark.parametrize("run", BASELINES, ids=lambda run: run.name)
def test_committed_tables_and_plots_are_those_of_the_committed_records(run, tmp_path):
    """Or they are of older code: `skv report` on the folder makes them anew."""
    made = tmp_path / run.name
    assert main(["report", str(run), "--out", str(made)]) == 0

    def tables(folder):
        lines = (folder / "summary.md").read_text().splitlines()
        return [line for line in lines if line.startswith("|")]

    def drawn(folder):
        return {path.name for path in folder.glob("plots/*")}

    assert tables(run) == tables(made)
    assert drawn(run) == drawn(made)
    for path in made.glob("*.csv"):
        assert (run / path.name).read_text() == path.read_text()
