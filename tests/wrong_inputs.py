"""What `lora-scale train` says to wrong inputs: each goes to the real command line, and the answers make a page.

    python tests/wrong_inputs.py > docs/wrong-inputs.md

Every case runs in a fork of this process, in a fresh folder with a tiny model, rows and (for the last group) a run with
two checkpoints: nothing is imported again, and a case that hangs is found. The lists of wrong configs, folders and rows
are those of the tests of their readers.
"""

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")

from test_config import SMALL, WRONG_FILES  # noqa: E402
from test_dataset import WRONG as WRONG_ROWS  # noqa: E402
from test_folder import WRONG as WRONG_FOLDERS  # noqa: E402
from test_folder import write_model  # noqa: E402
from tiny import tiny_folder  # noqa: E402
from training import write_rows  # noqa: E402

from lora_scale import cli  # noqa: E402
from lora_scale.storage import checkpoints, lease  # noqa: E402
from lora_scale.storage.weights import read_safetensors  # noqa: E402

PATIENCE = 60.0  # seconds after which a case counts as hanging
CONFIG = """\
model: {path: model}
data: {train: rows.jsonl, seq_len: 48}
run_dir: run
precision: fp32
recompute: none
lora: {r: 4, lora_alpha: 8}
train: {max_steps: 4, global_batch_size: 6, lr: 3e-3, max_grad_norm: 0.05}
save: {every: 2}
"""

Change = Callable[[], object]  # of the current folder


@dataclass(frozen=True)
class Case:
    """One wrong input. `given` says what the files hold; `arrange` makes them so."""

    group: str
    given: str
    arguments: tuple[str, ...] = ("run.yaml",)
    arrange: Change = lambda: None
    env: Mapping[str, str] = field(default_factory=dict)
    ranks: int = 0  # started by a launcher, as so many processes; 0: by hand
    verb: str = "train"


@dataclass(frozen=True)
class Answer:
    """What a case gave: exit code, the whole screen, and of it what the case is about."""

    code: int
    screen: str

    @property
    def message(self) -> str:
        lines = self.screen.splitlines()
        if not self.code:
            return "\n".join(line for line in lines if line.startswith(("note ", "resumed ", "finished ")))
        starts = [i for i, line in enumerate(lines) if line.startswith(("lora-scale: error:", "Usage:"))]
        return "\n".join(lines[starts[0] :]) if starts else ""


# --- the cases ------------------------------------------------------------------------------------------------------


def write(name: str, text: str | bytes) -> Change:
    return lambda: Path(name).write_bytes(text.encode() if isinstance(text, str) else text)


def config(group: str, *overrides: str, given: str = "", **more: Any) -> Case:
    return Case(group, given, ("run.yaml", *overrides), **more)


def _configs() -> list[Case]:
    group = "Config"
    overrides = (
        ["lora.r=0"],
        ["lora.r='8'"],
        ["lora.target_modules=q"],
        ["train.lr=.nan"],
        ["train.lr='2e-4'"],
        ["train.micro_batch_size=4"],
        ["data.packing=off"],
        ["data.validation=1.5"],
        ["data.validation="],
        ["parallel.zero_stage=4"],
        ["precision=fp16"],
        ["lr=1e-4"],
        ["train.learning_rate=1e-4"],
        ["lora.target_module=[q]"],
        ["banana=1"],
        ["seed", "lora.r=0", "resume=no"],
        ["cutoff_len=2048", "optim=adamw_torch", "gradient_accumulation_steps=4"],
        ["data.train=[{path: a, weight: 0}, {pth: b}]"],
        ["engine.deepspeed={zero_optimization: {stage: 2, offload_param: {device: cpu}}}"],
        ["save.best=val_loss"],
    )
    files = ("empty", "no space", "a tab", "twice", "indentation", "documents")
    return [
        Case(group, "no such file", ("absent.yaml",)),
        *(Case(group, f"the file is: {case}", arrange=write("run.yaml", WRONG_FILES[case][0])) for case in files),
        Case(
            group, "the file ends before its train section", arrange=write("run.yaml", SMALL.partition("\ntrain:")[0])
        ),
        *(config(group, *changes) for changes in overrides),
        config(group, "lora.target_modules=[query]"),
        config(group, "lora.target_modules=['re:.*(q_proj']"),
        config(group, "lora.rank_pattern.experts=8"),
        config(group, "recompute=99"),
        config(group, "method=full", "precision=bf16", "parallel.zero_stage=0"),
        config(group, "model.attention=flash_attention_2"),
        config(group, "run_dir=rows.jsonl/run"),
    ]


def _folders() -> list[Case]:
    group = "Model folder"

    def of(case: str) -> Change:
        def change() -> None:
            shutil.rmtree("model")
            WRONG_FOLDERS[case][0](write_model(Path("model")))

        return change

    def edited(**changes: Any) -> Change:
        def change() -> None:
            path = Path("model/config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))

        return change

    names = (
        "no config.json", "config.json cut", "adapter", "hub cache", "GGUF", "pickles", "no weights", "no index",
        "two sets of weights", "git-LFS pointer", "index that goes up", "a file missing", "a file cut",
        "tensor in two files", "remote code", "fp8", "gptq", "mxfp4", "bitsandbytes of old", "int8 weights",
    )  # fmt: skip
    return [
        config(group, "model.path=elsewhere/model"),
        config(group, "model.path=./absent"),
        config(group, "model.path=org/model", given="no network, nothing in the hub's cache"),
        *(Case(group, f"the folder has: {name}", arrange=of(name)) for name in names),
        Case(group, 'config.json says "hidden_size": 64; the weights have 32', arrange=edited(hidden_size=64)),
        Case(group, 'config.json says "num_hidden_layers": 3; the weights have 2', arrange=edited(num_hidden_layers=3)),
        Case(group, 'config.json says "model_type": "banana"', arrange=edited(model_type="banana")),
        Case(group, 'config.json says "model_type": "clip"', arrange=edited(model_type="clip")),
        Case(group, 'config.json has "num_attention_heads": 5', arrange=edited(num_attention_heads=5)),
        Case(group, "no tokenizer", arrange=lambda: [p.unlink() for p in Path("model").glob("token*")]),
        Case(group, "tokenizer.json cut", arrange=write("model/tokenizer.json", '{"version": ')),
        Case(group, "an embedding of infinities", arrange=_overwrite("model.embed_tokens.weight", b"\x80\x7f")),
    ]


def _overwrite(tensor: str, bf16: bytes) -> Change:
    """Fills one tensor of the model's files with one value."""

    def change() -> None:
        for path in Path("model").glob("*.safetensors"):
            for name, entry in read_safetensors(path)[0].items():
                if name == tensor:
                    with path.open("r+b") as file:
                        file.seek(entry.offset)
                        file.write(bf16 * entry.numel)

    return change


def _rows() -> list[Case]:
    group = "Data"
    names = (
        "empty file", "gzip", "parquet", "empty line", "not JSON", "a JSON list", "not UTF-8", "unknown keys",
        "no completion", "another form", "null", "another chat format", "labels too short", "labels shifted",
    )  # fmt: skip
    shown = {name: _shown(WRONG_ROWS[name][0]) for name in names}
    return [
        config(group, "data.train=absent.jsonl"),
        config(group, "data.train=model"),
        config(group, "data.validation=absent.jsonl"),
        *(Case(group, f"rows.jsonl is {shown[n]}", arrange=write("rows.jsonl", WRONG_ROWS[n][0])) for n in names),
        Case(group, 'rows.jsonl is `{"input_ids": [1, 96]}`', arrange=write("rows.jsonl", '{"input_ids": [1, 96]}\n')),
        Case(group, "the tokenizer has no chat template", arrange=_messages_without_template),
        config(group, "data.chat_template=vicuna"),
        config(group, "data.fields={question: prompt}"),
        config(group, "data.fields={prompt: question, completion: answer}"),
        config(group, "data.train=rows.csv", given="rows.csv has a line with a field too many", arrange=_wrong_csv),
        config(group, "data.train=rows.json", given="rows.json is cut", arrange=write("rows.json", '[{"text": "a"}')),
        config(group, "data.train=owner/rows", given="no network, nothing in the hub's cache"),
        config(group, given="a conversation that the chat template rewrites", arrange=_rewriting_template),
        config(group, "data.cache=rows.jsonl/cache"),
        config(group, "engine.deepspeed=absent.json"),
        config(group, "data.seq_len=1"),
        config(group, "data.max_rows=2", "data.validation=0.01"),
    ]


def _shown(content: bytes) -> str:
    try:
        text = content.decode().rstrip("\n").replace("\n", " ⏎ ")
    except UnicodeDecodeError:
        text = repr(content)[2:-1]
    return f"`{text}`" if text else "empty"


def _wrong_csv() -> None:
    write("rows.csv", "prompt,completion\na,b\na,b,c\n")()


def _rewriting_template() -> None:
    """As Qwen3's: of all answers but the last it leaves something out."""
    said = "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}<|im_end|>"
    write(
        "model/chat_template.jinja", f"{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}} {said}{{% endfor %}}"
    )()
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"))] * 2
    write("rows.jsonl", json.dumps({"messages": turns}) + "\n")()


def _messages_without_template() -> None:
    path = Path("model/tokenizer_config.json")
    tree = json.loads(path.read_text())
    tree.pop("chat_template", None)
    path.write_text(json.dumps(tree))
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    write("rows.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')()


def _launches() -> list[Case]:
    group = "Launch"
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    return [
        Case(group, "no config named", ()),
        config(group, "--ranks", "0"),
        config(group, "--lora.r=8"),
        config(group, "--ranks", "2", env=place, given="inside a launcher's job"),
        config(group, env={"RANK": "0"}, given="`RANK=0` in the environment, and no WORLD_SIZE"),
        config(group, env=place | {"RANK": "3"}, given="`RANK=3 WORLD_SIZE=1 LOCAL_RANK=0`"),
        config(group, env=place | {"RANK": "one"}, given="`RANK=one WORLD_SIZE=1 LOCAL_RANK=0`"),
        config(group, env=place, given="`RANK=0 WORLD_SIZE=1 LOCAL_RANK=0` and no MASTER_ADDR"),
        config(
            group, env=mpi | {"MASTER_ADDR": "::1"}, given="mpirun of two ranks with MASTER_ADDR, but no MASTER_PORT"
        ),
        config(group, env=place | meeting, given="a MASTER_PORT that is taken", arrange=_take_port),
        config(group, env={"DS_ACCELERATOR": "cuda"}, given="`DS_ACCELERATOR=cuda` on a machine without a GPU"),
        config(group, "train.global_batch_size=5", given="two ranks", ranks=2),
        config(group, given="run_dir is in use by a run that goes on", arrange=_hold_lock),
    ]


HELD: list[Any] = []  # what a case must keep open while it runs


def _take_port() -> None:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    HELD.append(taken)
    os.environ["MASTER_PORT"] = str(taken.getsockname()[1])


def _hold_lock() -> None:
    Path("run").mkdir()
    HELD.append(lease.Lease(Path("run")))
    lease.LOCK_PATIENCE = 0.5


NEWEST, OLDER = Path("run/checkpoints/step-000004"), Path("run/checkpoints/step-000002")


def _resumes() -> list[Case]:
    group = "Resume"

    def case(given: str, *overrides: str, change: Change = lambda: None) -> Case:
        return config(group, "train.max_steps=6", *overrides, given=given, arrange=change)

    def cut(*files: Path) -> Change:
        return lambda: [os.truncate(file, file.stat().st_size - 40) for file in files]

    weights, moments = NEWEST / "adapter_model.safetensors", NEWEST / "optimizer.safetensors"
    return [
        case("the run has checkpoints of steps 2 and 4", "resume=never"),
        case("the run was made with lora.r=4", "lora.r=8"),
        case("the run was made with lora.target_modules=[q, v]", "lora.target_modules=[q, k]"),
        case("the run was made with train.global_batch_size=6", "train.global_batch_size=12"),
        case("the run was made with seed=0", "seed=1"),
        case("the run was made with method=lora", "method=full"),
        case("the run was made with data.seq_len=48", "data.seq_len=32"),
        case("rows.jsonl has other rows than before", change=lambda: write_rows(Path("rows.jsonl"), seed=1)),
        case("model is another model than before", change=_overwrite("model.norm.weight", b"\x00\x40")),
        case("", "resume=absent"),
        case("a run directory is no checkpoint", "resume=run"),
        case("its weights are cut", f"resume={NEWEST}", change=cut(weights)),
        case("the run has gone further", f"resume={OLDER}"),
        case("the newest checkpoint's weights are cut: an older one is whole, and is used", change=cut(weights)),
        case("both checkpoints are cut", change=cut(weights, OLDER / "adapter_model.safetensors")),
        case("the newest has no optimizer.safetensors", change=moments.unlink),
        case("metrics.jsonl has a line that is no JSON", change=_spoil_metrics),
        config(group, given="all 4 steps are done: no error"),
    ]


def _spoil_metrics() -> None:
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "step 2 went well", *lines[2:], ""]))


def all_cases() -> list[Case]:
    return [*_configs(), *_folders(), *_rows(), *_launches(), *_resumes()]


# --- running them ---------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """The folder that every case gets a copy of."""
    import deepspeed  # noqa: F401  imported once, here: every case is a fork
    import transformers.models.llama.modeling_llama  # noqa: F401
    from huggingface_hub import constants

    import lora_scale.commands.train  # noqa: F401

    constants.HF_HUB_OFFLINE = True  # read when it was imported, which another may have done before
    folder.mkdir()
    tiny_folder(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(CONFIG)
    made = answer(Case("", ""), folder)
    assert made.code == 0 and len(checkpoints.list_checkpoints(folder / NEWEST.parent)) == 2, made.screen


def answer(case: Case, folder: Path) -> Answer:
    """Run the case in `folder`, which it may change."""
    screen = folder / "screen.txt"
    places = [_place(case, rank) for rank in range(max(1, case.ranks))]
    children = [_fork(case, folder, screen, place) for place in places]
    deadline = time.monotonic() + PATIENCE
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - set(codes):
                os.kill(child, signal.SIGABRT)  # faulthandler writes where it hangs
                os.waitpid(child, 0)
            raise AssertionError(f"{case.given or case.arguments} hangs:\n{screen.read_text()}")
        time.sleep(0.02)
    assert len(set(codes.values())) == 1, f"{case}: ranks ended differently: {codes}\n{screen.read_text()}"
    return Answer(codes[children[0]], screen.read_text())


def _place(case: Case, rank: int) -> dict[str, str]:
    if not case.ranks:
        return {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = PORTS.setdefault(id(case), probe.getsockname()[1])
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


PORTS: dict[int, int] = {}  # the ranks of one case meet at one port


def _fork(case: Case, folder: Path, screen: Path, place: Mapping[str, str]) -> int:
    """A child that is `lora-scale train ARGUMENTS` in that folder, with the screen in a file."""
    if child := os.fork():
        return child
    try:
        os.chdir(folder)
        os.environ.update(case.env | place)
        descriptor = os.open(screen.name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        case.arrange()
        cli.main([case.verb, *case.arguments])
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr, flush=True)
    os._exit(99)


def run_all(cases: Sequence[Case]) -> list[tuple[Case, Answer]]:
    """Every case with its answer, two at a time."""
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place, "prepared"))
        CASES.extend(cases)  # forked, not pickled: an arrangement is a function
        with multiprocessing.get_context("fork").Pool(2) as pool:
            answers = pool.map(functools.partial(_one, Path(place)), range(len(cases)), chunksize=1)
    return list(zip(cases, answers, strict=True))


CASES: list[Case] = []


def _one(place: Path, number: int) -> Answer:
    case, folder = CASES[number], place / str(number)
    shutil.copytree(place / "prepared", folder)
    (folder / "screen.txt").unlink()
    if case.group != "Resume":
        shutil.rmtree(folder / "run")
    said = answer(case, folder)
    shutil.rmtree(folder)
    return said


# --- the page -------------------------------------------------------------------------------------------------------

HEAD = """\
# Wrong inputs

What `lora-scale train` answers to {count} wrong inputs. Exit code 2 says that the input must change before the same
command can work, 1 that a guard stopped a run that had begun, 0 that the run went on all the same. No answer is a
traceback, and none comes late: what can be judged before the model is loaded is judged before.

Made by `python tests/wrong_inputs.py > docs/wrong-inputs.md`, which gives each to the real command line; a test holds
this page to it. `run.yaml`, where nothing else is said of it:

```yaml
{config}```
"""


def page(found: Sequence[tuple[Case, Answer]]) -> str:
    """All answers in Markdown, by group."""
    parts = [HEAD.format(count=len(found), config=CONFIG)]
    for group in dict.fromkeys(case.group for case, _ in found):
        parts.append(f"\n## {group}\n")
        for case, result in found:
            if case.group == group:
                command = " ".join(["lora-scale train", *map(_quoted, case.arguments)])
                given = f"; {case.given}" if case.given else ""
                parts.append(
                    f"\n`{command}`{given}: exit code {result.code}\n\n```text\n{steady(result.message)}\n```\n"
                )
    return "".join(parts)


def _quoted(argument: str) -> str:
    return f'"{argument}"' if re.search(r"[\[\]'*() ]", argument) else argument


def steady(text: str) -> str:
    """The text without what differs from run to run: hashes, process numbers, hosts, ports, versions, seconds."""
    text = re.sub(r"sha256:[0-9a-f]+", "sha256:0123456789ab", text)
    text = re.sub(r"process \d+ on \S+?;", "process 4242 on host;", text)
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:29500", text)
    text = re.sub(r"rank-\d+\.txt", "rank-000.txt", text)  # the first of the ranks to say it
    text = re.sub(r"port: \d+", "port: 29500", text)
    text = re.sub(r"transformers \d+\.\d+\.\d+", "transformers 5.23.0", text)
    return re.sub(r"finished (\d+) steps in \d+ s", r"finished \1 steps in 1 s", text)


LAST = ("lora-scale: error:", "  log: ", "Error:", "A key of the config is written")


def faults(case: Case, result: Answer) -> list[str]:
    """What is wrong with an answer: a traceback, an exit code of a crash, a message that is not last or not alone."""
    lines = result.screen.splitlines()
    errors = [line for line in lines if line.startswith(("lora-scale: error:", "Error:"))]
    return [
        fault
        for fault, holds in {
            "a traceback on the screen": "Traceback" in result.screen,
            f"exit code {result.code}": result.code not in (0, 1, 2),
            "no message": not result.message,
            "an error without an error's exit code": bool(errors) != (result.code != 0),
            "said twice": len(set(errors)) != len(errors),
            "words after the error": bool(errors)
            and not lines[-1].startswith(("lora-scale:", "Error:", "  log:", "A key")),
            "control characters": bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", result.screen)),
        }.items()
        if holds
    ]


def main() -> None:
    everything = run_all(all_cases())
    bad = {f"{case.arguments} {case.given}": (faults(case, result), result.screen) for case, result in everything}
    for name, (what, seen) in bad.items():
        if what:
            print(f"--- {name}: {', '.join(what)}\n{seen}", file=sys.stderr)
    print(page(everything), end="")
    sys.exit(any(what for what, _ in bad.values()))


if __name__ == "__main__":
    main()
