"""`ept train`: tunes a model on labelled rows and saves the adapter."""

import dataclasses
import json
import platform
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ept.backbone.embeddings import weight_of
from ept.backbone.loading import input_limit, load_tokenizer, pad_like_tokenizer
from ept.backbone.precision import precision_for
from ept.cli.errors import bad_input_is_one_line, fail
from ept.cli.init_adapters import init_rows, read_sources, start_in_words
from ept.cli.optimizer_check import check_optimizer
from ept.cli.options import ept_config
from ept.cli.shared import check_prompt_start
from ept.cli.train_data import TrainingData, read_training_data, token_stream
from ept.cli.train_options import TrainOptions, parse_train_options
from ept.cli.training_checks import check_training_options
from ept.config import EPTConfig
from ept.console import say
from ept.data.streaming import StreamError
from ept.files.adapter_dir import CONFIG_NAME
from ept.files.run_record import write_record
from ept.model.fresh import get_ept_model
from ept.model.model import EPTModel
from ept.model.start_values import token_counts
from ept.peft_format import read_soft_prompt
from ept.tasks.task import Split, Task
from ept.training.checkpoints import StartNote, check_same_adapter, is_whole, last_checkpoint, noted_start
from ept.training.trainer import TRAINERS
from ept.version import __version__

__all__ = ["run"]


def run(argv: list[str]) -> None:
    """`ept train`: prepares everything, trains, evaluates, saves the adapter and the record of the run."""
    with bad_input_is_one_line("train"):
        training = _prepare(parse_train_options(argv))
    trainer = training.trainer
    try:
        trainer.train(resume_from_checkpoint=training.checkpoint)
        if trainer.terminated:
            say(f"stopped by SIGTERM after step {trainer.state.global_step}: go on with --resume_from_checkpoint true")
            raise SystemExit(128 + signal.SIGTERM)
        # Before the last evaluation, so that nothing that is trained is lost if that fails.
        trainer.save_model(trainer.args.output_dir, _internal_call=True)
        _write_record(training, {})
        metrics = _evaluate(training)
        trainer.save_state()
        _write_record(training, metrics)
    except (FloatingPointError, OSError, StreamError) as error:
        # The training diverged (what save_pretrained refuses, nothing overwrites), a file cannot be written, or a row
        # that is read while training cannot be trained on.
        fail("train", str(error))
    if trainer.is_world_process_zero():
        say(f"saved the adapter in {trainer.args.output_dir}")
        print(json.dumps(metrics))
    if trainer.args.push_to_hub:
        try:
            trainer.push_to_hub()
        except OSError as error:
            fail("train", f"{error}; the adapter is saved in {trainer.args.output_dir}")


@dataclass(frozen=True)
class _Training:
    """A training that is ready to begin: the checkpoint to go on from, and the run's record so far."""

    trainer: Any
    task: Task
    checkpoint: str | None
    test: Split | None
    record: dict[str, Any]


def _prepare(options: TrainOptions) -> _Training:
    """Makes a trainer from the options; all that can be wrong is found here, before the first step."""
    args: Any = options.training
    checkpoint = _checkpoint(options)
    sources = read_sources(options.adapter.init_adapters or ()) if checkpoint is None else []
    data = read_training_data(options)
    _check_validation(options, data)
    transformers.set_seed(args.seed)
    tokenizer = load_tokenizer(options.model.model_name_or_path)
    backbone = data.task.kind.load_backbone(
        options.model.model_name_or_path, head=options.model.head, dtype=options.model.dtype
    )
    if args.bf16 and (attention := precision_for("bfloat16", None).attention) is not None:
        backbone.set_attn_implementation(attention)
    pad_like_tokenizer(backbone, tokenizer)
    for source in sources:
        source.check_backbone(backbone)
    config = ept_config(options.adapter, backbone, checkpoint)
    max_length = input_limit(backbone, tokenizer, config.prompt_length, options.columns.max_seq_length)
    max_length, multiple = _few_lengths(max_length) if args.torch_compile else (max_length, None)
    splits = {
        name: data.task.encode(table, source, tokenizer, max_length, options.columns.max_target_length)
        for name, (table, source) in data.tables.items()
    }
    model = _fresh_model(options, config, backbone, tokenizer, splits["train"], data.task, checkpoint)
    for split in splits.values():
        check_prompt_start(model, split.data, split.source)
    sizes = {name: f"{len(split.data)} {name} rows" for name, split in splits.items()}
    if data.stream is not None:
        splits["train"].data = token_stream(data, options, tokenizer, max_length, model.ept.prompt_start)
        sizes["train"] = "streamed train rows"
    if options.data.packing:
        splits["train"].data = _packed(data.task, splits["train"], model, max_length)
        sizes["train"] += f" packed into {len(splits['train'].data)}"
    if checkpoint is not None:
        check_same_adapter(checkpoint, model)
    _complete_arguments(options, data.task, max_length, resumes=checkpoint is not None)
    check_training_options(args, data.task, splits)
    trainer = _trainer(
        model, options, data.task, splits, data.task.kind.collator(tokenizer, model, multiple), tokenizer
    )
    model.gate_weights()  # an implementation that cannot run here says so
    check_optimizer(trainer)
    if checkpoint is None and options.run.overwrite_output_dir and args.should_save:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)
    say(f"{data.task.kind.asked_as}: {', '.join(sizes.values())}")
    model.print_trainable_parameters()
    say(f"learning rates: {trainer.rates_in_words()}")
    return _Training(trainer, data.task, checkpoint, splits.get("test"), _record(options, data.task, model, max_length))


COMPILED_STEP = 32  # tokens between the lengths of compiled batches, about: few lengths, and little padding for a GPU


def _few_lengths(max_length: int | None) -> tuple[int | None, int]:
    """Returns the most tokens of a text and what its padded length is a multiple of, for a compiled model.

    A captured step is one of a length, so that few lengths may occur; and no padded text may be longer than the limit.
    """
    if max_length is None:
        return None, COMPILED_STEP
    lengths = -(-max_length // COMPILED_STEP)
    multiple = max_length // lengths
    cut = f", and cut to {lengths * multiple}" if lengths * multiple < max_length else ""
    say(f"compiled: texts are padded to multiples of {multiple} tokens{cut}")
    return lengths * multiple, multiple


def _packed(task: Task, train: Split, model: EPTModel, max_length: int | None) -> Any:
    """Packs the training rows; ValueError where the task or the backbone cannot have several in a row."""
    if max_length is None:
        raise ValueError("--packing fills rows of --max_seq_length tokens: give it, since the model has no limit")
    prompt_length = model.ept_config.prompt_length
    rows = task.kind.packed(train.data, max_length + prompt_length, prompt_length)
    two = torch.zeros(1, 2, dtype=torch.int64)
    with torch.no_grad():
        model(input_ids=two, position_ids=two)  # a backbone in which they would see each other says so
    return rows


def _checkpoint(options: TrainOptions) -> str | None:
    """Returns the checkpoint to go on from, or None for the start.

    Raises:
        ValueError: it is not whole, or a new run would be written over another one.
    """
    output_dir, wanted = str(options.training.output_dir), options.training.resume_from_checkpoint or "false"
    if wanted.lower() not in ("true", "auto", "false"):
        if not is_whole(wanted):
            raise ValueError(f"{wanted} is not a whole checkpoint: it has no whole trainer_state.json")
        return wanted
    checkpoint = None if wanted.lower() == "false" else last_checkpoint(output_dir)
    if checkpoint is None and wanted.lower() == "true":
        raise ValueError(f"{output_dir} holds no whole checkpoint to resume from: leave out --resume_from_checkpoint")
    if checkpoint is None and not options.run.overwrite_output_dir and wanted.lower() != "auto":
        _refuse_used(output_dir)
    return checkpoint


def _refuse_used(output_dir: str) -> None:
    """Raises ValueError if a directory holds anything."""
    path = Path(output_dir)
    if path.is_file():
        raise ValueError(f"--output_dir {output_dir} is a file: give a directory")
    if not path.is_dir() or not any(path.iterdir()):
        return
    is_run = (path / CONFIG_NAME).is_file() or any(path.glob("checkpoint-*"))
    raise ValueError(
        f"--output_dir {output_dir} {'holds another run' if is_run else 'is not empty'}: go on with it "
        "(--resume_from_checkpoint true), give another directory, or write over it (--overwrite_output_dir)"
    )


def _check_validation(options: TrainOptions, data: TrainingData) -> None:
    """Raises ValueError if an evaluation is asked for and there are no rows for it."""
    args: Any = options.training
    if "validation" in data.tables:
        return
    if args.eval_strategy != "no":
        raise ValueError(f"--eval_strategy {args.eval_strategy.value} needs a --validation_file")
    if args.eval_on_start:
        raise ValueError("--eval_on_start needs a --validation_file")


def _fresh_model(
    options: TrainOptions,
    config: EPTConfig,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Split,
    task: Task,
    checkpoint: str | None,
) -> EPTModel:
    """Puts a fresh adapter on the backbone, which starts as the options say.

    Where it goes on from a checkpoint of a run that started from trained ones, these stay what it started from, as
    far as the checkpoint says them.
    """
    counts = None
    if config.init == "vocab":
        counts = token_counts(train.data["input_ids"], len(weight_of(backbone.get_input_embeddings())))
    path = options.adapter.soft_prompt
    soft_prompt = None if path is None else read_soft_prompt(path)
    sources, rows = None, None
    if config.init == "adapters":
        sources = options.adapter.init_adapters if checkpoint is None else [checkpoint]
        if checkpoint is None:
            collate = task.kind.collator(tokenizer, backbone)
            rows = init_rows(task, train.data, len(sources), collate, options.training.seed)
    model = get_ept_model(
        backbone,
        config,
        tokenizer=tokenizer,
        token_counts=counts,
        soft_prompt=soft_prompt,
        init_adapters=sources,
        init_rows=rows,
    )
    if soft_prompt is not None:
        say(f"{path}: decomposed with a relative error of {model.ept.decomposition_error:.3g}")
    if sources is not None:
        if checkpoint is None:
            say(start_in_words(model))
        else:
            model.started_from = noted_start(checkpoint)
    return model


def _complete_arguments(options: TrainOptions, task: Task, max_length: int | None, *, resumes: bool) -> None:
    """Sets the training arguments that depend on the task, unless the user did; ValueError if one does not go with it."""
    args: Any = options.training
    if args.metric_for_best_model is not None:  # also transformers' "loss", which not every task has
        metric, more_is_better = task.best_metric(options.explicit.get("metric_for_best_model"))
        args.metric_for_best_model = metric
        if "greater_is_better" not in options.explicit:
            args.greater_is_better = more_is_better
    args.restore_callback_states_from_checkpoint = resumes  # early stopping counts on
    if "predict_with_generate" not in options.explicit:
        args.predict_with_generate = task.kind.writes_text
    if args.generation_max_length is None:
        args.generation_max_length = task.kind.target_limit(max_length, options.columns.max_target_length)
    if args.generation_max_length > task.kind.target_limit(max_length, args.generation_max_length):
        raise ValueError(
            f"--generation_max_length {args.generation_max_length} does not fit in {max_length} tokens a row"
        )


def _trainer(
    model: EPTModel,
    options: TrainOptions,
    task: Task,
    splits: dict[str, Split],
    collator: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> Any:
    validation = splits.get("validation")
    callbacks: list[TrainerCallback] = []
    if options.run.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(options.run.early_stopping_patience))
    if model.started_from is not None:
        callbacks.append(StartNote(dataclasses.asdict(model.started_from)))
    trainer_class: Any = TRAINERS[task.kind.name]
    return trainer_class(
        model,
        options.training,
        train_dataset=splits["train"].data,
        eval_dataset=None if validation is None else validation.data,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=None if validation is None else task.compute_metrics(validation, tokenizer),
        callbacks=callbacks,
    )


def _record(options: TrainOptions, task: Task, model: EPTModel, max_length: int | None) -> dict[str, Any]:
    """Returns what run.json says of a run, but for what only its end shows."""
    command = shlex.join(["ept", "train", *options.argv])
    token = options.training.hub_token
    return {
        "command": command.replace(token, "<HUB_TOKEN>") if token else command,
        "task": task.kind.asked_as,
        "task_name": None if task.benchmark is None else task.benchmark.name,
        "label_words": task.kind.recorded_words,
        "reads_chat": task.kind.reads_chat,
        "columns": dataclasses.asdict(task.columns),
        "no_header": options.columns.no_header,
        "max_seq_length": max_length,
        "seed": options.training.seed,
        "trained_parameters": model.trainable_parameters(),
        "layer_rate": model.layer_rate,
        "started_from": None if model.started_from is None else dataclasses.asdict(model.started_from),
        "versions": {
            "ept": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _evaluate(training: _Training) -> dict[str, float]:
    """Returns the metrics on the validation rows and the test rows, of those that there are."""
    trainer = training.trainer
    metrics: dict[str, float] = {}
    if trainer.eval_dataset is not None:
        metrics |= _loss_last(trainer.final_metrics(), "eval_loss")
    if training.test is not None:
        trainer.compute_metrics = training.task.compute_metrics(training.test, trainer.processing_class)
        metrics |= _loss_last(trainer.evaluate(training.test.data, metric_key_prefix="test"), "test_loss")
    return metrics


def _loss_last(metrics: dict[str, float], loss: str) -> dict[str, float]:
    """Puts an evaluation's metrics in the task's order, the loss last; transformers puts it first."""
    return dict(sorted(metrics.items(), key=lambda item: item[0] == loss))


def _write_record(training: _Training, metrics: dict[str, float]) -> None:
    trainer = training.trainer
    if trainer.is_world_process_zero():
        record = training.record | {"metrics": metrics, "steps": trainer.state.global_step}
        write_record(trainer.args.output_dir, record)
