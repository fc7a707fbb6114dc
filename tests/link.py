"""What crosses the link between two hosts in a training step, counted on the network card: a base that each node holds
whole (`parallel.base_sharding: node`) beside plain ZeRO-3, each with the base as it is and twice as large.

    python tests/link.py --out docs/benchmarks/DATE-link.json      as root; 3 minutes

Two namespace hosts (tests/hosts.py) with two CPU ranks each, gloo. Everything on the wire counts: frames' headers,
acknowledgements, signs of life over ssh.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from faults import Job  # noqa: E402
from hosts import Host, check, cluster  # noqa: E402
from tiny import tiny_folder  # noqa: E402
from training import write_rows  # noqa: E402

from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.runlog import read_manifest  # noqa: E402

FROM, TO = 5, 45  # steps between which is counted
HIDDEN, LAYERS, R = 256, 4, 64
FEED_FORWARD = {1: 640, 2: 1640}  # features of it, for a base that is so many times as large
CONFIG = f"""\
model: {{path: model}}
data: {{train: rows.jsonl, seq_len: 48}}
run_dir: run
precision: fp32
recompute: none
lora: {{r: {R}, lora_alpha: 64, target_modules: [q, k, v, o]}}
train: {{max_steps: {TO + 5}, global_batch_size: 4, lr: 1e-4, schedule: constant}}
"""


@dataclass
class Row:
    """One run."""

    base_sharding: str
    base_bytes: int  # of the weights in memory, fp32
    gradient_bytes: int  # of the adapter, fp32
    bytes_a_step: float  # sent and received by the second host's card
    steps: int


def card(host: Host) -> int:
    """Bytes that its eth0 has sent and received, by the kernel."""
    for line in Path(f"/proc/{host.pid}/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            found = numbers.split()
            return int(found[0]) + int(found[8])
    raise AssertionError(f"{host.name} has no eth0")


def run(place: Path, sharding: str, larger: int) -> Row:
    """Train on fresh hosts and count."""
    folder = place / f"{sharding}-{larger}"
    model = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4}
    tiny_folder(folder / "model", **model, head_dim=HIDDEN // 4, intermediate_size=FEED_FORWARD[larger])
    write_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "site").mkdir()
    with cluster(2, folder / "cluster") as hosts:
        hosts.hostfile(folder / "hosts", slots=2)
        job = Job(hosts, folder, overrides=[f"parallel.base_sharding={sharding}"])
        counted = []
        for step in (FROM, TO):
            job.wait_step(step)
            counted.append((job.step(), card(hosts[1])))
        assert job.end() == 0, job.screen
    (first, before), (last, after) = counted
    manifest = read_manifest(folder / "run")
    parameters = manifest["parameters"]
    base = parameters["total"] - parameters["trainable"]
    return Row(sharding, 4 * base, 4 * parameters["trainable"], (after - before) / (last - first), last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    commit = provenance.commit_of_record("link")
    check()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for sharding in ("node", "world"):
            for larger in (1, 2):
                rows.append(run(Path(place), sharding, larger))
                print(json.dumps(asdict(rows[-1])), flush=True)
    record: dict[str, Any] = provenance.head(
        f"bytes a step on the network card of the second of two namespace hosts, two CPU ranks each, gloo, counted "
        f"from step {FROM} to step {TO}",
        "tests/link.py",
        commit,
    ) | {"link": [asdict(row) for row in rows]}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    one, two = rows[:2]
    grown = two.bytes_a_step / one.bytes_a_step - 1
    limit = 4 * one.gradient_bytes + (1 << 20)
    print(f"node: {grown:+.2%} for a base {two.base_bytes / one.base_bytes:.2f} times as large; limit {limit:,} bytes")
    sys.exit(abs(grown) > 0.01 or one.bytes_a_step > limit)


if __name__ == "__main__":
    main()
