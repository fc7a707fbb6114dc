"""Configs of other programs as lora-scale answers them, and what to write instead: the page docs/coming-from.md.

python tests/coming_from.py > docs/coming-from.md
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

from lora_scale.spec import configfile, elsewhere  # noqa: E402
from lora_scale.spec.errors import ConfigError  # noqa: E402

SAMPLES = Path(__file__).parent / "data" / "coming-from"
TITLES = {
    "axolotl": "From axolotl",
    "llama-factory": "From LLaMA-Factory",
    "peft-accelerate": "From PEFT and accelerate",
}


def answer(name: str) -> list[str]:
    """The errors that a foreign config gets, a line each."""
    try:
        configfile.load(SAMPLES / f"{name}.yaml")
    except ConfigError as error:
        return str(error).splitlines()
    return []


def page() -> str:
    parts = [elsewhere.text()]
    for name, title in TITLES.items():
        told = "\n".join(f"lora-scale: error: {line}" for line in answer(name))
        theirs, ours = ((SAMPLES / f"{name}{end}.yaml").read_text() for end in ("", ".ours"))
        parts.append(f"\n## {title}\n\nGiven:\n\n```text\n{theirs}```\n\nSaid:\n\n```text\n{told}\n```\n")
        parts.append(f"\nWritten for it:\n\n```yaml\n{ours}```\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
