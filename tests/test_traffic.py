"""What a step sends on clusters that are not at hand: the formulas' own arithmetic."""

import json

import pytest
from click.testing import CliRunner
from test_search import H200, job

from lora_scale.commands.plan import command
from lora_scale.spec import cost, speed, traffic

LLAMA_100B = job("llama-100.7b")


def of(layout: str) -> dict[int, traffic.Cluster]:
    return {one.gpus: one for one in traffic.clusters(LLAMA_100B, H200, 8) if one.layout == layout}


def test_a_base_over_all_ranks_comes_from_other_nodes_twice_a_pass() -> None:
    base = 2 * cost.total(LLAMA_100B.model)
    adapter = 2 * 4 * cost.numel(LLAMA_100B.parts.trained)
    for gpus, one in of("base over all ranks").items():
        gathered = 2 * base * (gpus - 8) / gpus
        assert one.network == pytest.approx(gathered + adapter * (gpus - 1) / gpus, rel=1e-6)
        assert one.node == pytest.approx(2 * base * 7 / gpus, rel=1e-6)
        assert one.waits == pytest.approx(gathered / speed.NETWORK - one.work, rel=0.01), "what does not hide"


def test_a_base_on_each_node_does_not() -> None:
    node, whole = of("base on each node"), of("base over all ranks")
    assert list(node) == [64, 128, 256, 512, 1024]
    for gpus, one in node.items():
        assert one.network < whole[gpus].network / 1000
        assert one.tokens_a_step == whole[gpus].tokens_a_step == gpus * 4096
    assert node[1024].tokens_per_second == pytest.approx(16 * node[64].tokens_per_second, rel=0.01)


def test_which_layouts_stop_scaling() -> None:
    found = list(traffic.clusters(LLAMA_100B, H200, 8))
    ends = traffic.ends(found)
    assert ends.pop("base over all ranks") == 64 and set(ends.values()) == {None}
    tokens = {one.tokens_a_step for one in found if one.layout == "tensor parallel 8"}
    assert tokens == {gpus // 8 * 4096 for gpus in traffic.SIZES}


def test_the_verb_says_it_in_words_and_in_figures() -> None:
    asked = ["--shape", "llama-100.7b", "--gpus-per-node", "8", "--gpu", "h200", "--scale", "data.seq_len=4096"]
    said = CliRunner().invoke(command, asked)
    assert said.exit_code == 0 and said.output.splitlines()[1] == "base on each node: scales to 1,024 GPUs"
    rows = json.loads(CliRunner().invoke(command, [*asked, "--json"]).output)["clusters"]
    assert {row["gpus"] for row in rows} == set(traffic.SIZES) and all(0 < row["efficiency"] <= 1 for row in rows)
    for wrong, words in ((["--gpu", "80"], "--scale needs --gpu with the name"), (["--out", "x"], "leave --scale out")):
        result = CliRunner().invoke(command, [*asked, *wrong], standalone_mode=False)
        assert words in str(result.exception)
    nothing = ["--shape", "llama-100.7b", "--gpus-per-node", "1", "--gpu", "l40s", "--scale", "data.seq_len=65536"]
    result = CliRunner().invoke(command, nothing)
    assert result.exit_code == 3 and result.output.startswith("no layout fits nodes of 1 GPU of 44 GiB")
