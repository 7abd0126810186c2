"""A comparison as tables, Markdown, JSON and JUnit XML."""

from __future__ import annotations

import html
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from evals.compare.rows import Comparison, DivergenceRow, Judged, RatioRow, ScoreRow
from evals.compare.verdicts import Verdict
from evals.tables.table import Table, mib, number
from shadowkv.common.wording import plain_line

_SCORES = (
    "Over samples that both runs scored; baseline and current are means of those. 95 %: paired bootstrap. W/L: samples "
    "that got a higher / lower score. Changed: samples whose text differs. Lost: scored in the baseline, now failed or "
    "unanswered. p: exact McNemar where all changes weigh the same, else a permutation test; by Holm, over all rows."
)
_DIVERGENCES = (
    "KL: from full attention, nats per token, mean over prompts that both runs hold; its change as a share of what it "
    "was. 95 %: paired bootstrap over prompts. Top 1: share of tokens at which both find the same one most likely. "
    "Nll: change in nats per token. Moved: prompts in which anything differs. p: permutation test over prompts, by "
    "Holm, over all rows."
)
_RATIOS = (
    "Ratio: current over baseline; of speeds with a 95 % interval (Welch, over repeats), of sizes with the lowest and "
    "the highest. Speeds: geometric mean over repeats, and half of what lies between the slowest and the fastest."
)


def tables(comparison: Comparison) -> list[Table]:
    """Scores, then speeds and sizes, as far as there are any."""
    made = []
    if comparison.scores:
        columns = [
            "method",
            "cell",
            "n",
            "baseline",
            "current",
            "change",
            "95 %",
            "W/L",
            "changed",
            "lost",
            "p",
            "verdict",
        ]
        lines = [_score_line(row, comparison) for row in comparison.scores]
        made.append(_table(f"Scores · {comparison.title}", columns, lines, _SCORES, names=2))
    if comparison.divergences:
        columns = ["method", "cell", "prompts", "KL", "now", "change", "95 %", "top 1", "now", "nll", "moved", "lost"]
        lines = [_divergence_line(row, comparison) for row in comparison.divergences]
        title = f"Fidelity · {comparison.title}"
        made.append(_table(title, [*columns, "p", "verdict"], lines, _DIVERGENCES, names=2))
    if comparison.ratios:
        columns = ["method", "cell", "metric", "n", "baseline", "current", "ratio", "95 % / range", "p", "verdict"]
        lines = [_ratio_line(row, comparison) for row in comparison.ratios]
        made.append(_table(f"Speed and memory · {comparison.title}", columns, lines, _RATIOS, names=3))
    return made


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], caption: str, names: int) -> Table:
    """A table whose texts, which run folders may have made up, stay in their cells."""
    return Table(plain_line(title), columns, [list(map(plain_line, line)) for line in lines], caption, names)


def context(comparison: Comparison) -> list[str]:
    """What the two runs are, and what a reader must know of them: one plain line each."""
    return [plain_line(line) for line in (comparison.baseline, comparison.current, *comparison.notes)]


def said(row: Judged, comparison: Comparison) -> str:
    """The verdict in words: how many more samples are needed, why, and whether it fails the build."""
    more = f" (+{row.more_needed} needed)" if row.more_needed else ""
    why = f" ({row.why})" if row.why else ""
    return f"{row.verdict}{more}{why}{', FAILS' if row.fails(comparison.gate) else ''}"


def counted(comparison: Comparison) -> str:
    """How many rows have which verdict."""
    counts = Counter(row.verdict for row in comparison.rows)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts[verdict])


def headline(comparison: Comparison) -> str:
    """All verdicts, and what they mean for a build."""
    failing = len(comparison.failures)
    said = f"{'FAILED' if failing else 'passed'}: {counted(comparison)}"
    return said + (f"; {failing} of them fail" if failing else "")


def gate_line(comparison: Comparison) -> str:
    """What fails, and from which size on."""
    gate, measured = comparison.gate, {row.metric for row in comparison.rows}
    sizes = [f"{name} {gate.tolerances[name]:g}" for name in gate.tolerances if name in gate.failing & measured]
    unmeasured = ", ".join(name for name in gate.tolerances if name in gate.failing - measured)
    fails = f"Fails on what is worse by at least: {', '.join(sizes)}" if sizes else "Fails on nothing"
    return fails + (f". Not measured by these runs: {unmeasured}" if unmeasured else "")


def markdown(comparison: Comparison) -> str:
    """A page for the summary of a CI job."""
    lines = [f"# skv compare: {headline(comparison)}", "", f"{gate_line(comparison)}.", ""]
    lines += [f"- {line}" for line in context(comparison)]
    page = "\n".join([*lines, "", *(table.markdown() for table in tables(comparison))])
    return html.escape(page, quote=False)  # nothing in it is HTML


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything in it, ready for JSON; what is no finite number is null."""
    gate = comparison.gate
    return {
        "baseline": comparison.baseline,
        "current": comparison.current,
        "title": comparison.title,
        "tolerances": dict(gate.tolerances),
        "fail_on": sorted(gate.failing),
        "failed": bool(comparison.failures),
        "verdicts": dict(Counter(str(row.verdict) for row in comparison.rows)),
        "scores": [_plain(row, comparison) for row in comparison.scores],
        "divergences": [_plain(row, comparison) for row in comparison.divergences],
        "ratios": [_plain(row, comparison) for row in comparison.ratios],
        "notes": list(comparison.notes),
    }


def junit(comparison: Comparison) -> str:
    """One test case per row: what is worse and fails is a failure, what is undecided is skipped."""
    rows = comparison.rows
    skipped = sum(row.verdict is Verdict.UNDECIDED for row in rows)
    counts = {
        "tests": str(len(rows)),
        "failures": str(len(comparison.failures)),
        "errors": "0",
        "skipped": str(skipped),
    }
    suite = ET.Element("testsuite", {"name": f"skv compare {plain_line(comparison.title)}", **counts})
    ET.SubElement(suite, "system-out").text = "\n".join(context(comparison))
    for row in rows:
        named = {"classname": f"{row.metric}.{row.method}", "name": f"{row.place} {getattr(row, 'what', '')}".strip()}
        case = ET.SubElement(suite, "testcase")
        case.attrib.update({key: plain_line(value) for key, value in named.items()})
        if row.fails(comparison.gate):
            ET.SubElement(case, "failure", message=plain_line(said(row, comparison))).text = plain_line(_numbers(row))
        elif row.verdict is Verdict.UNDECIDED:
            ET.SubElement(case, "skipped", message=plain_line(said(row, comparison)))
    whole = ET.Element("testsuites", counts)
    whole.append(suite)
    ET.indent(whole)
    return ET.tostring(whole, encoding="unicode", xml_declaration=True) + "\n"


def _score_line(row: ScoreRow, comparison: Comparison) -> list[str]:
    return [
        row.method,
        row.place,
        str(row.samples),
        number(row.before, ".3f"),
        number(row.after, ".3f"),
        number(row.difference, "+.3f"),
        "–" if row.low is None or row.high is None else f"{row.low:+.3f} to {row.high:+.3f}",
        f"{row.wins}/{row.losses}",
        str(row.changed),
        str(row.lost),
        number(row.p_holm, ".3g"),
        said(row, comparison),
    ]


def _divergence_line(row: DivergenceRow, comparison: Comparison) -> list[str]:
    return [
        row.method,
        row.place,
        str(row.samples),
        number(row.before, ".4g"),
        number(row.after, ".4g"),
        number(row.change, "+.1%"),
        "–" if row.low is None or row.high is None else f"{row.low:+.1%} to {row.high:+.1%}",
        number(row.top1_before, ".3f"),
        number(row.top1_after, ".3f"),
        number(row.nll_change, "+.4f"),
        str(row.moved),
        str(row.lost),
        number(row.p_holm, ".3g"),
        said(row, comparison),
    ]


def _ratio_line(row: RatioRow, comparison: Comparison) -> list[str]:
    return [
        row.method,
        row.place,
        row.what,
        str(row.repeats),
        _amount(row, row.before, row.spread_before),
        _amount(row, row.after, row.spread_after),
        number(row.ratio, ".3f"),
        "–" if row.low is None or row.high is None else f"{row.low:.3f}–{row.high:.3f}",
        number(row.p_holm, ".3g"),
        said(row, comparison),
    ]


def _amount(row: RatioRow, value: float | None, spread: float | None) -> str:
    if row.metric == "memory":
        return f"{mib(value)} MiB"
    return number(value, ".2f") + ("" if spread is None else f" ±{100 * spread:.0f}%")


def _numbers(row: Judged) -> str:
    return ", ".join(f"{key}={value}" for key, value in asdict(row).items() if value not in (None, ""))


def _plain(row: Judged, comparison: Comparison) -> dict[str, Any]:
    values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(row).items()}
    return {**values, "fails": row.fails(comparison.gate)}
