"""What the numbers of `lora-scale analyze` mean for choosing r and target_modules, in sentences made from them.

Every sentence follows from figures that stand on the same page; none says what another r or other
targets would do to the loss, which only a run tells.
"""

from collections.abc import Sequence
from statistics import median

from lora_scale.adapters.survey import OUTPUT, START, A, PairMean, Survey
from lora_scale.commands.analysis.figures import by_group
from lora_scale.commands.analysis.runs import Opened, judged_alike, same_but_for_seed

AGREE = 0.5  # phi from which two sets of directions are said to agree
NO_MORE = 1.5  # times chance up to which a correlation with the weight is not said to be one
FULL = 0.8  # share of r from which an effective rank is said to fill it


def conclusions(opened: Sequence[Opened], survey: Survey) -> list[str]:
    """Paragraphs, the plainest evidence first: loss, rank, what runs agree on, targets."""
    found = [_losses(opened), *(_rank(run.name, survey) for run in opened)]
    found += [_agreement(pair, opened, survey) for pair in dict.fromkeys(pair.names for pair in survey.pairs)]
    found.append(_targets(opened[-1].name, survey))
    return [text for text in found if text]


def _losses(opened: Sequence[Opened]) -> str:
    """The validation losses, and whether their differences exceed what another seed makes of the same run."""
    last = {run.name: losses[-1][1] for run in opened if (losses := run.val_losses)}
    if len(last) < 2:
        return ""
    best, worst = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
    text = f"Validation loss: {', '.join(f'{name} {loss:.4f}' for name, loss in last.items())}."
    if not judged_alike([run for run in opened if run.name in last]):
        return f"{text} They are not of the same rows (data.validation, data.seq_len, eval.max_blocks): not comparable."
    spreads = []
    for group in same_but_for_seed(opened):
        those = [last[run.name] for run in group if run.name in last]
        if len(those) > 1:
            spreads.append(max(those) - min(those))
    difference = last[worst] - last[best]
    if not spreads:
        return f"{text} No two runs differ in the seed alone, so how much of {difference:.4f} is chance is unknown."
    noise = max(spreads)
    if difference > noise:
        verdict = (
            f"{best} is better than {worst} by {difference:.4f}, {_times(difference, noise)} that; with so few seeds"
        )
        return (
            f"{text} Runs that differ in the seed alone lie {noise:.4f} apart; {verdict} this is a hint, not a proof."
        )
    return (
        f"{text} Runs that differ in the seed alone lie {noise:.4f} apart, as much as any two of these: "
        "their losses give no reason to prefer one."
    )


def _times(one: float, other: float) -> str:
    return f"{one / other:.1f} times" if other else "where seeds made no difference to"


def _rank(name: str, survey: Survey) -> str:
    spectra = [row.spectra[name] for row in survey.modules if row.spectra[name].norm]
    if not spectra:
        return ""
    r = max(s.r for s in spectra)
    middle, most = median(s.directions_90 for s in spectra), max(s.directions_90 for s in spectra)
    filled = median(s.effective_rank / s.r for s in spectra)
    text = (
        f"{name} (r = {r}): in the median module {middle:g} of {r} directions hold 90% of the update's squared norm, "
        f"at most {most}; the effective rank is {filled:.0%} of r."
    )
    if most <= r / 2:
        return f"{text} Rank {most} would hold 90% of every update found here: a smaller r is worth a run."
    if filled >= FULL:
        return f"{text} The updates fill their rank: nothing says that r is too large, and a larger one is worth a run."
    return f"{text} The rank is used unevenly over the modules: the spectrum alone decides neither way."


def _agreement(names: tuple[str, str], opened: Sequence[Opened], survey: Survey) -> str:
    """On dW's output side, which no initialisation determines; A beside its start, because A may hardly have moved."""
    means = [pair for pair in survey.pairs if pair.names == names]
    agreed = {pair.group: _agreeing(pair) for pair in means}
    whole = [pair.mean(OUTPUT)[-1, -1].item() / pair.expected(OUTPUT)[-1, -1].item() for pair in means]
    each = ", ".join(f"{count} in {group}" for group, count in agreed.items())
    text = (
        f"{names[0]} and {names[1]}: first directions that agree on dW's output side (mean phi of at least {AGREE:g}): "
        f"{each}; over all directions phi is {min(whole):.1f} to {max(whole):.1f} times chance."
    )
    if most := max(agreed.values()):
        shared = "one direction" if most == 1 else f"up to {most} directions"
        text += f" What both found again lies in {shared}; the rest of the rank differs from run to run."
    else:
        text += " None agrees by that much."
    seeds = {run.name: run.subject.seed for run in opened}
    if not all(START in pair.sums for pair in means):
        return text
    start, now = (max(pair.mean(side)[-1, -1].item() for pair in means) for side in (START, A))
    if seeds[names[0]] == seeds[names[1]]:
        return text + (
            f" Both have seed {seeds[names[0]]}, so their A began alike (phi {start:.2f} before training): that A and "
            "dW's input side agree says little."
        )
    return text + f" Over all directions A agrees by {now:.2f}, and did by {start:.2f} before training."


def _agreeing(pair: PairMean) -> int:
    """The largest n whose phi(n, n) is at least AGREE, and twice what chance gives."""
    both = zip(pair.mean(OUTPUT).diagonal().tolist(), pair.expected(OUTPUT).diagonal().tolist(), strict=True)
    return max((n for n, (phi, chance) in enumerate(both, start=1) if phi >= max(AGREE, 2 * chance)), default=0)


def _targets(name: str, survey: Survey) -> str:
    """Where the update is large beside the weight, and whether it goes where the weight does little."""
    groups = by_group([row for row in survey.modules if name in row.correlations])
    if not groups:
        return ""
    found = {group: [row.correlations[name] for row in rows] for group, rows in groups.items()}
    moved = {group: median(c.update_norm / c.weight_norm for c in rows) for group, rows in found.items()}
    share = {group: median(c.from_update / c.from_weight for c in rows) for group, rows in found.items()}
    beside_chance = {group: median(c.from_update / c.random_expected for c in rows) for group, rows in found.items()}
    order = sorted(moved, key=moved.__getitem__, reverse=True)
    each = "; ".join(
        f"{group} moved by {moved[group]:.2%} of its weight's norm, amplification "
        f"{median(c.amplification for c in found[group]):.2g}; there the weight does {share[group]:.0%} of what it "
        f"does in its strongest directions, {beside_chance[group]:.1f} times what it does in random ones"
        for group in order
    )
    if max(beside_chance.values()) < NO_MORE:
        each += ": the updates have nothing to do with what the weight does"
    elif max(share.values()) < AGREE:
        each += ": the updates lean on what the weight does, but do not repeat what it does most"
    return (
        f"{name}, medians over layers: {each}. How far a module moved says where training pushed, not what it paid: to "
        "choose target_modules, compare the validation loss of runs that adapt others at equal parameters."
    )
