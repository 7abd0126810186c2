"""`skv bench kernels`: every kernel beside its twin; what is wrong is said and gets no speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._inductor.config
from test_cli import mistake
from torch.nn.attention import SDPBackend

from cli.main import main
from evals.bench.kernels import fit, full_attention, gpu_timing
from evals.bench.kernels.cases import Case, attention_inputs, llama_rotary
from evals.bench.kernels.flex_attention import whole_context
from evals.bench.kernels.gpu_timing import GpuTimer
from evals.bench.kernels.items import Item, NotHereError, Subject, Way, Workload
from evals.bench.kernels.kernels import KernelBench, KernelRecord, relative_error
from evals.bench.kernels.report import kernel_table, report_of
from evals.bench.kernels.staged_copy import staged_copy
from evals.bench.kernels.subjects import items
from evals.runs.manifest import Manifest
from evals.runs.results import read_records
from shadowkv.kernels import slots
from shadowkv.kernels.backend import CompiledKernel
from shadowkv.kernels.slots import Regions
from shadowkv.planning.gpus import Rates

SIZES = ["--context", "512", "--batch", "1", "-m", "shadowkv:rank=8,budget=64"]
KERNELS = {
    "chunk_scores", "choose_chunks", "plan_fill", "fill_values", "fill_keys", "attend_resident", "attend_codes",
    "page_bounds", "attend_pages", "low_rank.fit",
}  # fmt: skip


WHOLE = ["torch sdpa", "sdpa flash", "sdpa cudnn", "torch flex", "flashinfer, untried"]


@pytest.fixture
def bench(tiny_folder, interpreter):
    """Arguments of a run of seconds."""
    return ["bench", "kernels", "--model", str(tiny_folder), "--device", "cpu", *SIZES]


def _workload():
    case = Case(batch=1)
    return Workload(case, Regions(64, 16, 50), case.chunks, 3, ("native",), ("native",))


def _ways(rows, variant):
    return [row["way"] for row in rows if row["variant"] == variant]


def told(capsys, argv, code=0):
    """The JSON that a command prints."""
    assert main([*argv, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_every_kernel_is_checked_and_none_is_timed_on_a_cpu(capsys, bench):
    found = told(capsys, bench)
    assert {row["kernel"] for row in found["rows"]} == KERNELS
    fills = {(row["variant"].partition(",")[0], row["way"]) for row in found["rows"] if row["kernel"] == "fill_values"}
    codings, ways = ("native", "bf16", "int8", "fp8", "int4"), ("interpreter", "staged copy")
    assert fills == {(coding, way) for coding in codings for way in ways}
    whole = {row["way"]: row for row in found["rows"] if row["variant"] == "whole context"}
    assert list(whole) == ["interpreter", *WHOLE[:-2], "torch flex, eager", "flashinfer, untried"]
    for way, reason in (("sdpa cudnn", "cuDNN needs a GPU"), ("flashinfer, untried", "FlashInfer needs a GPU")):
        row = whole[way]
        assert row["status"] == "skipped"
        assert reason in row["error"]
        found["rows"].remove(row)
        assert any(note.startswith(f"skipped: attend_resident whole context {way}: ") for note in found["notes"])
    for row in found["rows"]:
        assert row["status"] == "ok", row
        assert row["relative_error"] <= row["bound"]
        assert row["ms"] == []
        assert row["bytes_per_s"] is None
    assert [found["sizes"][name] for name in ("head_dim", "rank", "slots", "misses")] == [16, 8, 8, 3]
    assert any("times need a GPU" in note for note in found["notes"])
    assert found["compiled"] == []


def test_a_wrong_kernel_is_named_and_fails(capsys, bench, monkeypatch):
    from shadowkv.kernels import twins

    few = [item for item in items(_workload(), twins) if item.kernel in ("choose_chunks", "plan_fill")]
    monkeypatch.setattr("evals.bench.kernels.subjects.items", lambda *_: few)
    # A chunk too far, which a real kernel might well choose.
    monkeypatch.setattr(twins, "choose_chunks", lambda **inputs: slots.choose_chunks(**inputs) + 1)
    assert main(bench) == 1
    said = capsys.readouterr()
    assert "WRONG" in said.out
    wrong = [line for line in said.err.splitlines() if line.startswith("skv: ")]
    assert wrong == ["skv: wrong: choose_chunks interpreter: does not give what its plain-torch twin gives"]


def test_a_run_folder_says_everything_and_goes_on(capsys, bench, tmp_path, monkeypatch):
    from shadowkv.kernels import twins

    out = tmp_path / "run"
    argv = [*bench, "--out", str(out), "--quiet"]
    good = twins.fill_keys
    monkeypatch.setattr(twins, "fill_keys", lambda *args, **named: None)  # writes nothing
    assert main(argv) == 1
    assert "WRONG" in (out / "summary.md").read_text()
    monkeypatch.setattr(twins, "fill_keys", good)
    # Only what was wrong is measured again.
    monkeypatch.setattr(twins, "attend_resident", lambda *args, **named: pytest.fail("was settled"))
    assert main(argv) == 0
    manifest, records = read_records(out, KernelRecord)
    assert {record.status for record in records} == {"ok", "skipped"}
    assert manifest.benchmark == "kernels"
    assert len(manifest.sessions) == 2
    made = {path: path.read_text() for path in out.glob("summary.*")}
    assert {path.suffix for path in made} == {".csv", ".md", ".tex"}
    assert all("times need a GPU" in text for text in made.values())
    page = made[out / "summary.md"]
    assert "[synthetic KV]" in page
    assert "WRONG" not in page
    assert capsys.readouterr().out == ""
    assert main(["report", str(out)]) == 0
    assert {path: path.read_text() for path in out.glob("summary.*")} == made


def test_a_kernel_is_measured_again_where_only_what_stands_beside_it_was_right(bench, tmp_path, monkeypatch):
    from shadowkv.kernels import twins

    argv = [*bench, "--out", str(tmp_path), "--quiet"]
    few = [item for item in items(_workload(), twins) if item.kernel == "fill_values"]
    monkeypatch.setattr("evals.bench.kernels.subjects.items", lambda *_: few)
    good = twins.fill_values
    monkeypatch.setattr(twins, "fill_values", lambda *args, **named: None)  # writes nothing
    assert main(argv) == 1
    found = {record.way: record.status for record in read_records(tmp_path, KernelRecord)[1]}
    assert found == {"interpreter": "wrong", "staged copy": "ok"}
    monkeypatch.setattr(twins, "fill_values", good)
    assert main(argv) == 0
    assert {record.status for record in read_records(tmp_path, KernelRecord)[1]} == {"ok"}


def test_a_dry_run_computes_nothing(capsys, bench, monkeypatch):
    monkeypatch.setattr(KernelBench, "measure", lambda *_: pytest.fail("measured"))
    assert {row["kernel"] for row in told(capsys, [*bench, "--dry-run"])["rows"]} == KERNELS
    assert main([*bench, "--dry-run"]) == 0
    assert "Nothing was run." in capsys.readouterr().out


def test_some_kernels_alone_are_measured_in_their_own_order(capsys, bench, tmp_path):
    argv = [*bench, "--only", " plan_fill,chunk_scores ", "--out", str(tmp_path / "run")]
    assert [row["kernel"] for row in told(capsys, argv)["rows"]] == ["chunk_scores", "plan_fill"]
    argv[-3] = "choose_chunks"
    kernels = [row["kernel"] for row in told(capsys, argv)["rows"]]
    assert kernels == ["chunk_scores", "plan_fill", "choose_chunks"], "a folder goes on"
    assert [row["kernel"] for row in told(capsys, [*argv, "--dry-run"])["rows"]] == ["choose_chunks"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--only", "chunk_score"],
            "unknown kernel 'chunk_score' (did you mean 'chunk_scores'?); one of",
        ),
        (["--only", ","], "--only names no kernel; one of chunk_scores,"),
        (["--compile", "sm_9"], "unknown target 'sm_9' (did you mean 'sm_90'?)"),
        (["--compile", ","], "for example --compile sm_80,sm_90"),
        (["--context", "64"], "give a longer context or a smaller budget"),
        (["--context", "1k,2k"], "give one --context"),
        (["--context", "long"], "is not a length"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--misses", "0"], "--misses 0.0 is not a share in (0, 1]"),
        (["--dtype", "float8"], "unknown dtype"),
        (["--model", "llama3.1"], "did you mean 'llama3.1-8b'"),
        (["-m", "shadwkv"], "did you mean 'shadowkv'"),
        (["-m", "quest"], "kernels are shadowkv's"),
        (["-m", "shadowkv+minference"], "kernels are shadowkv's"),
        (["-m", "shadowkv:energy=0.9,budget=64"], "give rank instead of energy"),
        (["-m", "shadowkv:rank=64,budget=64"], "exceeds the width"),
    ],
)
def test_mistakes_are_one_line(capsys, bench, argv, says):
    assert says in mistake(capsys, *bench, *argv)


def test_a_gpu_that_is_not_here_and_triton_that_is_not_here(capsys, bench, monkeypatch):
    assert "no CUDA device" in mistake(capsys, *bench, "--device", "cuda")
    monkeypatch.setattr("shadowkv.kernels.backend.has_triton", lambda: False)
    assert "pip install 'skv[gpu]'" in mistake(capsys, *bench)


def _command(folder, *argv):
    """The JSON of a command that decides itself whether kernels are interpreted."""
    code = "import sys; from cli.main import main; sys.exit(main(sys.argv[1:]))"
    whole = ["bench", "kernels", "--model", str(folder), *SIZES, "--json", *argv]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *whole], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return json.loads(done.stdout)


def test_a_cpu_interprets_and_compiles_for_a_gpu_that_is_not_here(tiny_folder, tmp_path):
    pytest.importorskip("triton", reason="kernels need Triton")
    found = _command(tiny_folder, "--device", "cpu", "--compile", "sm_90", "--out", str(tmp_path))
    assert {row["status"] for row in found["rows"]} == {"ok", "skipped"}
    assert {each["target"] for each in found["compiled"]} == {"sm_90"}
    assert all(0 < each["registers"] <= 255 for each in found["compiled"])
    kept = [CompiledKernel(**json.loads(line)) for line in (tmp_path / "compiled.jsonl").read_text().splitlines()]
    assert [vars(each) for each in kept] == found["compiled"]
    assert "Compiled, not run." in (tmp_path / "summary.md").read_text()


@pytest.mark.gpu
def test_a_gpu_times_everything(tiny_folder, tmp_path):
    rows = _command(tiny_folder, "--device", "cuda", "--steps", "5", "--out", str(tmp_path))["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert _ways(rows, "whole context") == ["triton", *WHOLE]
    for row in rows:
        if row["status"] == "skipped":
            assert row["way"] in WHOLE[1:]
            continue
        assert row["status"] == "ok", row
        assert row["times_ms"]["p50"] > 0
        assert row["kernel"] == "low_rank.fit" or row["share_of_bytes"] > 0
    assert "staged copy" in (tmp_path / "summary.md").read_text()


class _Timer:
    """Says what was timed, and that everything took a while."""

    def __init__(self):
        self.asked = []

    def replayed(self, calls):
        self.asked.append("graph")
        return [2.0] * 3

    def waited(self, call, most=None):
        self.asked.append("waited")
        return [5.0] * 3


def _bench(timer):
    return KernelBench(torch.device("cpu"), "here", "triton", timer, Rates(2e6, 1e6, 8e6))


def _subject(answer):
    wanted = torch.arange(4.0)
    other = Way("by hand", lambda: [lambda: wanted], False)
    return Subject(
        (lambda: wanted + answer,),
        (lambda: wanted,),
        1e-3,
        moved_bytes=2000,
        over_link=True,
        flop=8000,
        besides=(other,),
    )


def test_rates_are_shares_of_those_of_the_machine():
    found = _bench(_Timer()).measure(Item("some", "", lambda: _subject(0.0)))
    kernel, beside = found
    assert (kernel.way, beside.way) == ("triton", "by hand")
    assert kernel.bytes_per_s == pytest.approx(1e6)  # 2000 bytes in 2 ms
    assert kernel.share_of_bytes == pytest.approx(1.0)  # of the link
    assert kernel.share_of_flop == pytest.approx(0.5)
    table = kernel_table("t", found)
    assert [line[-2:] for line in table.rows] == [["–", "100"], ["2.50", "40"]]  # 5 ms over 2 ms


def test_other_ways_stand_beside_their_own_kernel_and_the_fastest_is_named():
    right, wrong = _subject(0.0), _subject(1.0)
    besides = (*right.besides, Way("by machine", right.besides[0].make, False))
    found = _bench(_Timer()).measure(Item("some", "", lambda: replace(right, besides=besides)))
    found += _bench(_Timer()).measure(Item("other", "", lambda: replace(wrong, besides=besides)))
    found = [replace(record, ms=[1.0]) if record.way == "by machine" else record for record in found]
    model = {"name": "m", "dtype": "float32", "device": "cpu", "dummy": False}
    report = report_of(Manifest("kernels", {}, {}, {}, model, {}, []), found, [])
    # Nothing is held against a kernel that is wrong.
    assert [line[-2] for line in report.tables[0].rows] == ["–", "2.50", "0.50", "–", "–", "–"]
    assert [line[-1] for line in report.tables[0].rows] == ["50", "20", "100", "–", "20", "100"]
    assert [note for note in report.notes if "fastest" in note] == [
        "some: by machine is the fastest way measured; triton has 50 % of its speed",
        "other: by machine is the fastest way measured",
    ]


def test_a_report_says_the_rates_that_shares_are_of(capsys, bench, monkeypatch):
    on_device = Item("other", "", lambda: replace(_subject(0.0), over_link=False))
    monkeypatch.setattr(
        "evals.bench.kernels.subjects.items", lambda *_: [Item("some", "", lambda: _subject(0.0)), on_device]
    )
    monkeypatch.setattr("cli.bench.kernels._bench", lambda _: _bench(_Timer()))
    (said,) = [note for note in told(capsys, bench)["notes"] if note.startswith("reached here")]
    assert said == (
        "reached here: copy on the device 0.002 GB/s, copy from pinned memory 0.001 GB/s, square product 8e-06 TFLOP/s"
    )


def test_what_is_wrong_is_not_timed():
    timer = _Timer()
    wrong, beside = _bench(timer).measure(Item("some", "", lambda: _subject(1.0)))
    assert (wrong.status, wrong.ms, wrong.bytes_per_s) == ("wrong", [], None)
    assert wrong.relative_error == pytest.approx(1 / 3)
    assert beside.status == "ok"
    assert timer.asked == ["waited"]


def test_a_failure_is_a_record_of_its_own():
    def fails():
        raise torch.OutOfMemoryError("out of memory")

    (record,) = _bench(_Timer()).measure(Item("some", "", fails))
    assert (record.status, record.ms, record.relative_error) == ("oom", [], None)


def _fails():
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("at", ["making it", "calling it"])
def test_what_fails_beside_a_kernel_is_one_line_and_takes_nothing_else_down(at):
    other = Way("compiled", _fails if at == "making it" else lambda: [_fails], True)
    subject = _subject(0.0)
    with_both = replace(subject, besides=(other, *subject.besides))
    kernel, failed, beside = _bench(_Timer()).measure(Item("some", "", lambda: with_both))
    assert (failed.way, failed.status, failed.error, failed.ms) == ("compiled", "error", "no compiler", [])
    assert (failed.relative_error, failed.bytes_per_s) == (None, None)
    assert [record.status for record in (kernel, beside)] == ["ok", "ok"]


def test_a_kernel_that_fails_leaves_what_stands_beside_it():
    timer = _Timer()
    kernel, beside = _bench(timer).measure(Item("some", "", lambda: replace(_subject(0.0), calls=(_fails,))))
    assert (kernel.status, beside.status) == ("error", "ok")
    assert timer.asked == ["waited"]


def _not_here():
    raise NotHereError("needs another machine")


def test_a_way_that_is_not_here_is_skipped_with_its_reason_and_is_no_failure(capsys, bench, monkeypatch):
    way = Way("elsewhere", _not_here, True)
    item = Item("some", "", lambda: replace(_subject(0.0), besides=(way,)))
    kernel, elsewhere = _bench(_Timer()).measure(item)
    assert (kernel.status, elsewhere.status, elsewhere.error) == ("ok", "skipped", "needs another machine")
    assert (elsewhere.final, elsewhere.ms) == (True, [])
    monkeypatch.setattr("evals.bench.kernels.subjects.items", lambda *_: [item])
    assert "skipped: some elsewhere: needs another machine" in told(capsys, bench)["notes"]


@pytest.mark.parametrize("group", [1, 4, 7])
def test_a_groups_queries_as_a_prompt_without_a_mask_attend_to_all(group):
    """As flash attention takes them, which reads a key once for all of them. On a CPU torch has that kernel too."""
    case = Case(chunks=11, group=group)
    inputs = attention_inputs(case, Regions(0, 0, case.tokens), [[0, 0, 0, case.tokens]] * case.batch)
    asked = full_attention.Whole(inputs["q"], inputs["k"], inputs["v"], 0.3)
    got = full_attention.by_groups(asked, SDPBackend.FLASH_ATTENTION)()
    wanted = slots.attend_resident(**(inputs | {"scaling": 0.3}))
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_what_torch_has_no_kernel_for_is_not_here_in_its_own_words():
    inputs = attention_inputs(Case(), Regions(0, 0, 320), [[0, 0, 0, 320]] * 2)
    asked = full_attention.Whole(inputs["q"], inputs["k"], inputs["v"], 0.3)
    with pytest.raises(NotHereError, match="No viable backend"):
        full_attention.by_groups(asked, SDPBackend.EFFICIENT_ATTENTION)


class _Clockwork(GpuTimer):
    """Graphs are what was captured; a call takes as long as it says, a flush 40 us, launching a graph 5 us."""

    def __init__(self, monkeypatch):
        self.passed_ms, self.flushes = 0.0, 0
        self._cache = self
        monkeypatch.setattr(gpu_timing, "_captured", lambda call: call)

    def zero_(self):
        self.passed_ms += 0.04
        self.flushes += 1

    def takes(self, ms):
        def call():
            self.passed_ms += ms

        return call

    def _timed(self, graphs):
        found = []
        for graph in graphs:
            before = self.passed_ms
            graph()
            found.append(self.passed_ms - before + 0.005)
        return found


def test_a_short_kernel_is_timed_without_the_launch_of_its_graph_and_still_finds_the_cache_cold(monkeypatch):
    clock = _Clockwork(monkeypatch)
    assert clock.replayed([clock.takes(0.5)]) == pytest.approx([0.505])
    assert clock.flushes == 0, "a long one is timed alone"
    assert clock.replayed([clock.takes(0.01), clock.takes(0.03), clock.takes(0.02)]) == pytest.approx([0.02])
    assert clock.flushes == 2 * 12, "three calls in turns, each as often"


def _flex(compiled, case):
    """An item whose only other way to all of a context is FlexAttention, by a scale that is nobody's default."""

    def make():
        inputs = attention_inputs(case, Regions(0, 0, case.tokens), [[0, 0, 0, case.tokens]] * case.batch)
        inputs["scaling"] = 0.3
        q, k, v, scaling = (inputs[name] for name in ("q", "k", "v", "scaling"))
        twin = partial(slots.attend_resident, **inputs)
        way = Way("torch flex", lambda: [whole_context(q, k, v, scaling, compiled)], True)
        return Subject((twin,), (twin,), 2e-5, besides=(way,))

    return Item("attend_resident", "", make)


def test_a_compiler_that_is_missing_costs_flex_attention_its_time_and_nothing_else():
    timer = _Timer()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        kernel, flex = _bench(timer).measure(_flex(True, Case(chunks=41)))
    assert (kernel.status, flex.status, flex.ms) == ("ok", "error", [])
    assert "No working C++ compiler" in flex.error
    assert "\n" not in flex.error
    assert timer.asked == ["graph"]


# Compiled for a CPU it is another template than for a GPU, given the same arguments.
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_flex_attention_gives_the_twins_result(compiled):
    _, flex = _bench(_Timer()).measure(_flex(compiled, Case(chunks=43, group=4)))
    assert (flex.status, flex.error) == ("ok", None)
    assert flex.relative_error < flex.bound


def test_flex_attention_is_the_compiled_one_where_times_are_taken():
    from shadowkv.kernels import twins

    work = _workload()
    on_device = replace(work, case=replace(work.case, device="meta"))  # makes no inputs, so needs none
    (whole,) = [item.make() for item in items(on_device, twins) if item.variant == "whole context"]
    assert [way.name for way in whole.besides] == WHOLE


def test_what_compiles_when_first_called_has_done_so_before_any_time_is_taken():
    timer, subject = _Timer(), _subject(0.0)
    answer = subject.twins[0]

    def compiles():
        timer.asked.append("called")
        return answer()

    way = Way("compiled", lambda: [compiles], True)
    _bench(timer).measure(Item("some", "", lambda: replace(subject, besides=(way,))))
    assert timer.asked == ["graph", "called", "graph"]


def test_what_is_wrong_beside_a_kernel_gets_no_speed():
    timer, subject = _Timer(), _subject(0.0)
    wrong = Way("by heart", lambda: [lambda: torch.ones(4)], False)
    _, beside = _bench(timer).measure(Item("some", "", lambda: replace(subject, besides=(wrong,))))
    assert (beside.status, beside.ms, beside.share_of_bytes) == ("wrong", [], None)
    assert timer.asked == ["graph"]


@pytest.mark.parametrize(
    ("got", "wanted", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.25),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), 0.0),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, torch.nan]), float("inf")),  # wrote what it should not
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), float("inf")),  # left out what it should
        (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 4, 3]), 0.5),
        (torch.tensor([1.0]), torch.tensor([1.0, 2.0]), float("inf")),
        (torch.tensor([1.0]), torch.tensor([1.0]).half(), float("inf")),
    ],
)
def test_relative_error(got, wanted, error):
    assert relative_error([got], [wanted]) == error


def test_the_rotary_table_is_a_llamas():
    """Against the model library's own function, for the frequencies that the formula has."""
    from tiny_models import tiny_model

    from shadowkv.anatomy.rope import Rope

    case = Case(head_dim=16, chunks=5)
    rope = Rope(tiny_model("llama"))
    x = torch.randn(1, 1, case.tokens, 16)
    positions = torch.arange(case.tokens)
    mine = llama_rotary(case).rotate(x, positions[None, None])
    torch.testing.assert_close(mine, rope.rotate(0, x, positions, case.tokens), rtol=1e-5, atol=1e-5)


def test_a_staged_copy_is_another_way_to_the_twins_result():
    from evals.bench.kernels.cases import filling, stored_values

    case = Case(values="int4")
    stored, plan = stored_values(case), filling(case, 3)
    got, wanted = (torch.zeros(2, 2, case.slots * case.chunk, 64) for _ in range(2))
    staged_copy(stored, 2 * 2 * 3 * case.chunk)(*plan.values(), got)
    slots.fill_values(stored, *plan.values(), wanted)
    assert torch.equal(got, wanted)
    assert wanted.any()


def test_a_long_row_is_factorised_without_an_svd(monkeypatch):
    """Which takes minutes of a GPU, several times over; both ways agree where both are had."""
    case = Case(batch=1, heads=2, head_dim=16, chunks=40, rank=6)
    small = fit.factorisation(case)
    monkeypatch.setattr(fit, "_LARGEST_SVD", 0)
    torch.manual_seed(0)
    long = fit.factorisation(case)
    assert [way.name for way in small.besides] == ["torch.linalg.svd"]
    assert not long.besides
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("an SVD"))
    assert abs(long.error([call() for call in long.calls], [call() for call in long.twins])) < 1e-3
