"""A page of text, lists, tables and pictures, written twice: Markdown with SVG files beside it, and one HTML file that
holds everything and opens offline. Knows no run."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """The first column to the left; the others to the right where there are more than two."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_numeric(self) -> bool:
        return len(self.headers) > 2


@dataclass(frozen=True, slots=True)
class Picture:
    """`name` becomes part of the file's name; `caption` is its text where it cannot be seen."""

    name: str
    caption: str
    svg: str


Block = Text | Bullets | Table | Picture
Sections = Mapping[str, Sequence[Block]]


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    return Table(tuple(headers), tuple(tuple(str(cell) for cell in row) for row in rows))


def markdown(title: str, summary: str, sections: Sections, pictures: str) -> str:
    """`pictures`: what the names of SVG files begin with."""
    lines = [f"# {title}", "", summary]
    for heading, blocks in sections.items():
        lines += ["", f"## {heading}"]
        for block in blocks:
            lines += ["", *_lines(block, pictures)]
    return "\n".join(lines) + "\n"


def _lines(block: Block, pictures: str) -> list[str]:
    match block:
        case Text(text):
            return [text]
        case Bullets(items):
            return [f"- {item}" for item in items]
        case Picture(name, caption, _):
            return [f"![{caption}]({pictures}-{name}.svg)"]
        case Table(headers, rows):
            rule = ["---", *("--:" if block.is_numeric else "---" for _ in headers[1:])]
            return [_row(cells) for cells in (headers, rule, *rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def as_html(title: str, summary: str, sections: Sections) -> str:
    """One file; nothing in it is fetched from anywhere."""
    jinja2 = import_module("jinja2")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda text: jinja2.filters.Markup(_inline(text))
    template = resources.files("lora_scale.storage").joinpath("page.html").read_text(encoding="utf-8")
    kinds = {Text: "text", Bullets: "bullets", Table: "table", Picture: "picture"}
    parts = {heading: [(kinds[type(block)], block) for block in blocks] for heading, blocks in sections.items()}
    return environment.from_string(template).render(title=title, summary=summary, sections=parts)


def _inline(text: str) -> str:
    """Escaped, with Markdown's bold and code."""
    text = html.escape(text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
