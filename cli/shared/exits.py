"""The one place where errors become lines and exit codes.

Exit codes: 0 all scored, 1 something unscored or worse, 2 a mistake the user can fix, 130 interrupted, 141 nobody
reads stdout.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.exceptions import TyperException

from shadowkv.common.errors import SkvError

_INTERRUPTED = "interrupted; run the same command to continue"
_DISK = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT}


def exit_code(app: Callable[..., Any], words: Sequence[str]) -> int:
    """Run one command of the app and return its exit code."""
    debug = "--debug" in words
    try:
        code = app([word for word in words if word != "--debug"], prog_name="skv", standalone_mode=False)
        sys.stdout.flush()
        # The library turns Ctrl-C into this code where it gets to see it.
        return _fail(_INTERRUPTED, 130) if code == 130 else int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _fail(_INTERRUPTED, 130)
    except BrokenPipeError:
        return _unread()
    except SystemExit as stop:
        # typer and rich turn a broken pipe into exit 1, which here would claim that something is unscored.
        if isinstance(stop.__context__, OSError) and stop.__context__.errno == errno.EPIPE:
            return _unread()
        raise
    except TyperException as error:
        shown = " ".join(error.format_message().split())
        return _fail(shown, 2) if shown else 0
    except SkvError as error:
        if debug:
            raise
        return _fail(str(error), 2)
    except OSError as error:
        if debug or error.errno not in _DISK:
            raise
        return _fail(f"{error.filename or 'writing'}: {error.strerror}", 2)


def _fail(message: str, code: int) -> int:
    from shadowkv.common.wording import plain_line

    print(f"skv: {plain_line(message)}", file=sys.stderr)
    return code


def _unread() -> int:
    """The reader of stdout has gone: what a shell reports for any tool that the pipe's end has stopped."""
    # Python would complain once more when it flushes stdout at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
