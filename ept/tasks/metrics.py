"""The metrics of each kind of task."""

from typing import Any

import torch

__all__ = ["METRICS", "best_metric", "metrics_of"]

# What an evaluation gives for each task, and whether more of it is better; first what tells the best checkpoint.
METRICS = {
    "classification": {"accuracy": True, "f1": True, "loss": False},
    "regression": {"pearson": True, "spearman": True, "mse": False, "loss": False},
    "text2text": {"loss": False, "exact_match": True},
    "continuation": {"accuracy": True, "f1": True},
}


def best_metric(task: str, wanted: str | None = None) -> tuple[str, bool]:
    """The metric that tells the best checkpoint (by default the paper's), and whether more of it is better."""
    metrics = METRICS[task]
    name = next(iter(metrics)) if wanted is None else wanted.removeprefix("eval_")
    if name not in metrics:
        raise ValueError(f"--metric_for_best_model {wanted} is unknown: {task} has {', '.join(metrics)}")
    return name, metrics[name]


def metrics_of(task: str, predictions: Any, labels: Any) -> dict[str, float]:
    """The task's metrics, the paper's first.

    Args:
        predictions: logits or label scores [rows, classes]; values [rows] or [rows, 1]; or generated texts.
        labels: class numbers [rows]; values [rows]; or texts.
    """
    if task == "text2text":
        same = [a.strip() == b.strip() for a, b in zip(predictions, labels, strict=True)]
        return {"exact_match": sum(same) / len(same)}
    predictions, labels = torch.as_tensor(predictions).float(), torch.as_tensor(labels)
    if task in ("classification", "continuation"):
        from sklearn.metrics import accuracy_score, f1_score

        chosen, two = predictions.argmax(-1), predictions.shape[-1] == 2
        f1 = f1_score(labels, chosen, average="binary" if two else "macro", zero_division=0.0)
        return {"accuracy": float(accuracy_score(labels, chosen)), "f1": float(f1)}
    from scipy.stats import pearsonr, spearmanr

    values, labels = predictions.flatten().double(), labels.double()
    mse = (values - labels).square().mean().item()
    if len(labels) < 2 or values.std() == 0 or labels.std() == 0:
        return {"pearson": 0.0, "spearman": 0.0, "mse": mse}  # a constant correlates with nothing
    return {
        "pearson": float(pearsonr(values, labels).statistic),
        "spearman": float(spearmanr(values, labels).statistic),
        "mse": mse,
    }
