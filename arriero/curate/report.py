"""report.html of a curation: counts in and out, what each step dropped and why, and examples to judge the rules by.

Also the summary table printed at the end. Both are made from manifest.json and the examples alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from arriero.curate.stats import BINS_PER_DECADE, Json
from arriero.io.files import write_text
from arriero.show.page import Theme, both_themes, dress, png, template

TITLES = {"kept": "Kept", "dropped": "Dropped", "changed": "Changed"}


def write_report(out: Path, manifest: Json, examples: Json, config: str) -> None:
    """Write report.html into `out`."""
    read, kept = totals(manifest["read"]), totals(manifest["kept"])
    unreadable = manifest["unreadable"]
    page = template("arriero.curate", "report.html").render(
        title=", ".join(Path(source).name or source for source in manifest["plan"]["config"]["sources"]),
        summary=f"{kept['documents']:,} of {read['documents']:,} documents kept, "
        f"{_share(kept, read, 'characters')} of the text.",
        tiles=_tiles(manifest, read, kept),
        funnel=list(_funnel(manifest)),
        lengths=both_themes(lambda theme: lengths_png(manifest, theme)) if read["documents"] else None,
        sources=list(_sources(manifest)),
        unreadable=_unreadable(unreadable) if unreadable.get("count") else [],
        passed_over=_passed_over(manifest),
        steps=[_step(entry, examples.get(entry["step"], {})) for entry in manifest["steps"]],
        config=config,
    )
    write_text(out / "report.html", page)


def totals(counts: Json) -> dict[str, int]:
    """Documents and characters of all sources."""
    return {key: sum(source[key] for source in counts.values()) for key in ("documents", "characters")}


def funnel_table(manifest: Json) -> Table:
    """The steps as a table for the terminal."""
    read, kept = totals(manifest["read"]), totals(manifest["kept"])
    unreadable = manifest["unreadable"].get("count", 0)
    table = Table(title=f"{kept['documents']:,} of {read['documents']:,} documents kept")
    for column in ("step", "dropped", "changed", "left", "most frequent reason"):
        table.add_column(column, justify="left" if column in ("step", "most frequent reason") else "right")
    table.add_row("read", "", "", f"{read['documents']:,}", "")
    for entry, row in zip(manifest["steps"], list(_funnel(manifest))[1:], strict=True):
        reasons = _reasons(entry)
        first = f"{reasons[0][0]} ({reasons[0][1]})" if reasons else ""
        table.add_row(row["step"], row["dropped"], row["changed"], row["left"], first)
    table.caption = (
        f"{kept['characters']:,} of {read['characters']:,} characters ({_share(kept, read, 'characters')}) in "
        f"{_counted(len(manifest['shards']), 'shard')}"
        + (f"; {_counted(unreadable, 'row')} could not be read" if unreadable else "")
        + (f"; passed over: {', '.join(_passed_over(manifest)[:8])}" if manifest["passed_over"] else "")
    )
    return table


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _share(part: dict[str, int], whole: dict[str, int], key: str) -> str:
    return f"{part[key] / max(1, whole[key]):.1%}"


def _tiles(manifest: Json, read: dict[str, int], kept: dict[str, int]) -> list[tuple[str, str]]:
    size = sum(shard["bytes"] for shard in manifest["shards"])
    return [
        ("documents kept", f"{kept['documents']:,}"),
        ("of documents read", _share(kept, read, "documents")),
        ("characters kept", f"{kept['characters']:,}"),
        ("shards", f"{len(manifest['shards']):,}"),
        ("size of the shards", f"{size / 1e6:,.1f} MB"),
    ]


def _funnel(manifest: Json) -> Iterator[dict[str, Any]]:
    left = whole = totals(manifest["read"])["documents"]
    yield {"step": "read", "seen": "", "dropped": "", "changed": "", "left": f"{left:,}", "share": 100}
    for entry in manifest["steps"]:
        dropped = sum(entry.get("dropped", {}).values())
        left -= dropped
        yield {
            "step": entry["step"],
            "seen": f"{entry.get('seen', 0):,}",
            "dropped": f"{dropped:,}",
            "changed": f"{entry.get('changed', 0):,}",
            "left": f"{left:,}",
            "share": round(100 * left / max(1, whole), 2),
        }


def _sources(manifest: Json) -> Iterator[dict[str, str]]:
    nothing = {"documents": 0, "characters": 0}
    for name, read in sorted(manifest["read"].items(), key=lambda item: -item[1]["characters"])[:30]:
        kept = manifest["kept"].get(name, nothing)
        yield {
            "source": name or "(none)",
            "read": f"{read['documents']:,}",
            "kept": f"{kept['documents']:,}",
            "characters": f"{read['characters']:,}",
            "characters_kept": f"{kept['characters']:,}",
        }


def _unreadable(errors: Json) -> list[str]:
    more = errors["count"] - len(errors["first"])
    return [*errors["first"], *([f"and {more:,} more"] if more else [])]


def _passed_over(manifest: Json) -> list[str]:
    """What is no document in web archives, the most frequent first."""
    return [f"{count:,} {reason}" for reason, count in manifest["passed_over"].items()]


def _reasons(entry: Json) -> list[tuple[str, str]]:
    reasons = sorted(entry.get("dropped", {}).items(), key=lambda item: (-item[1], item[0]))
    return [(reason, f"{count:,}") for reason, count in reasons]


def _step(entry: Json, examples: Json) -> dict[str, Any]:
    seen, dropped = entry.get("seen", 0), sum(entry.get("dropped", {}).values())
    summary = f"{seen:,} documents seen, {dropped:,} dropped ({dropped / max(1, seen):.1%})"
    if entry.get("changed"):
        summary += f", {entry['changed']:,} changed"
    if entry.get("characters_removed"):
        summary += f"; {entry['characters_removed']:,} characters fewer"
    return {
        "name": entry["step"],
        "summary": summary + ".",
        "reasons": _reasons(entry),
        "examples": [(TITLES[fate], examples[fate]) for fate in ("dropped", "changed", "kept") if examples.get(fate)],
    }


def lengths_png(manifest: Json, theme: Theme) -> bytes:
    """Histogram of the lengths of documents, before and after, on a logarithmic axis."""
    figure = Figure(figsize=(9, 3.2), dpi=160, facecolor=theme.background, layout="constrained")
    axes = figure.subplots()
    width = 10 ** (1 / BINS_PER_DECADE)
    for name, color, alpha in (("read", theme.second, 0.45), ("kept", theme.first, 0.9)):
        bins: dict[int, int] = {}
        for source in manifest[name].values():
            for number, count in source["lengths"].items():
                bins[int(number)] = bins.get(int(number), 0) + count
        left = [10 ** (number / BINS_PER_DECADE) for number in sorted(bins)]
        heights = [bins[number] for number in sorted(bins)]
        axes.bar(left, heights, [x * (width - 1) for x in left], align="edge", color=color, alpha=alpha, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("characters in a document", color=theme.text)
    axes.set_ylabel("documents", color=theme.text)
    dress([axes], theme)
    axes.legend(frameon=False, labelcolor=theme.text)
    return png(figure)
