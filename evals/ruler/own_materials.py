"""RULER without any download: our own wording, word lists made of syllables, and documents from a grammar.

The tasks are the same puzzles, but no score made with them can be held against a published one.
"""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

from evals.common.seeding import seeded
from evals.common.sources import haystack
from evals.ruler.materials import Corpus, Materials, Question, Template

_TEMPLATES = {
    "niah": Template(
        "Some secret {type_needle_v} are written somewhere in the text below. Keep them in mind, because they will be "
        "asked for at the end.\n{context}\nWhat are all the secret {type_needle_v} of {query} that the text mentions?",
        " The secret {type_needle_v} of {query} that the text mentions are",
    ),
    "variable_tracking": Template(
        "The text below assigns values to variables, some of them by way of other variables.\n\n{context}\nWhich "
        "variables hold the value {query} in the end?",
        " Following the assignments, {num_v} variables hold the value {query}: ",
    ),
    "common_words_extraction": Template(
        "Below is a numbered list of words, in which ten words occur more often than the others.\n{context}\nWhich are "
        "the ten words that occur most often?",
        " The ten words that occur most often are:",
    ),
    "freq_words_extraction": Template(
        "The text below is written in made-up words. {context}\nLeaving the dots aside, which three words occur most "
        "often?",
        " The three words that occur most often are:",
    ),
    "qa": Template(
        "Answer a question from the documents below, as briefly as possible.\n\n{context}\n\nAnswer from the documents "
        "above, as briefly as possible.\n\nQuestion: {query}",
        " Answer:",
    ),
}
_SENTENCES = {
    "needle": "A secret {type_needle_v} of {key} is: {value}.",
    "noise": "The rain has stopped. The road is dry. The shop is open. Some people walk by. Then it rains again.",
    "document": "Text {i}:\n{document}",
}
_SYLLABLES = {
    "adjective": ("ba be bo da de do fa fe fo ga ge go".split(), "l m n r s t".split(), "ic al ous en ish y".split()),
    "noun": (
        "ka ki ko la li lo ma mi mo na ni no pa pi po".split(),
        "b d g n r t".split(),
        "el in or us an et".split(),
    ),
    "verb": ("ra ri ro sa si so ta ti to va vi vo".split(), "m n l p k".split(), "ate ify ize en er".split()),
}
_PLACES = "Aldmoor Brexley Calverton Dunhollow Eskmere Farrowby Glenwick Harrowgate Inverleigh Jorvale".split()
_TRADES = "baker clockmaker miller sailor printer weaver potter surveyor gardener tailor mason cooper".split()
_ARTICLES_COUNT, _PARAGRAPHS_COUNT = 120, 8


class OwnMaterials(Materials):
    """Our own wording and synthetic data."""

    comparable: ClassVar[bool] = False

    def template(self, family: str) -> Template:
        return _TEMPLATES[family]

    def sentence(self, kind: str) -> str:
        return _SENTENCES[kind]

    def words(self, kind: str) -> list[str]:
        starts, middles, ends = _SYLLABLES[kind]
        longer = product(starts, middles, "aeiou", "lmnrst", ends)
        return sorted({"".join(parts) for parts in longer})

    def _own_corpus(self, dataset: str) -> Corpus:
        """Articles of a few paragraphs, each naming one tradesman; `hotpotqa` asks across two of ten documents."""
        rng = seeded("own corpus", dataset)
        filler = haystack("synthetic").text.split("\n\n")
        documents: list[str] = []
        questions: list[Question] = []
        for article in range(_ARTICLES_COUNT):
            place = f"{rng.choice(_PLACES)} {article}"
            here = range(len(documents), len(documents) + _PARAGRAPHS_COUNT)
            for number in here:
                trade, year = _TRADES[number % len(_TRADES)], str(rng.randint(1500, 1999))
                fact = f"The {trade} of {place} came to the town in {year}."
                documents.append(f"{place}\n{fact} {rng.choice(filler)}")
                own = tuple(here) if dataset == "hotpotqa" else (number,)
                related = () if dataset == "hotpotqa" else tuple(other for other in here if other != number)
                asked = f"In which year did the {trade} of {place} come to the town?"
                questions.append(Question(asked, (year,), own, related))
        return Corpus(documents, questions)

    def _own_essay(self) -> str:
        return haystack("synthetic").text

    def _own_description(self) -> dict[str, Any]:
        return {"name": "own wording and synthetic data", "version": "1"}
