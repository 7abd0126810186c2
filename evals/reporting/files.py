"""Runs as files: summary.md, summary.csv, tasks.csv, summary.tex, plots/ and report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.reporting.folders import Found, find_runs, make_folder
from evals.reporting.page import render_report
from evals.reporting.samples import samples_of
from evals.reporting.sections import Section, environment, section_of
from evals.tables.table import latex


def write_report(found: Found, out: Path) -> list[Path]:
    """Write everything that can be said of some runs into a folder; return the files.

    With several runs, plots are in a folder for each, and a line of the CSV files says which run it is of.
    """
    make_folder(out)
    several = len(found.runs) > 1
    sections = [section_of(run, out / "plots" / (run.name if several else "")) for run in found.runs]
    title = f"{len(sections)} runs" if several else sections[0].title
    page = out / "report.html"
    page.write_text(render_report(title, sections, found.left_out, samples_of(found.runs)), encoding="utf-8")
    plots = [path for section in sections for png in section.plots for path in (png, png.with_suffix(".svg"))]
    return [page, *_write_tables(sections, found.left_out, out), *plots]


def write_run(folder: Path) -> tuple[Section, list[Path]]:
    """Write what a run ends with into its folder, as `write_report` would but for the page; return it and the files."""
    (run,) = find_runs([folder]).runs
    section = section_of(run, folder / "plots")
    return section, [*_write_tables([section], {}, folder), *section.plots]


def _write_tables(sections: Sequence[Section], left_out: Mapping[str, str], out: Path) -> list[Path]:
    several = len(sections) > 1
    texts = {
        "summary.md": "\n".join([*_left_out(left_out), *(_markdown(each, several=several) for each in sections)]),
        "summary.tex": "\n".join(_tex(section) for section in sections),
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / "summary.md", *_write_data(sections, out), out / "summary.tex"]


def _left_out(left_out: Mapping[str, str]) -> list[str]:
    return [f"**{name} is left out: {why}**\n" for name, why in left_out.items()]


def _markdown(section: Section, *, several: bool) -> str:
    run = section.run
    parts = [f"# {run.name}: {section.title}" if several else f"# {section.title}"]
    parts += [f"**{note}**" for note in (*section.notes, *run.problems)]
    parts += [*(table.markdown() for table in section.tables), _listed(section.remarks)]
    parts += [f"`{command}`" for command in run.manifest.commands]
    parts.append(_listed([f"{name}: {text}" for name, text in environment(run).items()]))
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def _listed(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _tex(section: Section) -> str:
    remarks = [f"{section.run.name}: {section.title}", *section.run.problems, *section.remarks]
    return "\n".join(latex(table, section.notes, remarks) for table in section.tables)


def _write_data(sections: Sequence[Section], out: Path) -> list[Path]:
    import pandas as pd

    made = []
    for name in dict.fromkeys(name for section in sections for name in section.data):
        frames = {section.run.name: section.data[name] for section in sections if name in section.data}
        for run, frame in frames.items():
            if len(sections) > 1:
                frame.insert(0, "run", run)
        pd.concat(frames.values(), ignore_index=True).to_csv(out / name, index=False)
        made.append(out / name)
    return made
