"""Malformed rows, configs and folders from hypothesis: each is answered with one of our errors, or is right.

    python tests/fuzz.py --count 10000 --out docs/benchmarks/DATE-fuzz.json      about 15 minutes

No answer is a traceback, and none takes longer than LIMIT seconds of a core.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from chat_forms import FORMS, ROWS, make_tokenizer  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lora_scale.spec import configfile  # noqa: E402
from lora_scale.spec.errors import LoraScaleError  # noqa: E402
from lora_scale.spec.keys import keys, sections  # noqa: E402
from lora_scale.storage import folder as model_folder  # noqa: E402
from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.dataset import encode  # noqa: E402
from lora_scale.storage.rows import read_rows  # noqa: E402

LIMIT = 5.0  # seconds an answer may take
NAMES = ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows")

text = st.text(max_size=12) | st.sampled_from(
    ["user", "assistant", "system", "tool", "human", "gpt", "\ud800", "<|im_end|>"]
)
leaf = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | text
tree = st.recursive(
    leaf, lambda part: st.lists(part, max_size=3) | st.dictionaries(text, part, max_size=3), max_leaves=8
)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": text, "content": text | tree, "from": text, "value": text | tree, "tool_calls": tree, "name": leaf,
        "tool_call_id": leaf, "reasoning_content": text | tree,
    },
)  # fmt: skip
KEYS = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "labels", "instruction", "input",
        "output", "system", "history", "tools")  # fmt: skip
row = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, st.lists(message, max_size=4) | tree)) | st.sampled_from(
    list(ROWS.values())
)


@st.composite
def row_files(draw: Any) -> tuple[str, bytes]:
    """A file of rows, often cut, changed or of another kind than its name says."""
    name, rows = draw(st.sampled_from(NAMES)), draw(st.lists(row | tree, max_size=4))
    lines = [json.dumps(one, ensure_ascii=draw(st.booleans())) for one in rows]
    whole = "\n".join(lines) if name != "rows.json" or draw(st.booleans()) else f"[{','.join(lines)}]"
    data = whole.encode(errors="surrogatepass")
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + draw(st.integers(0, 4)) :]
    return name, draw(st.sampled_from([b"", b"", b"", b"PAR1", b"\xef\xbb\xbf", b"\x1f\x8b"])) + data


CONFIG_KEYS = st.sampled_from([*keys(), *sections(), "lr", "base_model", "zero_optimization"]) | text
section = st.dictionaries(st.sampled_from([key.leaf for key in keys().values()]) | text, tree, max_size=4)


@st.composite
def configs(draw: Any) -> tuple[bytes, list[str]]:
    """A config near a right one, and overrides."""
    made: dict[str, Any] = {
        "model": {"path": "m"}, "data": {"train": "./r"}, "run_dir": "./x", "train": {"max_steps": 3}
    }  # fmt: skip
    made |= draw(st.dictionaries(st.sampled_from(list(sections())) | text, section | tree, max_size=3))
    data = json.dumps(made).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data = (
            data[:at]
            + draw(st.binary(max_size=4) | st.sampled_from([b"\t", b"&a", b"*a", b"!!x ", b"---\n"]))
            + data[at:]
        )
    overrides = draw(st.lists(st.tuples(CONFIG_KEYS, tree), max_size=2))
    return data, [f"{key}={json.dumps(value)}" for key, value in overrides]


fp8 = st.fixed_dictionaries({"quant_method": st.just("fp8")}, optional={"weight_block_size": tree, "fmt": leaf})
CONFIG_OF_MODEL = {"torch_dtype": leaf, "quantization_config": fp8 | tree, "text_config": tree}


@st.composite
def folders(draw: Any) -> dict[str, bytes]:
    """Files of a model folder, each right, wrong or absent."""
    head = json.dumps(draw(st.dictionaries(text, tree, max_size=2))).encode()
    files = {
        "config.json": json.dumps(draw(tree | st.fixed_dictionaries({"model_type": text}, optional=CONFIG_OF_MODEL))),
        "model.safetensors.index.json": json.dumps(draw(tree | st.fixed_dictionaries({"weight_map": tree}))),
        "model.safetensors": len(head).to_bytes(8, "little") + head + draw(st.binary(max_size=8)),
        "tokenizer.json": draw(st.binary(max_size=20)),
    }
    kept = draw(st.sets(st.sampled_from(list(files))))
    return {name: value.encode() if isinstance(value, str) else value for name, value in files.items() if name in kept}


class Tally:
    """What came of the inputs of one kind; `faults` must stay empty."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.slowest = 0.0

    def judge(self, what: Any, action: Any) -> None:
        begun = time.process_time()  # others use the machine too
        try:
            action()
            self.counts["accepted"] += 1
        except LoraScaleError as error:
            self.counts["refused"] += 1
            if not str(error).strip():
                self.faults.append(f"an empty message: {what!r}")
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}: {what!r}")
        seconds = time.process_time() - begun
        self.slowest = max(self.slowest, seconds)
        if seconds > LIMIT:
            self.faults.append(f"{seconds:.1f} s: {what!r}")


def run(count: int, place: Path, first_seed: int = 0) -> dict[str, Tally]:
    """About `count` inputs: half of them rows, the others configs and folders."""
    tok = make_tokenizer(FORMS["Qwen3"], place / "tokenizer")
    found = {"rows": Tally(), "configs": Tally(), "folders": Tally()}
    number = 0

    def fresh(name: str) -> Path:
        nonlocal number
        number += 1
        path = place / str(number)
        path.mkdir()
        return path / name

    def rows_case(file: tuple[str, bytes]) -> None:
        path = fresh(file[0])
        path.write_bytes(file[1])
        found["rows"].judge(file, lambda: encode(read_rows(path), tok, 64, "assistant"))

    def config_case(case: tuple[bytes, list[str]]) -> None:
        path = fresh("run.yaml")
        path.write_bytes(case[0])
        found["configs"].judge(case, lambda: configfile.load(path, case[1]))

    def folder_case(files: dict[str, bytes]) -> None:
        path = fresh("model")
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data)
        found["folders"].judge(files, lambda: model_folder.open_folder(path, False))

    shares = ((rows_case, row_files(), 2), (config_case, configs(), 4), (folder_case, folders(), 4))
    for case, strategy, share in shares:
        chosen = settings(
            max_examples=max(1, count // share), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(first_seed)(chosen(given(strategy)(case)))()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        found = run(arguments.count, Path(place), arguments.seed)
    record = {
        "what": "malformed rows, configs and model folders from hypothesis: every answer one of our errors, or none",
        "command": " ".join(["python tests/fuzz.py", *sys.argv[1:]]),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "seconds": round(time.monotonic() - begun, 1),
        **{name: {**t.counts, "slowest_seconds": round(t.slowest, 3), "faults": t.faults} for name, t in found.items()},
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    faults = [fault for tally in found.values() for fault in tally.faults]
    print({name: dict(tally.counts) for name, tally in found.items()}, f"{len(faults)} faults", record["seconds"])
    print(*faults[:20], sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
