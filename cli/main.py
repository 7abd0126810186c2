"""`skv`: the app and its commands."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from cli import paper, plan
from cli.bench import gpu_day as bench_gpu_day
from cli.bench import kernels as bench_kernels
from cli.bench import latency as bench_latency
from cli.bench import throughput as bench_throughput
from cli.eval import data_ruler
from cli.eval import fidelity as eval_fidelity
from cli.eval import longbench as eval_longbench
from cli.eval import niah as eval_niah
from cli.eval import ruler as eval_ruler
from cli.models import calibrate, doctor, info, pull
from cli.reports import baseline, compare, leaderboard, report
from cli.shared.exits import exit_code
from cli.shared.quiet import quieten

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
evaluate.command("fidelity", epilog=eval_fidelity.EPILOG)(eval_fidelity.fidelity)
app.add_typer(evaluate, name="eval")
bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory.")
bench.command("throughput", epilog=bench_throughput.EPILOG)(bench_throughput.throughput)
bench.command("latency", epilog=bench_latency.EPILOG)(bench_latency.latency)
bench.command("kernels", epilog=bench_kernels.EPILOG)(bench_kernels.kernels)
bench.command("gpu-day", epilog=bench_gpu_day.EPILOG)(bench_gpu_day.gpu_day)
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
    return exit_code(app, list(sys.argv[1:] if argv is None else argv))


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
