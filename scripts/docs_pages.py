"""What mkdocs must know of our pages: two of them lie outside docs/, and headings have GitHub's anchors."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {"README.md": "start.md", "CHANGELOG.md": "changes.md"}  # file of the repository: page of the site


def on_config(config: Any) -> Any:
    """Anchors as GitHub makes them, so that a link leads to the same place on both."""
    config.mdx_configs["toc"]["slugify"] = lambda text, _: re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    return config


def on_files(files: Files, config: Any) -> Files:
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for name, page in OUTSIDE.items():
        markdown = markdown.replace(f"](../{name})", f"]({page})")
    return markdown
