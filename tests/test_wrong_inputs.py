"""The page of wrong inputs is what the command line answers today."""

import re
from pathlib import Path

from ranks import run_script

ROOT = Path(__file__).parent.parent
LIBRARY = re.compile(r"(\w+Error|\(MASTER_ADDR, MASTER_PORT\)): .*")  # torch's and transformers' words, which change


RANK = re.compile(r"rank-\d{3}\.txt")  # where all ranks fail alike, the first to say so is chance


def fixed(page: str) -> str:
    """What of the page must not change by itself."""
    return RANK.sub("rank-NNN.txt", LIBRARY.sub(r"\1", page))


def test_the_page_is_what_is_said(tmp_path: Path) -> None:
    done = run_script("wrong_inputs", folder=tmp_path)
    assert done.returncode == 0, f"an answer is not fit for people:\n{done.stderr}"
    page = (ROOT / "docs" / "wrong-inputs.md").read_text()
    assert fixed(done.stdout) == fixed(page), "run: python tests/wrong_inputs.py > docs/wrong-inputs.md"
    assert page.count("exit code 2\n") >= 100 and "Traceback" not in page
