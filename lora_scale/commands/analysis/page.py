"""The page of `lora-scale analyze`: one list of blocks, written as HTML with its pictures inside, and as Markdown.

Figures in the tables are medians over layers; every module's own are in the JSON file.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from math import isfinite
from statistics import mean, median
from typing import Any

from lora_scale import __version__
from lora_scale.adapters.survey import SIDES, Survey
from lora_scale.commands.analysis import figures
from lora_scale.commands.analysis.figures import History, by_group
from lora_scale.commands.analysis.runs import Opened
from lora_scale.commands.analysis.words import conclusions

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}td,th{padding:.2rem .6rem;"
    "border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}"
    "svg{max-width:100%;height:auto}figcaption,.note{color:#555;font-size:13px}"
)
DEFINITIONS = (
    "dW = scaling B A, computed from its factors. Effective rank: exp of the entropy of the singular values over their "
    "sum (Roy and Vetterli 2007). phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) for the first i and j directions: 1 where "
    "one holds the other, max(i, j) / dim by chance. The paper takes the right-singular vectors of A (its Section 7.2; "
    "its Appendix G calls them left, and its identity should read 1 - d^2 / p); these change when B A is cut "
    "differently, the two sides of dW do not. Amplification: ||dW||_F / ||U^T W V||_F with U and V from dW."
)


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of the page: text under a heading, then a table, then a picture; any of them may be missing."""

    heading: str = ""
    text: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()  # the header first
    picture: str = ""  # SVG
    caption: str = ""


def blocks(opened: Sequence[Opened], survey: Survey, base: str, history: History) -> list[Block]:
    names = [run.name for run in opened]
    page = [
        Block("What it means for r and target_modules", conclusions(opened, survey)),
        Block("What was looked at", [base, *_notes(opened, survey)], _runs(opened)),
        Block(
            "Spectra",
            table=_spectra(survey, names),
            picture=figures.spectra(survey, names),
            caption="Singular values of dW over the first: median over layers, and the middle 80% of the layers.",
        ),
    ]
    if survey.pairs:
        left = len(survey.pairs) - figures.MAX_ROWS
        more = f" {left} more pairs and groups are in the JSON file." if left > 0 else ""
        caption = f"phi(i, j), mean over layers; dark is 0, yellow is 1.{more}"
        page += [
            Block(
                "What the runs agree on", table=_pairs(survey), picture=figures.heat_maps(survey.pairs), caption=caption
            ),
            Block(picture=figures.agreement(survey), caption="All directions, layer by layer; dotted: chance."),
        ]
    if any(row.correlations for row in survey.modules):
        page.append(Block("The update and its weight", [_error(survey)], _correlations(survey, names)))
    page.append(Block("Layer by layer", picture=figures.by_layer(survey, names)))
    if history:
        page.append(Block("Over training", picture=figures.norms_over_steps(history)))
    return [*page, Block("Definitions", [DEFINITIONS])]


def html(page: Sequence[Block]) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>lora-scale analyze</title><style>{STYLE}</style><h1>lora-scale analyze</h1>",
    ]
    for block in page:
        parts += [f"<h2>{escape(block.heading)}</h2>"] if block.heading else []
        parts += [f"<p>{escape(text)}</p>" for text in block.text]
        if block.table:
            header, *rows = block.table
            lines = ["".join(f"<th>{escape(cell)}</th>" for cell in header)]
            lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
            parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>")
        if block.picture:
            parts.append(f"<figure>{block.picture}<figcaption>{escape(block.caption)}</figcaption></figure>")
    return "\n".join([*parts, f"<p class=note>lora_scale {__version__}</p></html>\n"])


def markdown(page: Sequence[Block], html_name: str) -> str:
    lines = ["# lora-scale analyze", "", f"Pictures: [{html_name}]({html_name})."]
    for block in page:
        if not block.text and not block.table:
            continue
        lines += ["", f"## {block.heading}"] if block.heading else []
        for text in block.text:
            lines += ["", text]
        if block.table:
            header, *rows = block.table
            rule = ["---", *("--:" for _ in header[1:])]
            lines += [
                "",
                *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, rule, *rows)),
            ]
    return "\n".join(lines) + "\n"


def as_json(opened: Sequence[Opened], survey: Survey, base: str, history: History) -> dict[str, Any]:
    """Every figure of the page, and those of every module."""
    return {
        "base": base,
        "runs": [
            {
                "name": run.name,
                "step": run.state.step if run.state else None,
                "seed": run.subject.seed,
                "val_loss": dict(run.val_losses),
            }
            for run in opened
        ],
        "modules": [
            asdict(row)
            | {"pairs": {" and ".join(pair): found for pair, found in row.pairs.items()}}
            | {"amplification": {name: _finite(c.amplification) for name, c in row.correlations.items()}}
            for row in survey.modules
        ],
        "pairs": [
            {
                "runs": pair.names,
                "group": pair.group,
                "modules": pair.count,
                "phi": {side: pair.mean(side).tolist() for side in pair.sums},
                "chance": {side: pair.expected(side).tolist() for side in pair.sums},
            }
            for pair in survey.pairs
        ],
        "left_out": survey.left_out,
        "norms_over_steps": history,
        "conclusions": conclusions(opened, survey),
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None  # JSON has no word for infinity


def _notes(opened: Sequence[Opened], survey: Survey) -> list[str]:
    notes = []
    counts = {run.name: len(run.subject.adapter.modules) for run in opened}
    if any(count != len(survey.modules) for count in counts.values()):
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        notes.append(f"Only the {len(survey.modules)} modules that all of them adapt are compared ({each}).")
    if (groups := len(by_group(survey.modules))) > figures.MAX_GROUPS:
        notes.append(
            f"{figures.MAX_GROUPS} of {groups} kinds of modules are drawn; the tables and the JSON file have all."
        )
    if survey.left_out:
        notes.append(
            f"{len(survey.left_out)} modules, first {survey.left_out[0]}, have an update of zero in some run: "
            "they are left out of comparisons."
        )
    return notes


def _runs(opened: Sequence[Opened]) -> list[list[str]]:
    rows = [["run", "step", "r", "seed", "modules", "parameters", "validation loss"]]
    for run in opened:
        losses = run.val_losses
        rows.append(
            [
                run.name,
                f"{run.state.step:,}" if run.state else "-",
                str(run.subject.adapter.max_rank),
                "-" if run.subject.seed is None else str(run.subject.seed),
                str(len(run.subject.adapter.modules)),
                f"{sum(factor.numel() for factor in run.subject.adapter.factors.values()):,}",
                f"{losses[0][1]:.4f} -> {losses[-1][1]:.4f}" if losses else "-",
            ]
        )
    return rows


def _spectra(survey: Survey, names: Sequence[str]) -> list[list[str]]:
    rows = [["module, run", "layers", "r", "effective rank", "directions for 90%", "most", "||dW||_F"]]
    for group, members in by_group(survey.modules).items():
        for name in names:
            found = [row.spectra[name] for row in members]
            rows.append(
                [
                    f"{group}, {name}",
                    str(len(found)),
                    str(max(s.r for s in found)),
                    f"{median(s.effective_rank for s in found):.2f}",
                    f"{median(s.directions_90 for s in found):g}",
                    str(max(s.directions_90 for s in found)),
                    f"{median(s.norm for s in found):.3g}",
                ]
            )
    return rows


def _pairs(survey: Survey) -> list[list[str]]:
    rows = [["phi(1, 1) / phi(all, all)", "group", *SIDES, "chance"]]
    for pair in survey.pairs:
        cells = []
        for side in SIDES:
            phi = pair.mean(side) if side in pair.sums else None
            cells.append("-" if phi is None else f"{phi[0, 0].item():.2f} / {phi[-1, -1].item():.2f}")
        chance = pair.expected(SIDES[0])
        level = f"{chance[0, 0].item():.3f} / {chance[-1, -1].item():.3f}"
        rows.append([" and ".join(pair.names), pair.group, *cells, level])
    return rows


def _correlations(survey: Survey, names: Sequence[str]) -> list[list[str]]:
    columns = ["||U^T W V|| from dW", "from W", "from random", "expected of random", "||dW||", "||W||", "amplification"]
    rows = [["module, run", "r", *columns]]
    for group, members in by_group([row for row in survey.modules if row.correlations]).items():
        for name in names:
            found = [row.correlations[name] for row in members]
            fields = ("from_update", "from_weight", "from_random", "random_expected", "update_norm", "weight_norm")
            cells = [median(getattr(c, field) for c in found) for field in (*fields, "amplification")]
            rows.append([f"{group}, {name}", str(found[0].rank), *(f"{cell:.3g}" for cell in cells)])
    return rows


def _error(survey: Survey) -> str:
    """How the weights' own singular values were found."""
    errors = [c.error for row in survey.modules for c in row.correlations.values()]
    text = "The paper's Table 7, all r directions, median over layers. The weights' singular values "
    if not any(errors):
        return text + "are exact."
    exact = sum(not error for error in errors) / len(errors)
    some = f" ({exact:.0%} of them exact)" if exact else ""
    return text + (
        f"are from a randomised SVD{some}: each lies within {max(errors):.1e} of the largest of a true singular value, "
        f"in the mean within {mean(errors):.1e}."
    )
