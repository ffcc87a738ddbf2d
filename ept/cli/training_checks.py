"""Refuses options of transformers' TrainingArguments that would fail once the training has been paid for."""

from typing import Any

from huggingface_hub import get_token

from ept.tasks.kinds import CausalText2Text
from ept.tasks.task import Split, Task

__all__ = ["check_training_options"]


def check_training_options(args: Any, task: Task, splits: dict[str, Split]) -> None:
    """Raises ValueError if the arguments, as they are after `_complete_arguments`, do not go with the task or its rows.

    Args:
        splits: the rows by split; "train" may be a stream, whose number of rows is not known.
    """
    _check_evaluation(args, is_evaluated=len(splits) > 1)
    _check_rows(args, splits)
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise ValueError("--push_to_hub needs a token of the hub: hf auth login, or --hub_token")
    if args.debug and any(option.value == "underflow_overflow" for option in args.debug):
        raise ValueError("--debug underflow_overflow cannot look at masks of true and false, which the model has")
    if args.label_smoothing_factor and task.kind.name not in ("classification", "text2text"):
        of_causal = " of a causal model" if isinstance(task.kind, CausalText2Text) else ""
        raise ValueError(
            "--label_smoothing_factor is for classification and encoder-decoders, not for "
            f"{task.kind.asked_as}{of_causal}"
        )


def _check_evaluation(args: Any, *, is_evaluated: bool) -> None:
    metric = args.metric_for_best_model
    if is_evaluated and not args.eval_do_concat_batches:
        raise ValueError(
            "--eval_do_concat_batches false leaves the metrics batches in place of rows, which ends the first evaluation "
            "(ValueError: expected sequence of length …): leave it out"
        )
    if is_evaluated and args.batch_eval_metrics:
        raise ValueError("--batch_eval_metrics: the metrics are of all rows together, not of batches: leave it out")
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError("--load_best_model_at_end needs evaluations while training: --eval_strategy epoch or steps")
    if args.label_names is not None and list(args.label_names) != ["labels"]:
        raise ValueError(
            f"--label_names {' '.join(args.label_names)}: the rows' labels are called labels: leave it out"
        )
    if args.prediction_loss_only and metric is not None and metric.removeprefix("eval_") != "loss":
        raise ValueError(
            f"--prediction_loss_only leaves out {metric}, by which the best checkpoint is chosen: leave it out, or give "
            "--metric_for_best_model loss"
        )


def _check_rows(args: Any, splits: dict[str, Split]) -> None:
    if args.dataloader_persistent_workers and args.dataloader_num_workers < 1:
        raise ValueError("--dataloader_persistent_workers needs --dataloader_num_workers of at least 1")
    if not args.dataloader_drop_last:
        return
    if len(splits) > 1:
        raise ValueError("--dataloader_drop_last would leave rows out of the metrics, too: leave it out")
    rows, batch = splits["train"].data, args.train_batch_size * args.world_size
    if hasattr(rows, "__len__") and len(rows) < batch:
        raise ValueError(
            f"--dataloader_drop_last leaves none of {len(rows)} rows, which are less than a batch of {batch}"
        )
