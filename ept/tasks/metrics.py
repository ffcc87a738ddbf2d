"""The one table of metrics, for own files and for the benchmarks; scikit-learn and scipy compute what they have."""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from ept.tasks.tagging import spans_of

__all__ = ["METRICS", "Answers", "is_better_higher", "metrics_of"]


class Answers(NamedTuple):
    """What is judged.

    Attributes:
        truth, predicted: class numbers, scores, texts, lists of zeros and ones (a one for each class of a row that has
            several), or lists of the words' labels, one a row.
        num_classes: how many classes there are; 0 where rows have none.
        averaged: the classes over whose F1 the mean is taken where there are more than two; None: those that occur.
        groups: the group of each row, for exact match; None: every row is its own.
    """

    truth: Sequence
    predicted: Sequence
    num_classes: int = 0
    averaged: Sequence[int] | None = None
    groups: Sequence[Hashable] | None = None


def metrics_of(names: Iterable[str], answers: Answers) -> dict[str, float]:
    """Computes the metrics of these names, in this order."""
    return {name: float(METRICS[name](answers)) for name in names}


def is_better_higher(name: str) -> bool:
    """Tells whether more of a metric, or of "loss", is better."""
    return name not in ("loss", "mse")


def _accuracy(answers: Answers) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(answers.truth, answers.predicted)


def _f1(answers: Answers) -> float:
    """F1 of the class 1 of two, or the mean of the classes' F1."""
    from sklearn.metrics import f1_score

    if answers.num_classes == 2:
        return f1_score(answers.truth, answers.predicted, zero_division=0.0)
    return f1_score(answers.truth, answers.predicted, average="macro", labels=answers.averaged, zero_division=0.0)


def _f1_of_several(average: str) -> Callable[[Answers], float]:
    """F1 over rows that have several classes: of all decisions together (micro), or the mean of the classes' (macro)."""

    def f1(answers: Answers) -> float:
        from sklearn.metrics import f1_score

        return f1_score(answers.truth, answers.predicted, average=average, zero_division=0.0)

    return f1


def _matthews(answers: Answers) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(answers.truth, answers.predicted)


def _mean_squared_error(answers: Answers) -> float:
    from sklearn.metrics import mean_squared_error

    return mean_squared_error(answers.truth, answers.predicted)


def _correlation(function: str) -> Callable[[Answers], float]:
    def correlation(answers: Answers) -> float:
        from scipy import stats

        if len(set(answers.truth)) < 2 or len(set(answers.predicted)) < 2:
            return 0.0  # a constant correlates with nothing
        return getattr(stats, function)(answers.truth, answers.predicted).statistic

    return correlation


def _exact_match(answers: Answers) -> float:
    """The share of groups whose rows are all right."""
    rights = defaultdict(list)
    groups = range(len(answers.truth)) if answers.groups is None else answers.groups
    for group, truth, predicted in zip(groups, answers.truth, answers.predicted, strict=True):
        rights[group].append(truth == predicted)
    return sum(map(all, rights.values())) / len(rights)


def _token_f1(answers: Answers) -> float:
    """Takes the mean of the rows' F1 over words, as SQuAD has it: without case, punctuation and articles."""
    scores = [_f1_of_words(truth, predicted) for truth, predicted in zip(answers.truth, answers.predicted, strict=True)]
    return sum(scores) / len(scores)


def _f1_of_words(truth: str, predicted: str) -> float:
    wanted, written = _words(truth), _words(predicted)
    if not wanted or not written:
        return float(wanted == written)
    both = (Counter(wanted) & Counter(written)).total()
    return 2 * both / (len(wanted) + len(written))


def _words(text: str) -> list[str]:
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _word_accuracy(answers: Answers) -> float:
    """The share of words whose label is right."""
    rows = zip(answers.truth, answers.predicted, strict=True)
    rights = [truth == predicted for row in rows for truth, predicted in zip(*row, strict=True)]
    return sum(rights) / len(rights) if rights else 0.0


def _of_entities(score: Callable[[int, int, int], float]) -> Callable[[Answers], float]:
    """A score of spans (`ept.tasks.tagging`): of how many are right, in the truth, and predicted; 0 where there are none."""

    def scored(answers: Answers) -> float:
        right = true = predicted = 0
        for rows in zip(answers.truth, answers.predicted, strict=True):
            true_spans, predicted_spans = (set(spans_of(row)) for row in rows)
            right += len(true_spans & predicted_spans)
            true, predicted = true + len(true_spans), predicted + len(predicted_spans)
        return score(right, true, predicted)

    return scored


METRICS: dict[str, Callable[[Answers], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "micro_f1": _f1_of_several("micro"),
    "macro_f1": _f1_of_several("macro"),
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
    "mse": _mean_squared_error,
    "exact_match": _exact_match,
    "token_f1": _token_f1,
    "entity_f1": _of_entities(
        lambda right, true, predicted: 2 * right / (true + predicted) if true + predicted else 0.0
    ),
    "entity_precision": _of_entities(lambda right, true, predicted: right / predicted if predicted else 0.0),
    "entity_recall": _of_entities(lambda right, true, predicted: right / true if true else 0.0),
    "word_accuracy": _word_accuracy,
}
