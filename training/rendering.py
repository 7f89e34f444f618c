"""Sections of tables and plots as Markdown and as one self-contained HTML page. Knows nothing about their content."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    "th,td{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:left;white-space:nowrap}"
    "img{max-width:100%}section{overflow-x:auto}p{max-width:45rem}"
)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are plain text."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a note, a table and a plot, each of which may be absent."""

    title: str
    table: Table | None = None
    note: str = ""
    svg: str = ""

    @property
    def slug(self) -> str:
        """The title as a file name and an anchor."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def render_table(table: Table) -> str:
    """A Markdown table, padded so that it reads well as plain text."""
    cells = [[_markdown_cell(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(table.header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def render_markdown(sections: Sequence[Section]) -> str:
    """One document; plots are linked as plots/<slug>.svg."""
    parts = ["# Evaluation"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += [section.note] if section.note else []
        parts += [render_table(section.table)] if section.table else []
        parts += [f"![{section.title}](plots/{section.slug}.svg)"] if section.svg else []
    return "\n\n".join(parts) + "\n"


def render_html(sections: Sequence[Section]) -> str:
    """One page that loads nothing: plots are inside it as data, in `img` so that their ids cannot clash."""
    body = "\n".join(_html_section(section) for section in sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>\n'
        f"<style>{STYLE}</style></head><body>\n<h1>Evaluation</h1>\n{body}\n</body></html>\n"
    )


def _html_section(section: Section) -> str:
    parts = [f'<section id="{section.slug}"><h2>{html.escape(section.title)}</h2>']
    if section.note:
        parts.append(f"<p>{html.escape(section.note)}</p>")
    if section.table:
        parts.append(_html_table(section.table))
    if section.svg:
        data = base64.b64encode(section.svg.encode()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/svg+xml;base64,{data}">')
    return "\n".join([*parts, "</section>"])


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
