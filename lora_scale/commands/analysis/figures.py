"""The pictures of `lora-scale analyze`, each an SVG that stands by itself. The only door to matplotlib."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean, median
from typing import Any

from lora_scale.adapters.survey import OUTPUT, SIDES, ModuleRow, PairMean, Survey
from lora_scale.spec.errors import UsageError

COLOURS = ("#1f5fa8", "#d1602b", "#3b8a4f", "#7a4fa3", "#8c6d1f", "#5f6b73")
MAX_GROUPS, MAX_ROWS = 8, 14  # drawn; the JSON file has all
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lora-scale", "font.size": 8, "axes.titlesize": 8}
History = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]  # run: group: (step, mean ||dW||_F)


def require() -> None:
    """Before anything long is computed: are there pictures to be had?"""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"the pictures need matplotlib ({error}); pip install 'lora-scale[analyze]'") from None


@contextmanager
def _panels(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[list[list[Any]], list[str]]]:
    """Axes, and a list that gets the SVG. Size in inches a panel."""
    import matplotlib
    from matplotlib.figure import Figure

    answer: list[str] = []
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        yield axes.tolist(), answer
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    answer.append(text[text.index("<svg") :])  # without the XML declaration, which HTML does not take


def by_group(rows: Sequence[ModuleRow]) -> dict[str, list[ModuleRow]]:
    """Modules by the part of their name that is the same in all layers, in layer order."""
    groups: dict[str, list[ModuleRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups


@contextmanager
def _series(count: int, height: float) -> Iterator[tuple[list[Any], list[str]]]:
    """So many panels, four beside each other, in reading order."""
    columns = min(4, count)
    with _panels(-(-count // columns), columns, 2.7, height) as (axes, answer):
        flat = [ax for line in axes for ax in line]
        for ax in flat[count:]:
            ax.set_visible(False)
        yield flat[:count], answer


def _layers(rows: Sequence[ModuleRow]) -> list[int]:
    return [row.layer if row.layer is not None else at for at, row in enumerate(rows)]


def spectra(survey: Survey, names: Sequence[str]) -> str:
    """Singular values over the first one: median over the layers, and the range of the middle 80%."""
    groups = list(by_group(survey.modules).items())[:MAX_GROUPS]
    with _series(len(groups), 2.1) as (axes, answer):
        for ax, (group, rows) in zip(axes, groups, strict=True):
            for colour, name in zip(COLOURS * len(names), names, strict=False):
                curves = [[v / s.values[0] for v in s.values] for row in rows if (s := row.spectra[name]).norm]
                ordered = [sorted(column) for column in zip(*curves, strict=False)]
                x = range(1, len(ordered) + 1)
                ax.plot(x, [median(o) for o in ordered], color=colour, marker=".", ms=3, lw=1, label=name)
                low, high = ([o[int(share * (len(o) - 1))] for o in ordered] for share in (0.1, 0.9))
                ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
            ax.set(yscale="log", title=f"{group} ({len(rows)} layers)", xlabel="direction", ylabel="value / first")
        axes[0].legend(frameon=False, fontsize=7)
    return answer[0]


def heat_maps(pairs: Sequence[PairMean]) -> str:
    """phi(i, j), mean over the layers of a group: a row for each pair and group, a column for what is compared."""
    shown = list(pairs)[:MAX_ROWS]
    sides = [side for side in SIDES if any(side in pair.sums for pair in shown)]
    with _panels(len(shown), len(sides), 1.75, 1.75) as (axes, answer):
        image = None
        for line, pair in zip(axes, shown, strict=True):
            for ax, side in zip(line, sides, strict=True):
                if side not in pair.sums:
                    ax.set_visible(False)
                    continue
                phi = pair.mean(side).numpy()
                extent = (0.5, phi.shape[1] + 0.5, phi.shape[0] + 0.5, 0.5)
                image = ax.imshow(phi, vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
                ax.tick_params(labelsize=6)
                ax.set_title(f"{pair.group}\n{side}", fontsize=6.5)
            line[0].set_ylabel(f"i, {pair.names[0]}", fontsize=6.5)
            line[0].set_xlabel(f"j, {pair.names[1]}", fontsize=6.5)
        if image is not None:
            image.axes.figure.colorbar(image, ax=[ax for line in axes for ax in line], shrink=0.5, aspect=30)
    return answer[0]


def by_layer(survey: Survey, names: Sequence[str]) -> str:
    """Against the layer's number: the update's norm (over the weight's, where known), then its amplification factor."""
    known = [row for row in survey.modules if row.correlations]
    groups = list(by_group(known or survey.modules).items())[:MAX_GROUPS]
    with _series(len(groups) * (2 if known else 1), 1.9) as (axes, answer):
        for number, (group, rows) in enumerate(groups):
            for colour, name in zip(COLOURS * len(names), names, strict=False):
                style = {"color": colour, "marker": ".", "ms": 3, "lw": 1, "label": name}
                norms = [row.spectra[name].norm for row in rows]
                if known:
                    found = [row.correlations[name] for row in rows]
                    norms = [c.update_norm / c.weight_norm for c in found]
                    axes[len(groups) + number].plot(_layers(rows), [c.amplification for c in found], **style)
                    axes[len(groups) + number].set(title=f"{group}: amplification", xlabel="layer")
                axes[number].plot(_layers(rows), norms, **style)
            what = "||dW|| / ||W||" if known else "||dW||"
            axes[number].set(title=f"{group}: {what}", xlabel="layer", ylim=(0, None))
        axes[0].legend(frameon=False, fontsize=7)
    return answer[0]


def agreement(survey: Survey) -> str:
    """phi of all directions against the layer's number, on dW's output side, with the level of chance."""
    names = list(dict.fromkeys(pair.names for pair in survey.pairs))
    groups = list(by_group([row for row in survey.modules if row.pairs]).items())[:MAX_GROUPS]
    with _series(len(groups), 1.9) as (axes, answer):
        for ax, (group, rows) in zip(axes, groups, strict=True):
            for colour, pair in zip(COLOURS * len(names), names, strict=False):
                label, style = " and ".join(pair), {"color": colour, "lw": 1, "marker": ".", "ms": 3}
                ax.plot(_layers(rows), [row.pairs[pair][OUTPUT][1] for row in rows], label=label, **style)
                widest = max(len(rows[0].spectra[name].values) for name in pair)
                ax.axhline(widest / rows[0].shape[0], color=colour, lw=0.7, ls=":")
            ax.set(title=f"{group}: phi, dW, output side", xlabel="layer", ylim=(0, 1))
        axes[0].legend(frameon=False, fontsize=6)
    return answer[0]


def norms_over_steps(history: History) -> str:
    """Mean ||dW||_F over a group's layers against the step, a panel a run."""
    with _panels(1, len(history), 3.2, 2.0) as (axes, answer):
        for ax, (name, groups) in zip(axes[0], history.items(), strict=True):
            for colour, (group, points) in zip(COLOURS * len(groups), groups.items(), strict=False):
                ax.plot(*zip(*points, strict=True), color=colour, marker=".", lw=1, label=group)
            ax.set(title=f"{name}: mean ||dW||_F", xlabel="optimizer step", ylim=(0, None))
            ax.legend(frameon=False, fontsize=7)
    return answer[0]


def mean_by_group(
    rows: Sequence[tuple[int, str, float]], group_of: Mapping[str, str]
) -> dict[str, list[tuple[int, float]]]:
    """(step, module, value) as a curve of means for each group."""
    values: dict[str, dict[int, list[float]]] = {}
    for step, module, value in rows:
        values.setdefault(group_of[module], {}).setdefault(step, []).append(value)
    return {group: [(step, mean(found)) for step, found in steps.items()] for group, steps in values.items()}
