"""Question answering over many documents, of which those that came with the question matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from evals.common.asking.question import what_follows
from evals.ruler.families.family import Family, Workshop, replayed
from evals.ruler.families.fitting import Draft

_PASSED_OVER = 50  # documents too long for the room left, before a prompt counts as full


@dataclass(frozen=True)
class QuestionAnswering(Family):
    """dataset: squad or hotpotqa."""

    template_name: ClassVar[str] = "qa"
    max_new_tokens: ClassVar[int] = 32

    dataset: str

    def count(self, shop: Workshop) -> int:
        return len(shop.materials.corpus(self.dataset).questions)

    def draft(self, shop: Workshop, rng: Random, length_tokens: int, number: int) -> Draft:
        prompt, prefix = shop.materials.template(self.template_name)
        form = shop.materials.sentence("document")
        documents, questions = shop.materials.corpus(self.dataset)
        question = questions[number]
        own = [documents[i] for i in question.documents]
        order, places = replayed(rng), replayed(rng)

        def others() -> Iterator[int]:
            """Documents to fill up with: those of the same article first, then any; all again if they run out."""
            taken = {*question.documents, *question.related}
            mixer = order()
            yield from mixer.sample(question.related, len(question.related))
            while True:
                yielded = set(taken)
                while len(yielded) < len(documents):
                    other = mixer.randrange(len(documents))
                    if other not in yielded:
                        yielded.add(other)
                        yield other
                taken = set()

        def context(characters: int) -> str:
            chosen, room, passed = list(own), characters - sum(map(len, own)), 0
            for other in others():
                if len(documents[other]) > room:
                    passed += 1
                else:
                    chosen.append(documents[other])
                    room -= len(documents[other])
                if passed > _PASSED_OVER:
                    break
            places().shuffle(chosen)
            return "\n\n".join(form.format(i=i, document=document) for i, document in enumerate(chosen, 1))

        return Draft(
            message=lambda size: prompt.format(context=context(size), query=question.query),
            question=what_follows(prompt, "context", query=question.query),
            answer_prefix=prefix,
            references=question.answers,
            smallest=sum(map(len, own)),
            unit_tokens=0.25,
            meta={"question": number},
        )
