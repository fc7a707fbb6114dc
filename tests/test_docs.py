"""What the documents say is so: links lead somewhere, configs load, commands parse, printed answers are those of today.

Console blocks: a line that begins with `$` is a command, the lines after it its output, `...` some lines left out.
"""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
from click.testing import CliRunner

from lora_scale.cli import VERBS
from lora_scale.spec import configfile

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
LAUNCH = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix != ".yaml")
HOSTS = {"arxiv.org", "github.com", "thinkingmachines.ai"}  # a page may send its reader there, and nowhere unnoticed
FOLDERS = {"dev", "etc", "proc", "usr"}  # absolute paths mean the same on every Linux only below these
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(path: Path, kind: str) -> list[str]:
    """The fenced blocks of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def console() -> Iterator[tuple[str, str, list[str]]]:
    """(page, command, lines of output) of every console block, and of the comments that open a config."""
    for page in PAGES:
        for block in blocks(page, "console"):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *output = part.rstrip("\n").split("\n")
                yield page.name, command, output
    for path in CONFIGS:
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        for line, after in pairwise([*comments, ""]):
            if line.startswith(("lora-scale ", "deepspeed ", "scripts/", "launch/", "HOSTFILE=")):
                yield path.name, line, [after[1:].strip(), "..."] if after.startswith("# ") else []


COMMANDS = [case for case in console() if "lora" in case[1] or "/" in case[1] or case[1].startswith("make")]
IDS = [f"{page}: {command[:60]}" for page, command, _ in COMMANDS]


def words(command: str) -> list[str]:
    """The words of a command line, without its comment and the variables set before it."""
    found = shlex.split(command, comments=True)
    return found[next(i for i, word in enumerate(found) if not re.fullmatch(r"[A-Z_]+=.*", word)) :]


def of_lora_scale(line: list[str]) -> list[str] | None:
    """What lora-scale gets to see of a command line."""
    if line[0] == "lora-scale":
        return line[1:]
    return line[line.index("lora_scale") + 1 :] if "lora_scale" in line else None


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            assert urlsplit(target).hostname in HOSTS, target
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.is_file() and file.is_relative_to(ROOT), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def anchors(path: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_container_gets_what_it_copies() -> None:
    """Docker is not had here: at least every file that is copied is there, and .dockerignore lets it through."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"pyproject.toml", "requirements", "lora_scale"} <= set(copied)
    assert "*" in ignored and {f"!{name}" for name in copied} == {line for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_a_lost_link_stops_the_site(tmp_path: Path) -> None:
    """scripts/check builds it; here a page is added to a copy."""
    for name in ("docs", "mkdocs.yml", "scripts/docs_pages.py", "README.md", "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "more.md").write_text("See [one](nowhere.md), [two](install.md#nothing), [three](index.md).\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert done.returncode != 0 and len(warnings) == 2, done.stderr
    assert "'nowhere.md'" in warnings[0] and "'#nothing'" in warnings[1]


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_yaml_blocks_are_whole_configs(path: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(path, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        configfile.load(file)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_configs_load_and_open_with_their_command(path: Path) -> None:
    configfile.load(path)
    head = [line for line in path.read_text(encoding="utf-8").splitlines()[:8] if line.startswith("#")]
    assert any(f"configs/{path.name}" in line for line in head)


@pytest.mark.parametrize(("page", "line", "output"), COMMANDS, ids=IDS)
def test_commands_can_be_typed(page: str, line: str, output: list[str], tmp_path: Path) -> None:
    """The verb and its options exist, KEY=VALUE is accepted, and a script or make target that is named is there."""
    first = words(line)[0]
    if first == "make":
        assert words(line)[1] in targets()
    if "/" in first:
        assert (ROOT / first).is_file(), first
    for script in [word for word in words(line) if re.fullmatch(r"(launch|scripts|configs)/\S+", word)]:
        assert (ROOT / script).is_file() or script == "configs/run.yaml", script
    arguments = of_lora_scale(words(line))
    if arguments is None:
        return
    verb, *rest = arguments
    if verb.startswith("-") or verb == "VERB":
        return
    assert verb in VERBS, line
    command = import_module(f"lora_scale.commands.{verb}").command
    assert isinstance(command, click.Command)
    context = command.make_context(verb, list(rest))  # raises click.UsageError
    given = [str(value) for name in ("arguments", "overrides") for value in context.params.get(name) or ()]
    check_overrides([value for value in given if "=" in value], rest, tmp_path)


def check_overrides(overrides: list[str], rest: list[str], tmp_path: Path) -> None:
    """Every KEY=VALUE is one that a config takes: the one that the line names, or a small one."""
    named = [ROOT / word for word in rest if word.startswith("configs/") and (ROOT / word).is_file()]
    small = tmp_path / "small.yaml"
    small.write_text("{model: m, data: {train: ./t}, run_dir: ./r, train: {epochs: 1, global_batch_size: 64}}")
    configfile.load(named[0] if named else small, overrides)


@cache
def targets() -> set[str]:
    """Of the Makefile."""
    rules = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return set(" ".join(rules).split())


ANSWERS = [(page, line, output) for page, line, output in COMMANDS if output and "lora-scale plan" in line]


@pytest.mark.parametrize(("page", "line", "output"), ANSWERS, ids=[f"{page}: {line[:60]}" for page, line, _ in ANSWERS])
def test_answers_of_plan_are_todays(page: str, line: str, output: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verb, *arguments = words(line)[1:]
    result = CliRunner().invoke(import_module(f"lora_scale.commands.{verb}").command, arguments)
    assert result.exit_code in (0, 3), result.output
    pattern = "".join(r"(?:.*\n)*?" if part == "..." else re.escape(part) + r"[ ]*\n" for part in output)
    assert re.fullmatch(pattern, result.output), f"{page} shows another answer than\n{result.output}"


def test_there_are_answers_to_check() -> None:
    assert {"README.md", "parallelism.md"} <= {page for page, _, _ in ANSWERS}


def test_the_snippet_of_the_journey_prints_what_stands_below_it() -> None:
    if not (ROOT / "models" / "smollm2-135m-instruct" / "config.json").is_file():
        pytest.skip("needs the model: python scripts/get_model.py")
    page = ROOT / "docs" / "journey.md"
    (code,) = blocks(page, "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout in blocks(page, "text")


def test_functions_that_the_journey_names_are_there() -> None:
    """`parallel/load.py: fill` is a function, class or method of that module."""
    named = re.findall(r"`((?:\w+/)+\w+\.py): ([\w.]+)`", "".join(page.read_text() for page in PAGES))
    assert len(named) > 20
    for file, name in named:
        if file.startswith("deepspeed/"):
            continue
        place: ast.AST = ast.parse((ROOT / "lora_scale" / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            place = next((node for node in ast.iter_child_nodes(place) if part == name_of(node)), ast.Pass())
            assert not isinstance(place, ast.Pass), f"{file} has no {name}"


def name_of(node: ast.AST) -> str | None:
    """Of a function, a class or an annotated field."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None


def messages() -> list[list[str]]:
    """The plain parts of every text in the package: an f-string without its values."""
    texts = []
    for path in (ROOT / "lora_scale").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append([str(v.value) for v in node.values if isinstance(v, ast.Constant)])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append([node.value])
    return texts


def test_our_messages_in_troubleshooting_exist() -> None:
    """Each heading, `...` standing for values, is part of one text in the code; other programs' stand elsewhere."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    ours = page.partition("## Messages of lora-scale")[2].partition("## Messages of launchers")[0]
    headings = re.findall(r"^### `(.+)`$", ours, re.MULTILINE)
    assert len(headings) >= 15
    texts = messages()
    for heading in headings:
        if heading == "CUDA out of memory":  # torch's words, by way of ours
            continue
        pieces = [piece for piece in heading.split("...") if piece.strip(" ():;,?")]
        assert any(in_order(pieces, text) for text in texts), heading


def in_order(pieces: list[str], text: list[str]) -> bool:
    """Each piece lies within one plain part of the text, and they follow each other."""
    at = 0
    for piece in pieces:
        at = next((i for i in range(at, len(text)) if piece.strip() in text[i]), len(text))
        if at == len(text):
            return False
    return True


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 95, f"README.md has {len(lines)} lines; one and a half screens are meant"


@pytest.mark.parametrize("path", LAUNCH, ids=[path.name for path in LAUNCH])
def test_launch_scripts(path: Path) -> None:
    """Short, valid for bash, with their usage on top and our command at the end."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 30
    assert "configs/run.yaml" in "".join(lines[1:6]) and any("un yet" in line or "Run:" in line for line in lines)
    assert lines[-1].strip().endswith('train "$@"')
    assert path.stat().st_mode & 0o100 or path.suffix == ".sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS, *LAUNCH], ids=lambda path: path.name)
def test_no_path_or_address_of_one_machine(path: Path) -> None:
    text = re.sub(r"https?://\S+", "", path.read_text(encoding="utf-8"))
    outside = {name for name in re.findall(r"(?<![\w.~$*})>-])/([a-z]\w*)/", text)} - FOLDERS
    outside -= {"tmp"} if path in CONFIGS else set()
    assert not outside, f"{path.name} names absolute paths: {outside}"
    assert set(re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)) <= {"127.0.0.1", "127.0.1.1"}
