"""Forced continuations: what is measured, on what, and that a method which loses nothing is at no distance."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_methods import CASES
from test_niah import BYTES, tokenizer  # noqa: F401 - a fixture
from tiny_models import VOCAB, random_prompt

from cli.main import main
from evals.fidelity.books import Books, Shelf, read_books
from evals.fidelity.forced_task import ForcedTask
from evals.fidelity.task import RunningText
from evals.niah.task import Niah
from evals.niah.turns import MultiTurnNiah
from evals.runs.forced import distributions
from evals.runs.forced.distributions import distances, joined, keep, kept_of
from evals.runs.forced.forcing import Forcing
from evals.runs.forced.loop import forced_answers
from evals.runs.forced.record import ForcedRecord
from evals.runs.results import read_records
from evals.runs.run import Run
from evals.runs.task import Example
from shadowkv.common.errors import SkvError
from shadowkv.contract.registry import methods, parse_method
from shadowkv.engine.engine import Engine
from shadowkv.models.loading import load_tokenizer


def logits(tokens, vocabulary=50, seed=0):
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def measured(full, method, coming, pieces=(12,)):
    parts, start = [], 0
    for piece in pieces:
        parts.append(distances(full, start, method[start : start + piece], coming[start : start + piece]))
        start += piece
    return joined(parts)


def test_distances_are_those_of_torch():
    full, method, coming = logits(12), logits(12, seed=1), torch.arange(12)
    found = measured(kept_of(full, 12), method, coming, (5, 1, 6))
    p, q = (torch.distributions.Categorical(logits=x.double()) for x in (full, method))
    expected = torch.distributions.kl_divergence(p, q)
    assert found.kl == pytest.approx(expected.tolist(), abs=1e-5)
    assert found.nll == pytest.approx((-q.log_prob(coming)).tolist(), abs=1e-5)
    assert found.top1 == (full.argmax(-1) == method.argmax(-1)).int().tolist()
    order = method.argsort(dim=-1, descending=True)
    assert found.rank == [1 + order[i].tolist().index(int(full[i].argmax())) for i in range(12)]
    five = [set(full[i].topk(5).indices.tolist()) & set(method[i].topk(5).indices.tolist()) for i in range(12)]
    assert found.top5 == [len(both) for both in five]


def test_alike_logits_are_at_no_distance():
    full = logits(12)
    found = measured(kept_of(full, 12), full.clone(), torch.arange(12), (3, 9))
    assert found.kl == [0.0] * 12
    assert (found.top1, found.top5, found.rank) == ([1] * 12, [5] * 12, [1] * 12)


def test_what_does_not_fit_is_kept_in_part_and_divergence_never_grows_by_it(monkeypatch):
    full, method, coming = logits(12, 2000), logits(12, 2000, seed=1), torch.arange(12)
    whole = measured(kept_of(full, 12), method, coming)
    held = []
    for least in (20_000, 60_000):
        monkeypatch.setattr(distributions, "KEPT_BYTES", least)
        kept = keep([kept_of(full[:7], 12), kept_of(full[7:], 12)])
        assert kept.nbytes <= least
        assert kept.described.startswith("top ")
        part = measured(kept, method, coming)
        assert all(some <= all_of_it + 1e-6 for some, all_of_it in zip(part.kl, whole.kl, strict=True))
        assert (part.nll, part.top1, part.top5, part.rank) == (whole.nll, whole.top1, whole.top5, whole.rank)
        held.append(sum(part.kl))
    assert 0 < held[0] < held[1] < sum(whole.kl)
    assert measured(kept, full, coming).kl == pytest.approx([0] * 12, abs=1e-6)


def test_other_vocabularies_are_refused():
    with pytest.raises(ValueError, match="vocabularies differ: 50 and 49"):
        distances(kept_of(logits(12), 12), 0, logits(12, 49), torch.arange(12))


def text_example(prompt=300, forced=24, **changes):
    ids = random_prompt(prompt + forced + 1)[0].tolist()
    made = Example("fidelity", "text", prompt, "0", tuple(ids[:prompt]), (), forced, continuation=tuple(ids[prompt:]))
    return replace(made, **changes)


def run_of(engine):
    return Run(engine, SimpleNamespace(stop_ids=frozenset()), SimpleNamespace(benchmark="fidelity"))


def forced(engine, specs, example=None, forcing=None):
    asked = [parse_method(spec) if isinstance(spec, str) else spec for spec in specs]
    return list(forced_answers(run_of(engine), forcing or Forcing(24), example or text_example(), asked))


@pytest.fixture
def engine(tiny):
    return Engine(tiny("llama"), prefill_chunk_tokens=128, record_queries=True)


@pytest.mark.parametrize("name", methods())
def test_a_lossless_method_is_at_no_distance(engine, name):
    (record,) = forced(engine, [methods()[name]().lossless(engine.dims, 330)])
    assert record.status == "ok", record.error
    assert max(record.kl) <= 1e-6
    assert record.top1 == [1] * 24
    assert record.rank == [1] * 24


@pytest.mark.parametrize("spec", CASES)
def test_all_at_once_gives_what_one_by_one_gives(engine, spec):
    (at_once,), (steps,) = (forced(engine, [spec], forcing=Forcing(24, way)) for way in (False, True))
    assert at_once.kl == pytest.approx(steps.kl, rel=1e-2, abs=1e-5)
    assert at_once.nll == pytest.approx(steps.nll, rel=1e-3)
    assert at_once.prompt_tokens == 300


def test_the_text_is_what_is_fed_and_what_comes_next_is_scored(engine):
    example = text_example()
    (record,) = forced(engine, ["full"], example)
    ids = torch.tensor([[*example.input_ids, *example.continuation]])
    with torch.inference_mode():
        log_p = engine.model(ids).logits.log_softmax(dim=-1)[0]
    # Nothing is measured where the prompt ends: that distribution is the prefill's under every method.
    expected = [-float(log_p[300 + i, ids[0, 301 + i]]) for i in range(24)]
    assert record.nll == pytest.approx(expected, rel=1e-4)
    assert record.full_nll == record.nll


def test_without_a_text_full_attentions_answer_is_fed(engine):
    example = text_example(continuation=(), references=("x",), max_new_tokens=9)
    full, small = forced(engine, ["full", "streaming:budget=40"], example)
    prefill = engine.prefill(torch.tensor([example.input_ids]))
    answer = engine.decode(engine.replay(prefill, parse_method("full")), prefill.logits, 9)[0]
    assert len(full.kl) == len(answer) == 9
    assert max(full.kl) == 0
    assert small.mean_kl > 0.01
    assert full.nll == full.full_nll
    assert max(full.nll) < torch.tensor(float(VOCAB)).log(), "the most likely token is never worse than chance"


def test_a_question_after_the_context_goes_through_the_methods_cache(engine):
    whole = text_example(continuation=(), references=("x",))
    context = replace(whole, input_ids=whole.input_ids[:280], references=(),
                      later=(replace(whole, input_ids=whole.input_ids[280:]),))  # fmt: skip
    for example in (whole, context):
        records = forced(engine, ["full", "snapkv:budget=64,window=16"], example)
        assert [record.prompt_tokens for record in records] == [300, 300]
        assert max(records[0].kl) == 0
        assert records[1].mean_kl > 0
    assert forced(engine, ["full"], whole)[0].prompt_sha256 == forced(engine, ["full"], context)[0].prompt_sha256


def test_a_sparse_prefill_is_held_to_the_dense_one(engine):
    full, sparse = forced(engine, ["full", "full+minference"])
    assert full.mean_kl == 0
    assert sparse.status == "ok"


def test_failures_are_recorded_method_by_method(engine, monkeypatch):
    short = text_example(continuation=tuple(range(10)))
    for record in forced(engine, ["full", "quest:budget=64"], short):
        assert (record.status, record.kl) == ("error", [])
        assert record.error == "10 tokens follow this prompt, and 24 forced ones need one more"
    broken = engine.force

    def overflowing(cache, ids):
        found = broken(cache, ids).clone()
        found[:, 5] = torch.nan
        return found

    monkeypatch.setattr(engine, "force", overflowing)
    (record,) = forced(engine, ["full"])
    assert record.error == "logits are not finite in float32 at step 6 of the answer, first in the method"


# Texts


def test_prompts_are_the_same_however_many_are_asked_for(tokenizer):  # noqa: F811
    def made(**changes):
        task = RunningText(**{"lengths": (256, 512), "forced_tokens": 8, "samples": 6, "data": "synthetic", **changes})
        return {(e.length_tokens, e.sample): e for e in task.examples(tokenizer)}

    everything = made()
    assert len(everything) == 12
    for part in (made(samples=3), made(lengths=(512,))):
        assert all(everything[key] == example for key, example in part.items())
    for number in range(6):
        short, long = everything[256, str(number)], everything[512, str(number)]
        assert len(short.input_ids) == 256
        assert long.input_ids[:256] == short.input_ids, "a longer prompt holds the shorter, which is computed once"
        assert long.input_ids[256:265] == short.continuation
    other = made(seed=1)
    assert all(other[key].input_ids != example.input_ids for key, example in everything.items())


def test_a_tokenizers_beginning_stands_before_every_prompt():
    from tokenizers import processors

    made = load_tokenizer(BYTES)
    begin = made.convert_tokens_to_ids("!")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    window = Shelf(read_books("synthetic"), made, 0).window(3, 100, 5)
    assert window.prompt[0] == begin
    assert (len(window.prompt), len(window.continuation)) == (100, 5)
    assert begin not in window.prompt[1:]


def test_books_of_a_folder_take_turns_and_short_ones_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("alpha beta " * 100)
    (tmp_path / "b.txt").write_text("gamma delta " * 100)
    (tmp_path / "short.txt").write_text("no")
    (tmp_path / "other.bin").write_bytes(b"\xff")
    made = load_tokenizer(BYTES)
    shelf = Shelf(read_books(str(tmp_path)), made, 0)
    assert {shelf.window(number, 200, 9).book for number in range(4)} == {"a.txt", "b.txt"}
    with pytest.raises(SkvError, match=r"need a longer text: the longest has 1200 tokens"):
        shelf.window(0, 5000, 9)
    assert read_books(str(tmp_path)).version == "3 files"
    (tmp_path / "empty").mkdir()
    with pytest.raises(SkvError, match=r"holds no \.txt or \.md file"):
        read_books(str(tmp_path / "empty"))


def test_prompts_that_overlap_are_refused():
    text = Books([("one", "abcdefghij" * 100)], "one", "file")
    shelf = Shelf(text, load_tokenizer(BYTES), 0)
    assert shelf.apart(8, 100, 9) == 8
    assert shelf.apart(8, 200, 9) == 4
    task = RunningText(lengths=(2000,), forced_tokens=8, samples=10_000, data="synthetic")
    with pytest.raises(SkvError, match="that do not overlap, and --samples asks for 10000"):
        task.questions(load_tokenizer(BYTES))


def test_any_benchmarks_prompts_can_be_gone_on_with(tokenizer, tmp_path):  # noqa: F811
    niah = Niah(lengths=(512,), depths=(0.0, 100.0), haystack_spec="synthetic")
    forcing = Forcing(8)
    greedy = ForcedTask(niah, forcing, "greedy")
    assert list(greedy.examples(tokenizer)) == list(niah.examples(tokenizer))
    assert greedy.config() == {**niah.config(), "prompts": "niah", "forced_tokens": 8, "continuation": "greedy"}
    file = tmp_path / "next.txt"
    file.write_text("and so it went on for a while, as it does")
    of_file = ForcedTask(niah, forcing, str(file))
    assert {len(example.continuation) for example in of_file.examples(tokenizer)} == {9}
    assert of_file.sources()["continuation"]["name"] == "next.txt"
    with pytest.raises(SkvError, match=r"no text follows a prompt of niah: --continuation greedy"):
        ForcedTask(niah, forcing, "text")
    with pytest.raises(SkvError, match=r"holds \d+ tokens; 80 forced ones need one more"):
        ForcedTask(niah, Forcing(80), str(file)).questions(tokenizer)
    with pytest.raises(SkvError, match=r"--continuation gredy \(did you mean 'greedy'\?\): it takes text"):
        ForcedTask(niah, forcing, "gredy").questions(tokenizer)
    with pytest.raises(SkvError, match="at least 1 token"):
        ForcedTask(niah, Forcing(0), "greedy")
    with pytest.raises(SkvError, match="leave out --turns"):
        ForcedTask(MultiTurnNiah((2048,), (0.0, 50.0), "synthetic", turns=2), forcing, "greedy")


# Runs


def command(tiny_folder, out, *more, name="fidelity"):
    where = ["--haystack", "synthetic", "--depths", "2"] if name == "niah" else ["--data", "synthetic"]
    return ["eval", name, "--model", str(tiny_folder), "-m", "full", "-m", "quest:budget=64", "--lengths", "512",
            *where, "--out", str(out), *more]  # fmt: skip


def test_a_run_is_shown_continued_and_reported(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(tiny_folder, out, "--forced", "8", "--samples", "2")) == 0
    shown = capsys.readouterr().out
    assert "KL by position" in shown
    assert "every method was fed the text's own continuation, at most 8 tokens" in shown
    manifest, records = read_records(out, ForcedRecord)
    assert manifest.benchmark == "fidelity"
    assert [len(record.kl) for record in records] == [8] * 4
    assert all(record.method != "full" or not any(record.kl) for record in records)
    assert {"by_position.png", "heatmap.png", "kl_by_bytes.png"} <= {path.name for path in (out / "plots").iterdir()}
    lines = (out / "forced.jsonl").read_text().splitlines(keepends=True)
    (out / "forced.jsonl").write_text("".join(lines[:3]))
    assert main(command(tiny_folder, out, "--forced", "8", "--samples", "2")) == 0
    again = {record.key: record for record in read_records(out, ForcedRecord)[1]}
    assert all(again[record.key].kl == record.kl for record in records)
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "Fidelity" in (tmp_path / "report" / "report.html").read_text()
    assert main(["compare", str(out), str(out)]) == 0


def test_full_attentions_answer_to_a_text_can_be_fed_too(tiny_folder, tmp_path):
    out = tmp_path / "run"
    more = ("--forced", "8", "--samples", "2", "--continuation", "greedy", "-q")
    assert main(command(tiny_folder, out, *more)) == 0
    records = read_records(out, ForcedRecord)[1]
    assert [record.status for record in records] == ["ok"] * 4
    assert all(record.nll == record.full_nll for record in records if record.method == "full")


def test_needles_tell_how_far_back_they_are(tiny_folder, tmp_path, capsys):
    assert main(command(tiny_folder, tmp_path / "run", "--forced", "4", name="niah")) == 0
    said = capsys.readouterr()
    assert "KL by where the needle is" in said.out
    assert "every method was fed full attention's greedy answer" in said.out


def test_workers_give_what_one_process_gives(tiny_folder, tmp_path):
    found = []
    for workers in ("1", "2"):
        out = tmp_path / workers
        assert main(command(tiny_folder, out, "--forced", "4", "--samples", "3", "--workers", workers, "-q")) == 0
        records = {record.key: record for record in read_records(out, ForcedRecord)[1]}
        found.append({key: (record.top1, record.prompt_sha256) for key, record in records.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--forced", "0"], "--forced must be at least 1 token, got 0"),
        (["--forced", "8", "--stream"], "--stream keeps none"),
        (["--forced", "8", "--diagnostics"], "with --forced there are none"),
        (["--forced", "8", "--temperature", "0.7"], "with --forced every method is fed the same tokens"),
        (["--forced", "4000"], "512 tokens and 4000 forced ones are beyond this model's context of 4096 tokens"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--question", "after"], "nothing is asked about a running text"),
        (["--data", "nowhere.txt"], "nowhere.txt cannot be read"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_folder, tmp_path, capsys, more, says):
    assert main(command(tiny_folder, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.strip().count("\n") == 0


def test_options_of_forcing_want_forcing(tiny_folder, tmp_path, capsys):
    for more in (["--one-by-one"], ["--continuation", "greedy"]):
        assert main(command(tiny_folder, tmp_path / "run", *more, name="niah")) == 2
        assert "is about tokens that are forced: give --forced" in capsys.readouterr().err


def test_distances_that_are_no_numbers_are_left_out(tiny_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(tiny_folder, out, "--forced", "4", "--samples", "2", "-q")) == 0
    lines = [json.loads(line) for line in (out / "forced.jsonl").read_text().splitlines()]
    lines[1]["kl"][2] = float("nan")
    lines[2]["top1"] = lines[2]["top1"][:-1]
    (out / "forced.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "2 records whose distances are no numbers or not as many" in capsys.readouterr().err
