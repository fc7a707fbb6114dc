"""Imports go down the floors only, each heavy package enters by one door, and modules and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_scale.cli import VERBS

ROOT = Path(__file__).parent.parent / "lora_scale"
FLOORS = ["spec", "storage", "adapters", "parallel", "commands", ""]  # bottom to top; "": cli.py and __main__.py
DOORS = {
    "deepspeed": {"parallel"},
    "mpi4py": {"parallel"},
    "torch.distributed": {"parallel"},
    "torch": {"adapters", "parallel", "commands"},
    "numpy": {"storage", "adapters", "parallel", "commands"},
    "datasets": {"storage"},
    "pyarrow": {"storage"},
    "tensorboard": {"storage"},
    "wandb": {"storage"},
    "huggingface_hub": {"storage"},
    "matplotlib": {"storage", "commands"},
    "transformers": {"storage", "parallel"},
    "ruamel": {"spec"},
    "pydantic": {"spec"},
    "click": {"commands", ""},
    "jinja2": {"storage"},
    "pynvml": {"parallel"},
}
SLOW = {
    "datasets",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "pyarrow",
    "transformers",
}  # in storage only inside functions: `plan` answers within 1 s
TRAINING_LOOP = "commands/train.py"  # read top to bottom: one function of it, and the file, may be longer
MAX_LINES, MAX_FUNCTION = 300, 59


def imports(tree: ast.Module, package: str) -> Iterator[tuple[str, bool]]:
    """Dotted name of everything a module of `package` imports, at any depth, and whether that happens on import.

    Also `torch.distributed` used as an attribute of an imported torch, and import_module("...") of a constant.
    """
    aliases: dict[str, str] = {}
    inside = {id(node) for function in ast.walk(tree) if _is_function(function) for node in ast.walk(function)}
    for node in ast.walk(tree):
        at_once = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                aliases[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield alias.name, at_once
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{module}.{alias.name}"
                yield f"{module}.{alias.name}", at_once
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            for name in node.args[:1]:
                if isinstance(name, ast.Constant):
                    yield str(name.value), at_once
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}.{node.attr}", False


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def findings(path: str, source: str) -> list[str]:
    """What is wrong with the module at `path`, which is relative to lora_scale/."""
    tree = ast.parse(source)
    floor = path.split("/")[0] if "/" in path else ""
    found = []
    for name, at_once in imports(tree, ".".join(["lora_scale", *path.split("/")[:-1]])):
        first, *rest = name.split(".")
        if first == "lora_scale" and rest and rest[0] in [*FLOORS, "cli", "__main__"]:
            target = rest[0] if rest[0] in FLOORS else ""
            if FLOORS.index(target) > FLOORS.index(floor):
                found.append(f"imports {name}, from a floor above")
            if floor == target == "commands" and rest[1:] and rest[1] in VERBS:
                found.append(f"imports {name}: a command does not import a command")
        for package, floors in DOORS.items():
            if _is_in(name, package) and floor not in floors:
                found.append(f"imports {name}; {package} enters in {', '.join(sorted(floors)) or 'cli.py'}")
        if floor == "storage" and at_once and first in SLOW:
            found.append(f"imports {name} at once; import it inside the function that needs it")
    lines, sizes = len(source.splitlines()), _sizes(tree)
    long = {name: size for name, size in sizes.items() if size > MAX_FUNCTION}
    if lines > (1.5 if path == TRAINING_LOOP else 1) * MAX_LINES:
        found.append(f"has {lines} lines")
    if len(long) > (1 if path == TRAINING_LOOP else 0):
        found.append(f"has long functions: {long}")
    return found


def _sizes(tree: ast.Module) -> dict[str, int]:
    """Lines of every function, its docstring and what is defined inside it included."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {f"{node.name} at {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}


@pytest.mark.parametrize("path", sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")))
def test_module_keeps_to_its_floor(path: str) -> None:
    assert findings(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source", "finding"),
    [
        ("storage/a.py", "import lora_scale.parallel.world", "imports lora_scale.parallel.world, from a floor above"),
        ("spec/a.py", "from lora_scale import storage", "imports lora_scale.storage, from a floor above"),
        ("spec/a.py", "from ..storage import weights", "imports lora_scale.storage.weights, from a floor above"),
        ("storage/a.py", "from .. import adapters", "imports lora_scale.adapters, from a floor above"),
        (
            "storage/a.py",
            "import lora_scale\nlora_scale.parallel.load",
            "imports lora_scale.parallel, from a floor above",
        ),
        ("commands/a.py", "from lora_scale import cli", "imports lora_scale.cli, from a floor above"),
        (
            "commands/a.py",
            "def f():\n    from lora_scale.commands import train",
            "imports lora_scale.commands.train: a command does not import a command",
        ),
        (
            "commands/a.py",
            "from .plan import command",
            "imports lora_scale.commands.plan.command: a command does not import a command",
        ),
        (
            "adapters/a.py",
            "import torch.distributed as dist",
            "imports torch.distributed; torch.distributed enters in parallel",
        ),
        (
            "commands/a.py",
            "from torch import distributed",
            "imports torch.distributed; torch.distributed enters in parallel",
        ),
        (
            "adapters/a.py",
            "from torch.distributed import all_reduce",
            "imports torch.distributed.all_reduce; torch.distributed enters in parallel",
        ),
        (
            "adapters/a.py",
            "import torch as t\ndef f(x):\n    t.distributed.all_reduce(x)",
            "imports torch.distributed; torch.distributed enters in parallel",
        ),
        ("storage/a.py", "import torch", "imports torch; torch enters in adapters, commands, parallel"),
        (
            "storage/a.py",
            "from torch import nn",
            "imports torch.nn; torch enters in adapters, commands, parallel",
        ),
        ("commands/a.py", "def f():\n    import deepspeed", "imports deepspeed; deepspeed enters in parallel"),
        (
            "commands/a.py",
            "import importlib\nimportlib.import_module('mpi4py.MPI')",
            "imports mpi4py.MPI; mpi4py enters in parallel",
        ),
        ("adapters/a.py", "import transformers", "imports transformers; transformers enters in parallel, storage"),
        ("parallel/a.py", "class A:\n    import datasets", "imports datasets; datasets enters in storage"),
        ("commands/a.py", "from ruamel.yaml import YAML", "imports ruamel.yaml.YAML; ruamel enters in spec"),
        ("spec/a.py", "import numpy as np", "imports numpy; numpy enters in adapters, commands, parallel, storage"),
        (
            "storage/a.py",
            "from transformers import AutoTokenizer",
            "imports transformers.AutoTokenizer at once; import it inside the function that needs it",
        ),
        ("spec/a.py", "x = 1\n" * 301, "has 301 lines"),
        ("commands/train.py", "x = 1\n" * 451, "has 451 lines"),
        ("spec/a.py", "def f():\n" + "    x = 1\n" * 59, "has long functions: {'f at 1': 60}"),
        (
            "commands/train.py",
            ("def f():\n" + "    x = 1\n" * 60) * 2,
            "has long functions: {'f at 1': 61, 'f at 62': 61}",
        ),
    ],
)
def test_a_fault_is_found(path: str, source: str, finding: str) -> None:
    assert finding in findings(path, source)


def test_what_is_allowed_is_not_a_finding() -> None:
    allowed = {
        "commands/a.py": "import torch\nfrom lora_scale.commands import options\nfrom lora_scale import spec",
        "storage/a.py": "import numpy\nimport torchvision\ndef f():\n    import transformers",
        "parallel/a.py": "import torch.distributed as dist\nimport deepspeed\nfrom lora_scale.adapters import lora",
        "cli.py": "import click\nfrom lora_scale.commands.options import EXIT_CODES",
        "spec/a.py": "def f():\n" + "    x = 1\n" * 58,
        "commands/train.py": "def f():\n" + "    x = 1\n" * 200 + "x = 1\n" * 200,
    }
    assert [finding for path, source in allowed.items() for finding in findings(path, source)] == []
