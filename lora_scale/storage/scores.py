"""How completions compare with references: rouge-score, sacrebleu, and equality. No model, no ranks.

A row's scores are ROUGE-1, -2 and -L (F1, unstemmed) and exact match (surrounding white space aside); a set of rows
has their means with standard errors, and corpus BLEU.
"""

import importlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")


class Scorer:
    """The libraries, loaded: ModuleNotFoundError at once where one is missing, not after hours of generation."""

    def __init__(self) -> None:
        self._rouge = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(ROUGE), use_stemmer=False)
        self._bleu: Any = importlib.import_module("sacrebleu")

    def row(self, text: str, reference: str) -> dict[str, float]:
        """Scores of one completion, each from 0 to 1."""
        found = self._rouge.score(reference, text)
        scores = {name: found[name].fmeasure for name in ROUGE}
        return scores | {"exact_match": float(text.strip() == reference.strip())}

    def corpus(self, rows: Sequence[dict[str, float]], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """{score: {mean, standard_error}} of the rows' scores; `bleu` (0 to 100) of (text, reference) pairs."""
        summary: dict[str, Any] = {name: _mean([row[name] for row in rows]) for name in rows[0]}
        texts, references = ([pair[i].strip() for pair in pairs] for i in (0, 1))
        return {**summary, "bleu": self._bleu.corpus_bleu(texts, [references]).score, "rows": len(rows)}


def _mean(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "standard_error": spread}
