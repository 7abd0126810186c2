"""Prompts are what the chat template makes of the message, and thoughts do not eat an answer unsaid."""

from __future__ import annotations

import json
import shutil
from datetime import datetime

import pytest

from cli.main import main
from evals.common.chat import Chat
from evals.longbench.task import LongBench
from evals.niah.task import Niah
from evals.niah.turns import MultiTurnNiah
from evals.ruler.files import RulerFiles
from evals.ruler.task import Ruler
from evals.runs.results import read_run
from shadowkv.common.errors import SkvError
from shadowkv.models.loading import load_tokenizer
from shadowkv.models.presets import find_preset
from shadowkv.models.resolving import ModelSource

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content CHANGED }}</s>{% endfor %}"
PLAIN = TURNS.replace("CHANGED", "") + "<assistant>"
TRIMS = TURNS.replace("CHANGED", "| trim") + "<assistant>"
# As templates change messages; none of these loses a word.
CHANGES = {
    "nothing": "",
    "trims": "| trim",
    "collapses": "| replace('\\n\\n', '\\n') | trim",
    "escapes": "| e",
    "quotes": "| tojson",
    "lowers": "| lower",
    "indents": "| indent(2)",
}
UNSCORED = "thoughts are not scored; --thinking-tokens gives them room"
# As published templates switch thoughts.
QWEN3 = PLAIN + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
GRANITE = "{% if thinking %}Think inside <think></think> first.{% endif %}" + PLAIN
DEEPSEEK = PLAIN + "{% if thinking %}<think>{% else %}</think>{% endif %}"
ALWAYS = PLAIN + "<think>\n"
ALWAYS_TOO = [
    PLAIN + begun for begun in ("[THINK]", "<|START_THINKING|>", "◁think▷", "<|begin_of_thought|>", "<seed:think>")
]
STRIPS = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}<assistant>"
MESSAGE = ' \n Read <this> & "that".\n\n\nA  b\tC?\n\n'


def templated(template):
    made = load_tokenizer(ModelSource("bytes", None, find_preset("llama3.1-8b"), "dummy"))
    made.chat_template = template
    return made


def by_itself(tokenizer, *contents, **variables):
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables)


@pytest.mark.parametrize("change", CHANGES)
def test_a_prompt_is_what_the_template_makes_of_the_message(change):
    tokenizer = templated(TURNS.replace("CHANGED", CHANGES[change]) + "<assistant>")
    for message in (MESSAGE, "x", "\n", "firststandin"):
        assert Chat(tokenizer).text(message, "So: ") == by_itself(tokenizer, message) + "So: "


def test_without_a_template_a_message_stays_as_it_is():
    assert Chat(templated(None)).text(MESSAGE, "So: ") == MESSAGE + "So: "
    assert Chat(templated(None)).config() == {}
    assert Chat(templated(None)).notes((16,)) == []


@pytest.mark.parametrize(
    "template",
    [
        "<user><assistant>",
        "{{ messages[0].content * 2 }}",
        "{{ messages[0].content[:3000] }}",
        "{{ messages[0].content | truncate(3000) }}",
        "{{ messages[0].content.split() | first }}",
        "{{ messages[0].content }}{{ messages[0].content[-20:] }}",
    ],
)
def test_templates_that_lose_or_repeat_words_are_refused(template):
    with pytest.raises(SkvError, match="drops, repeats or changes the message"):
        Chat(templated(template))


def test_templates_know_one_day():
    """Also where the clock is asked: Llama 3.2, gpt-oss and SmolLM3 do, each in its way."""
    asked = "{% if strftime_now is defined %}{%- set today = strftime_now('%d %B %Y') %}{% endif %}{{ today }} "
    asked += "{{ 'Date: ' + strftime_now('%Y-%m-%d, %-m %A') }} {{ date_string }}"
    told = "26 July 2024 Date: 2024-07-26, 7 Friday 26 Jul 2024"
    assert Chat(templated(asked + PLAIN)).text("x") == by_itself(templated(told + PLAIN), "x")
    begins = "  {% if true %}\n  begins{% endif %}"  # blanks before a tag that begins a line are the tag's
    for before in (begins, f"\n{begins}", f" {{# #}} {begins}"):
        today = f"{before}{{{{ strftime_now('%d %b %Y') }}}}{PLAIN}"
        now = datetime.now().strftime("%d %b %Y")
        assert Chat(templated(today)).text("x").replace("26 Jul 2024", now) == by_itself(templated(today), "x")


# ---- the needle test, whose text is put in as tokens


def needles(tokenizer, **changes):
    settings = {"lengths": (2048,), "depths": (50.0,), "haystack_spec": "synthetic"}
    return next(Niah(**{**settings, **changes}).examples(tokenizer))


def test_a_needle_tests_frame_is_the_templates_own(monkeypatch):
    """An instruction and a question with blanks at their ends, which this template takes away."""
    monkeypatch.setattr("evals.niah.protocols.MagicNumber.instruction", "\n Read the text. ")
    made = "evals.niah.protocols.MagicNumber._about"
    from evals.niah.protocols import Needle

    monkeypatch.setattr(made, lambda self, place, number: Needle(f"{place}: {number}.", "Which?\n\n", "It is", number))
    for template in (TRIMS, PLAIN):
        tokenizer = templated(template)
        text = tokenizer.decode(needles(tokenizer).input_ids)
        message = text.removeprefix("<user>").removesuffix("</s><assistant>It is")
        if template is TRIMS:
            assert message.startswith("Read the text. \n\n")
            assert message.endswith("\n\nWhich?")
            message = f"\n {message}\n\n"
        assert by_itself(tokenizer, message) + "It is" == text


@pytest.mark.parametrize("change", ["escapes", "quotes", "lowers", "indents"])
def test_a_needle_test_is_refused_where_the_text_would_not_stay_as_it_is(change, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("A line of <text> & more.\n\nAnother Line, indented. " * 30)
    tokenizer = templated(TURNS.replace("CHANGED", CHANGES[change]) + "<assistant>")
    for task in (Niah, MultiTurnNiah):
        grid = task(lengths=(4096,), depths=(0.0, 50.0), haystack_spec=str(book))
        with pytest.raises(SkvError, match=r"changes the text inside a message.*skv eval ruler"):
            grid.questions(tokenizer)


def test_copies_of_a_text_are_part_of_what_must_stay(tmp_path):
    """This text has no empty line, but between two copies of it there is one."""
    book = tmp_path / "book.txt"
    book.write_text("One line of text. " * 100 + "End.")
    tokenizer = templated(TURNS.replace("CHANGED", CHANGES["collapses"]) + "<assistant>")
    with pytest.raises(SkvError, match="changes the text inside a message"):
        needles(tokenizer, haystack_spec=str(book))


def test_later_turns_are_the_templates_too(monkeypatch):
    from evals.niah.protocols import Needle

    def about(self, place, number):
        return Needle(f"{place}: {number}.", f" {place}?\n\n", "It is", number)

    monkeypatch.setattr("evals.niah.protocols.MagicNumber._about", about)
    for template, tail in ((TRIMS, ""), (PLAIN, ""), (QWEN3, "<think>\n\n</think>\n\n")):
        tokenizer = templated(template)
        grid = MultiTurnNiah(lengths=(2048,), depths=(50.0,), haystack_spec="synthetic", turns=2)
        told = tokenizer.decode(next(grid.examples(tokenizer)).later[-1].input_ids)
        place = told.partition("<user>")[2].partition("?")[0].strip()
        whole = by_itself(tokenizer, ".", "ANSWER", f" {place}?\n\n", enable_thinking=False)
        assert told == whole.partition("ANSWER")[2] + "It is"
        assert told.endswith(f"<assistant>{tail}It is")


def test_generated_prompts_fill_their_length_as_rendered():
    for template in (PLAIN, TRIMS, TURNS.replace("CHANGED", "| e") + "<assistant>"):
        tokenizer = templated(template)
        task = Ruler(lengths=(2048,), tasks=("niah_multikey_2", "vt"), samples=1, wording="own")
        for example, text in task.prompts(tokenizer):
            whole = text + example.meta["answer_prefix"]
            assert Chat(tokenizer).ids(whole) == list(example.input_ids)
            assert 0.9 * 2048 < len(example.input_ids) + example.max_new_tokens <= 2048


# ---- thoughts


def said(template, thinking="auto", answers=(32,)):
    chat = Chat(templated(template), thinking)
    return chat.config(), " ".join(chat.notes(answers)), chat.text("Hi?")


@pytest.mark.parametrize("template", [QWEN3, GRANITE, DEEPSEEK])
def test_thoughts_are_switched_off_where_a_template_has_a_switch(template):
    tokenizer = templated(template)
    off = by_itself(tokenizer, "Hi?", enable_thinking=False, thinking=False)
    on = by_itself(tokenizer, "Hi?", enable_thinking=True, thinking=True)
    note = "thinking is switched off in the chat template"
    assert said(template) == said(template, "off") == ({"thinking": "off"}, note, off)
    config, note, text = said(template, "on", (32, 128))
    assert (config, text) == ({"thinking": "on"}, on)
    counted = "switched on in the chat template: the thought counts towards an answer's 32 to 128 tokens"
    assert note.endswith(f"{counted} {UNSCORED}")


@pytest.mark.parametrize("template", [PLAIN, ALWAYS, STRIPS, None])
def test_what_cannot_be_switched_is_refused(template):
    for thinking in ("on", "off"):
        with pytest.raises(SkvError, match=f"--thinking {thinking}: this model's .* has no"):
            Chat(templated(template), thinking)
    with pytest.raises(SkvError, match="did you mean 'off'"):
        Chat(templated(template), "of")


@pytest.mark.parametrize("template", [ALWAYS, *ALWAYS_TOO])
def test_a_thought_that_is_always_begun_is_said(template):
    begun = (
        "this model's template begins a thought that cannot be switched off: an answer of 32 tokens may end inside it "
        "how thoughts of this model end is not known: they are scored too"
    )
    assert said(template)[:2] == ({}, begun)
    assert said(template)[2] == by_itself(templated(template), "Hi?")


def test_what_is_known_of_other_templates_is_said_too():
    assert said(PLAIN)[:2] == ({}, "")
    assert said(PLAIN + "<think></think>")[:2] == ({}, said(STRIPS)[1])
    assert said(STRIPS)[:2] == (
        {},
        f"this model's template knows of thoughts, which have no switch: an answer of 32 tokens may be one {UNSCORED}",
    )


@pytest.fixture
def thinker(tiny_folder, tmp_path):
    """A folder of a model with this template."""

    def make(template):
        folder = tmp_path / "thinker"
        shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
        (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return make


ROWS = {"input": "Who?", "context": "Ada wrote. " * 100, "answers": ["Ada"], "length": 200, "all_classes": None}


@pytest.fixture
def commands(tmp_path):
    """Every accuracy command, and whether its prompts end in an answer's beginning."""
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps(ROWS) + "\n")
    v2 = {"context": "Ada wrote.", "question": "Who?", "answer": "A", "difficulty": "easy", "length": "short"}
    (tmp_path / "data.json").write_text(json.dumps([v2 | {f"choice_{letter}": letter for letter in "ABCD"}]))
    niah = ["niah", "--lengths", "1k", "--depths", "1", "--haystack", "synthetic", "--max-new-tokens", "4"]
    ruler = ["ruler", "--lengths", "2k", "--tasks", "vt", "--samples", "1"]
    return {
        "niah": niah,
        "turns": [*niah, "--turns", "2"],
        "ruler": [*ruler, "--wording", "own"],
        "longbench": ["longbench", "--tasks", "hotpotqa", "--data", str(tmp_path), "--wording", "own"],
        "v2": ["longbench", "--v2", "--data", str(tmp_path)],
    }


@pytest.mark.parametrize("name", ["niah", "turns", "ruler", "longbench", "v2"])
def test_every_command_says_and_keeps_what_was_done(thinker, commands, tmp_path, capsys, name):
    words = ["eval", *commands[name], "-m", "full", "--out", str(tmp_path / "run")]
    assert main([*words, "--model", thinker(QWEN3)]) == 0
    note = "thinking is switched off in the chat template"
    assert f"skv: note: {note}\n" in capsys.readouterr().err
    manifest, records = read_run(tmp_path / "run")
    assert manifest.config["thinking"] == "off"
    assert note in manifest.notes
    assert note in (tmp_path / "run" / "summary.md").read_text()
    if name != "ruler":  # whose answer's beginning fills the tail that is kept
        assert all("<think>\n\n</think>\n\n" in record.prompt_tail for record in records)
    assert main([*words, "--model", thinker(QWEN3), "--thinking", "on"]) == 2, "another run"
    assert "thinking: off -> on" in capsys.readouterr().err


def test_runs_of_templates_without_a_switch_are_as_they_were(thinker, commands, tmp_path, capsys):
    words = ["eval", *commands["niah"], "-m", "full", "--out", str(tmp_path / "run")]
    assert main([*words, "--model", thinker(PLAIN)]) == 0
    assert "thinking" not in read_run(tmp_path / "run")[0].config
    for asked in ("on", "off"):
        assert main([*words, "--model", thinker(PLAIN), "--thinking", asked]) == 2
        assert f"--thinking {asked}: this model's chat template has no switch" in capsys.readouterr().err


def test_prompts_from_files_are_wrapped_as_others_are(thinker, commands, tmp_path, capsys):
    made = ["data", "ruler", *commands["ruler"][1:]]
    assert main([*made, "--model", thinker(QWEN3), "--out", str(tmp_path / "off")]) == 0
    assert "skv: note: thinking is switched off" in capsys.readouterr().err
    assert main([*made, "--model", thinker(QWEN3), "--out", str(tmp_path / "on"), "--thinking", "on", "-q"]) == 0
    row = {
        name: json.loads((tmp_path / name / "2048" / "vt" / "validation.jsonl").read_text()) for name in ("off", "on")
    }
    assert row["off"]["input"].endswith("<assistant><think>\n\n</think>\n\n")
    assert row["on"]["input"].endswith("<assistant>")
    tokenizer = templated(QWEN3)
    wrapped = next(RulerFiles(tmp_path / "on", (), ("vt",), wrap=True).examples(tokenizer))
    assert tokenizer.decode(wrapped.input_ids).endswith("</think>\n\n" + row["on"]["answer_prefix"])
    asked = ["eval", "ruler", "--data", str(tmp_path / "on"), "--model", thinker(QWEN3), "--thinking", "off"]
    assert main([*asked, "--dry-run"]) == 2
    assert "no prompt of these is put into it" in capsys.readouterr().err
    assert main([*asked, "--wrap-data", "--dry-run"]) == 0


def test_tasks_without_the_template_have_no_thoughts_to_switch(tmp_path):
    (tmp_path / "lcc.jsonl").write_text(json.dumps(ROWS) + "\n")
    of = {task: LongBench((task,), 3500, data=str(tmp_path), wording="own") for task in ("lcc", "hotpotqa")}
    assert list(of["lcc"].chat_answer_tokens()) == []
    assert list(of["hotpotqa"].chat_answer_tokens()) == [32]
