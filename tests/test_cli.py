"""The command line: what it says to a mistake, with which exit code, and that its help imports nothing heavy."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from timing import children_seconds

from lora_scale import __version__
from lora_scale.cli import VERBS, main
from lora_scale.spec import errors

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "deepspeed", "transformers", "numpy", "pydantic", "datasets", "peft", "rich", "ruamel"}


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command in this process."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


@pytest.fixture
def verb_that_raises(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`plan` raises what is appended here."""
    raised: list[BaseException] = []

    @click.command()
    def command() -> None:
        raise raised[0]

    stand_in = ModuleType("lora_scale.commands.plan")
    stand_in.__dict__["command"] = command
    monkeypatch.setitem(sys.modules, "lora_scale.commands.plan", stand_in)
    return raised


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """0.4 processor seconds, the best of five: other work on the machine must not decide."""
    code = (
        "import sys; from lora_scale.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit(f'imported: {sorted({name.split(\".\")[0] for name in sys.modules})}')"
    )
    seconds = []
    for _ in range(5):
        started = children_seconds()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        seconds.append(children_seconds() - started)
        assert "imported: [" in done.stderr and not [name for name in HEAVY if f"'{name}'" in done.stderr], done.stderr
        assert all(f"  {verb} " in done.stdout for verb in VERBS) and "Exit codes:" in done.stdout
    assert min(seconds) < 0.4, seconds


def test_verbs_are_the_modules_of_commands() -> None:
    modules = {path.stem for path in (ROOT / "lora_scale" / "commands").glob("*.py")}
    assert modules - {"__init__", "options", "crosscheck", "everyhost", "searching"} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_help_suffices(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What it does, an example of how it is called, and what its exit code will mean."""
    code, out, err = answer(capsys, verb, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: lora-scale {verb} " in out and f"\n  lora-scale {verb} " in out and "Exit codes:" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lora-scale tr", ["plain,train"]),
        ("lora-scale ", [f"plain,{verb}" for verb in VERBS]),
        ("lora-scale plan --gpu", ["plain,--gpus-per-node", "plain,--gpu"]),
        ("lora-scale --vers", ["plain,--version"]),
    ],
)
def test_the_shell_completes_verbs_and_options(words: str, expected: list[str]) -> None:
    """As bash asks; a verb's name costs no import of what the verb needs."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_LORA_SCALE_COMPLETE": "bash_complete"}
    program = "import sys; from lora_scale.cli import main; sys.argv[:] = ['lora-scale']; main()"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program],
        env=os.environ | asked | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]
    assert not re.search(r"\|\s+torch$", done.stderr, re.MULTILINE)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--version") == (0, f"lora-scale, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "run.yaml"], "Error: unknown verb trian; did you mean train?"),
        (
            ["banana"],
            "Error: unknown verb banana; choose plan, prepare, train, launch, export, merge, extract, convert, analyze",
        ),
        (["--lr=3"], "Error: No such option '--lr'"),
        (["doctor", "--lora.r=16"], "A key of the config is written without dashes: lora.r=16"),
        (["doctor", "extra"], "Error: Got unexpected extra argument"),
        (["--local_rank=x", "doctor"], "Error: Invalid value for '--local_rank'"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = answer(capsys, *arguments)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError, 2),
        (errors.ConfigError, 2),
        (errors.ModelError, 2),
        (errors.DataError, 2),
        (errors.CheckpointError, 2),
        (errors.DoesNotFitError, 3),
        (errors.FindingError, 4),
        (errors.TrainingError, 1),
        (errors.InterruptedRunError, 75),
    ],
)
def test_a_known_error_is_a_line_and_a_code(
    error: type[errors.LoraScaleError],
    code: int,
    verb_that_raises: list[BaseException],
    capsys: pytest.CaptureFixture[str],
) -> None:
    verb_that_raises.append(error("lora.r is 0\nseed is -1"))
    assert answer(capsys, "plan") == (code, "", "lora-scale: error: lora.r is 0\nlora-scale: error: seed is -1\n")


def test_ctrl_c_exits_130_with_one_line(
    verb_that_raises: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    verb_that_raises.append(KeyboardInterrupt())
    code, out, err = answer(capsys, "plan")
    assert (code, out, err.strip()) == (130, "", "lora-scale: stopped with Ctrl-C")


@pytest.mark.parametrize("error", [RuntimeError("ours"), EOFError("ours"), AssertionError("ours")])
def test_an_unexpected_error_keeps_its_traceback(error: Exception, verb_that_raises: list[BaseException]) -> None:
    verb_that_raises.append(error)
    with pytest.raises(BaseException) as caught:
        main(["plan"])
    assert error in (caught.value, caught.value.__cause__)


@pytest.mark.parametrize("before", [[], ["--local_rank=3"], ["--local-rank=3"], ["--local_rank", "3"]])
def test_local_rank_before_the_verb_is_ignored(
    before: list[str],
    verb_that_raises: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    verb_that_raises.append(errors.TrainingError("reached"))
    assert answer(capsys, *before, "plan")[2] == "lora-scale: error: reached\n"
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("options", [[], ["--no_local_rank"]], ids=["local_rank", "no_local_rank"])
def test_deepspeeds_own_launcher_reaches_the_verb(options: list[str]) -> None:
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": [0]}).encode()).decode()
    launch = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={hosts}",
        "--master_port=29999",
        *options,
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [*launch, "--module", "lora_scale", "trian", "run.yaml", "lora.r=16"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "Error: unknown verb trian; did you mean train?" in done.stderr, done.stderr
    assert done.returncode == 2
    assert ("--local_rank=0" in done.stdout + done.stderr) is not bool(options), (
        "the launcher no longer does what this tests"
    )


WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "deepspeed", "huggingface_hub", "datasets"):
    sys.modules[name] = None  # as if it were not installed
from lora_scale.cli import main
main(sys.argv[1:])
"""


def test_without_the_extras_a_verb_says_which_one_it_needs(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    config = tmp_path / "run.yaml"
    config.write_text("{model: org/m, data: {train: ./t}, run_dir: ./r, train: {epochs: 1}}")
    assert run("train", str(config)) == (
        2,
        "",
        "lora-scale: error: this needs torch; pip install 'lora-scale[train]'\n",
    )
    code, out, err = run("prepare", str(config))
    assert (code, err) == (2, "lora-scale: error: this needs huggingface_hub; pip install 'lora-scale[train]'\n"), out
    for arguments in (("prepare", "--help"), ("config", "--show", str(config)), ("config", "--schema"), ("--help",)):
        assert run(*arguments)[0] == 0
