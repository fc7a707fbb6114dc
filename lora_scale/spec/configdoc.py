"""Writes docs/config.md from the fields of `spec.config`: `python -m lora_scale.spec.configdoc > docs/config.md`.

A test fails when that file is stale, or when the example in it does not load.
"""

import sys
from collections.abc import Iterable

from lora_scale.spec.config import Source
from lora_scale.spec.keys import Key, elements, keys, sections, show

EXAMPLE = """\
# lora-scale train run.yaml
model:
  path: models/smollm2-135m-instruct
data:
  train: data/train.jsonl        # rows of {"prompt": ..., "completion": ...}
  validation: data/validation.jsonl
  seq_len: 1024
run_dir: runs/first
lora:
  r: 16
  lora_alpha: 32
  target_modules: [q, k, v, o, 're:.*layers\\.[0-3]\\.mlp\\.down_proj']
  rank_pattern:
    'layers\\.0\\..*': 4
train:
  epochs: 1
  global_batch_size: 16
  micro_batch_size: 2
  lr: 2e-4
  warmup_steps: 20
eval:
  every: 100
save:
  every: 100
parallel:
  zero_stage: 3
"""

HEAD = f"""\
<!-- `python -m lora_scale.spec.configdoc > docs/config.md` wrote this from lora_scale/spec/config.py: change that. -->

# The config

One YAML file describes one run. A complete example:

```yaml
{EXAMPLE}```

Every key can be changed on the command line, after the file; the value is read as YAML, the last one wins:

```
lora-scale train run.yaml lora.r=16 'lora.target_modules=[q, v]' data.validation=null 'lora.rank_pattern.down_proj=4'
```

- `model: PATH` is short for `model.path`, in the file and on the command line.
- A relative path starts at the directory in which the command is given, not at the config's folder. `~/` is the home
  folder.
- YAML 1.2: `2e-4` is a number; `off`, `no`, `yes`, `on` are words, and switches are written `true` or `false`; a key
  that stands twice is an error. Patterns stand in single quotes, where `\\` is an ordinary character. JSON is YAML.
- An unknown key, a value of another type (`"8"` for `8`, `8.0` for `8`) or out of its limits is an error that names the
  key, the value, and what may stand there. All errors are told at once; the exit code is 2.
- A section may be left out, or empty, where none of its keys is required. Nothing is changed after reading; the run
  directory holds the file as given (`config.yaml`) and every key as it was used (`config.resolved.json`, which can
  itself be given as a config).
"""


def text() -> str:
    """The whole of docs/config.md."""
    top = ["## At the top level", _table("")]
    inside = [part for name, meaning in sections().items() for part in (f"## {name}", meaning, _table(name))]
    of_source = ["## An element of data.train", (Source.__doc__ or "").strip(), _rows(elements("data.train"))]
    return "\n\n".join([HEAD.rstrip(), *top, *inside, *of_source]) + "\n"


def _table(section: str) -> str:
    return _rows([key for key in keys().values() if key.section == section])


def _rows(table: Iterable[Key]) -> str:
    return "\n".join(["| key | takes | default | meaning |", "|---|---|---|---|", *map(_row, table)])


def _row(key: Key) -> str:
    default = "required" if key.required else f"`{_yaml(key.default)}`"
    return f"| `{key.name}` | {_cell(key.takes.replace(chr(39), '`'))} | {default} | {_cell(key.meaning)} |"


def _yaml(value: object) -> str:
    return show(value).strip("'").replace('"', "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(text())
