"""`skv`: the app, and the one place where errors become lines and exit codes.

Exit codes: 0 all scored, 1 something unscored or worse, 2 a mistake the user can fix, 130 interrupted, 141 nobody
reads stdout.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from cli import paper, plan
from cli.bench import kernels as bench_kernels
from cli.bench import latency as bench_latency
from cli.bench import throughput as bench_throughput
from cli.eval import data_ruler
from cli.eval import longbench as eval_longbench
from cli.eval import niah as eval_niah
from cli.eval import ruler as eval_ruler
from cli.models import calibrate, doctor, info, pull
from cli.reports import baseline, compare, leaderboard, report
from cli.shared.quiet import quieten
from shadowkv.common.errors import SkvError

_INTERRUPTED = "interrupted; run the same command to continue"
_DISK = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT}

app = typer.Typer(
    name="skv",
    help="Judge long-context KV-cache methods: accuracy, memory and speed of ShadowKV, Quest and full attention.",
    epilog="Start with:  skv doctor  ·  skv eval niah  ·  skv bench throughput  ·  skv plan",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
evaluate = typer.Typer(no_args_is_help=True, help="Run an accuracy benchmark.")
evaluate.command("niah", epilog=eval_niah.EPILOG)(eval_niah.niah)
evaluate.command("ruler", epilog=eval_ruler.EPILOG)(eval_ruler.ruler)
evaluate.command("longbench", epilog=eval_longbench.EPILOG)(eval_longbench.longbench)
app.add_typer(evaluate, name="eval")
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
bench.command("throughput", epilog=bench_throughput.EPILOG)(bench_throughput.throughput)
bench.command("latency", epilog=bench_latency.EPILOG)(bench_latency.latency)
bench.command("kernels", epilog=bench_kernels.EPILOG)(bench_kernels.kernels)
app.add_typer(bench, name="bench")
data = typer.Typer(no_args_is_help=True, help="Write a benchmark's prompts to files.")
data.command("ruler", epilog=data_ruler.EPILOG)(data_ruler.ruler)
app.add_typer(data, name="data")
app.command("report", epilog=report.EPILOG)(report.report)
app.command("leaderboard", epilog=leaderboard.EPILOG)(leaderboard.leaderboard)
baselines = typer.Typer(no_args_is_help=True, help="Keep the runs that others are compared with.")
baselines.command("update", epilog=baseline.EPILOG)(baseline.update)
app.add_typer(baselines, name="baseline")
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("paper", epilog=paper.EPILOG)(paper.paper)
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)
app.command("models", epilog=info.MODELS_EPILOG)(info.models)
app.command("methods", epilog=info.METHODS_EPILOG)(info.methods)
app.command("pull", epilog=pull.EPILOG)(pull.pull)
app.command("calibrate", epilog=calibrate.EPILOG)(calibrate.calibrate)


def _version(wanted: bool) -> None:
    if not wanted:
        return
    import importlib.metadata
    import importlib.util

    print(f"skv {importlib.metadata.version('skv')}")
    for name in ("cli", "evals", "shadowkv"):
        spec = importlib.util.find_spec(name)
        print(f"{name}: {os.path.dirname(spec.origin) if spec and spec.origin else 'not found'}")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Version, and where it is loaded from.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works after any command too.")] = False,
) -> None:
    """Options of every command; `main` acts on them."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
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


def run() -> None:
    """The console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal or pipe that cannot show a character gets a substitute, not a traceback after hours of work.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if "--debug" not in sys.argv:
        quieten()
    sys.exit(main())


if __name__ == "__main__":
    run()
