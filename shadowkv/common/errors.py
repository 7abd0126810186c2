"""The one exception type for mistakes a user can fix, numbers that overflow, and what a user should know."""

from __future__ import annotations


class SkvError(Exception):
    """A problem the user can fix; the command line prints it as one line and exits with code 2.

    Everything else that escapes is a bug in this project and keeps its traceback.
    """


class NotFiniteError(SkvError):
    """Logits that hold NaN or infinity after `answer`, the first tokens of one: no next one can be chosen from them."""

    def __init__(self, dtype: str, answer: list[int], where: str | None = None) -> None:
        self.dtype, self.answer = dtype, answer
        first = f", first in {where}" if where else ""
        wider = {"float16": "; try --dtype bfloat16 or float32", "bfloat16": "; try --dtype float32"}.get(dtype, "")
        super().__init__(f"logits are not finite in {dtype} at step {len(answer)} of the answer{first}{wider}")

    def first_in(self, where: str) -> NotFiniteError:
        """The same, saying where it begins."""
        return NotFiniteError(self.dtype, self.answer, where)


class SkvWarning(UserWarning):
    """Something that goes on otherwise than a user would expect; the command line prints it as one line."""
