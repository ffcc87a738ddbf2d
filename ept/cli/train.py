"""`ept train`: tunes a model on labelled rows and saves the adapter."""

import dataclasses
import itertools
import json
import math
import platform
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import is_liger_kernel_available

from ept.backbone.embeddings import weight_of
from ept.cli.shared import STEPS_NAME, _check_prompt_start, _compute_metrics, _label_names
from ept.console import bad_input_is_one_line, fail, say
from ept.files.adapter_dir import CONFIG_NAME, read_adapter
from ept.files.run_record import _write_record
from ept.model.fresh import get_ept_model
from ept.model.model import EPTModel
from ept.model.start_values import token_counts
from ept.peft_format import read_soft_prompt
from ept.version import __version__

__all__ = ["train"]


def train(argv: list[str]) -> None:
    """`ept train`: prepares everything, trains, evaluates, saves the adapter and the record of the run."""
    with bad_input_is_one_line("train"):
        from ept.data.streaming import StreamError

        trainer, problem, resume, test, record = _prepare_training(argv)
    output_dir = trainer.args.output_dir
    metrics: dict[str, float] = {}
    try:
        trainer.train(resume_from_checkpoint=resume)
        if trainer.terminated:
            say(f"stopped by SIGTERM after step {trainer.state.global_step}: go on with --resume_from_checkpoint true")
            raise SystemExit(128 + signal.SIGTERM)
        if trainer.eval_dataset is not None:
            metrics |= _loss_last(trainer.evaluate(), "eval_loss")
        if test is not None:
            trainer.compute_metrics = _compute_metrics(problem, test, trainer.processing_class)
            metrics |= _loss_last(trainer.evaluate(test.data, metric_key_prefix="test"), "test_loss")
        trainer.save_model(output_dir)
        trainer.save_state()
        record |= {"metrics": metrics, "steps": trainer.state.global_step}
        if trainer.is_world_process_zero():
            _write_record(output_dir, record)
    except (FloatingPointError, OSError, StreamError) as error:
        # The training diverged (what save_pretrained refuses, nothing overwrites), a file cannot be written, or a row
        # that is read while training cannot be trained on.
        fail("train", str(error))
    if trainer.is_world_process_zero():
        say(f"saved the adapter in {output_dir}")
        print(json.dumps(metrics))


def _loss_last(metrics: dict[str, float], loss: str) -> dict[str, float]:
    """An evaluation's metrics with the task's own first, where transformers puts the loss."""
    return dict(sorted(metrics.items(), key=lambda item: item[0] == loss))


def _prepare_training(argv: list[str]) -> tuple[Any, Any, str | None, Any, dict[str, Any]]:
    """From the command line to a trainer, the problem, the checkpoint to resume from, the test split and the record."""
    from ept.backbone.loading import input_limit, load_backbone, load_tokenizer
    from ept.cli.options import ept_config, train_parser

    chosen = _given(argv)
    if _wants_best_model(chosen) and not chosen.keys() & {"validation_file", "dataset_name", "task_name"}:
        raise ValueError("--load_best_model_at_end needs a --validation_file to judge by")
    model_args, files, columns, sizes, run, args = train_parser().parse(argv + _strategies(chosen))
    if "output_dir" not in chosen:
        raise ValueError("say where the adapter goes with --output_dir")
    resume = _checkpoint(args.output_dir, args.resume_from_checkpoint)
    if resume is None and not run.overwrite_output_dir and args.resume_from_checkpoint != "auto":
        _refuse_used(args.output_dir)
    if run.early_stopping_patience is not None and not args.load_best_model_at_end:
        raise ValueError("--early_stopping_patience needs --load_best_model_at_end, and --validation_file to judge by")

    stream = _stream(files, columns.no_header, args) if files.streaming else None
    problem, tables = _read_problem(model_args, files, columns, stream)
    task = problem.kind
    if args.eval_strategy != "no" and "validation" not in tables:
        raise ValueError(f"--eval_strategy {args.eval_strategy.value} needs a --validation_file")
    if args.eval_on_start and "validation" not in tables:
        raise ValueError("--eval_on_start needs a --validation_file")

    transformers.set_seed(args.seed)
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    backbone = load_backbone(
        model_args.model_name_or_path,
        task,
        problem.label_names and list(problem.label_names),
        head=model_args.head,
        dtype=model_args.dtype,
    )
    if backbone.config.pad_token_id is None:
        backbone.config.pad_token_id = tokenizer.pad_token_id
    config = ept_config(sizes, backbone)
    limit = input_limit(backbone, tokenizer, config.prompt_length, columns.max_seq_length)
    splits = {
        split: problem.encode(table, source, tokenizer, limit, columns.max_target_length)
        for split, (table, source) in tables.items()
    }
    data = {name: split.data for name, split in splits.items()}
    counts = None
    if config.init == "vocab":
        counts = token_counts(data["train"]["input_ids"], len(weight_of(backbone.get_input_embeddings())))
    soft_prompt = None if sizes.soft_prompt is None else read_soft_prompt(sizes.soft_prompt)
    model = get_ept_model(backbone, config, tokenizer=tokenizer, token_counts=counts, soft_prompt=soft_prompt)
    if soft_prompt is not None:
        say(f"{sizes.soft_prompt}: decomposed with a relative error of {model.ept.decomposition_error:.3g}")
    for split, rows in data.items():
        _check_prompt_start(model, rows, tables[split][1])
    said = {split: f"{len(rows)} {split} rows" for split, rows in data.items()}
    if stream is not None:
        from ept.data.labels import Labels
        from ept.data.streaming import TokenStream

        splits["train"].data = TokenStream(
            stream, problem.columns, None if task == "text2text" else Labels(problem.label_names), tokenizer,
            max_length=limit, max_target_length=columns.max_target_length,
            batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            shuffle_buffer=files.shuffle_buffer, seed=args.seed, shortest=model.ept.prompt_start,
        )  # fmt: skip
        said["train"] = "streamed train rows"
    if resume is not None:
        _check_same_run(resume, model)

    if "metric_for_best_model" in chosen or args.load_best_model_at_end:
        args.metric_for_best_model, more_is_better = problem.best_metric(chosen.get("metric_for_best_model"))
        if "greater_is_better" not in chosen:
            args.greater_is_better = more_is_better
    args.restore_callback_states_from_checkpoint = resume is not None  # early stopping counts on
    args.dataloader_pin_memory &= torch.cuda.is_available()
    if "predict_with_generate" not in chosen:
        args.predict_with_generate = task == "text2text"
    if args.generation_max_length is None:
        args.generation_max_length = columns.max_target_length
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs liger-kernel: pip install liger-kernel, or leave it out")
    trainer = _trainer(model, args, splits, tokenizer, problem, run.early_stopping_patience)
    model.gate_weights()  # an implementation that cannot run here says so
    _try_optimizer(trainer)
    if resume is None and run.overwrite_output_dir and args.should_save:
        for checkpoint in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    say(f"{task}: " + ", ".join(said.values()))
    model.print_trainable_parameters()
    record = {
        "command": shlex.join(["ept", "train", *argv]),
        "task": task,
        "task_name": None if problem.benchmark is None else problem.benchmark.name,
        "label_words": list(problem.label_names) if task == "continuation" else None,
        "columns": dataclasses.asdict(problem.columns),
        "no_header": columns.no_header,
        "max_seq_length": limit,
        "seed": args.seed,
        "trained_parameters": model.trainable_parameters(),
        "versions": {
            "ept": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    return trainer, problem, resume, splits.get("test"), record


def _given(argv: list[str]) -> dict[str, str]:
    """The options that the user gave, by name, with the word after each."""
    given = {}
    for word, after in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if word.startswith("--"):
            name, is_joined, value = word.removeprefix("--").partition("=")
            given[name.replace("-", "_")] = value if is_joined else after
    return given


def _wants_best_model(chosen: dict[str, str]) -> bool:
    """Whether --load_best_model_at_end is among the options, and not with a word that transformers takes for false."""
    return chosen.get("load_best_model_at_end", "false").lower() not in ("false", "f", "no", "n", "0")


def _strategies(chosen: dict[str, str]) -> list[str]:
    """With rows to validate on, evaluation each epoch unless said; the best model needs checkpoints where it is judged."""
    evaluate = chosen.get("eval_strategy") or ("steps" if "eval_steps" in chosen else "epoch")
    extra = []
    if "eval_strategy" not in chosen and ("validation_file" in chosen or _wants_best_model(chosen)):
        extra += ["--eval_strategy", evaluate]
    if "save_strategy" not in chosen and _wants_best_model(chosen):
        extra += ["--save_strategy", evaluate]
    return extra


def _checkpoint(output_dir: str, wanted: str | None) -> str | None:
    """The directory to resume from (None: from the start); ValueError if it is not a whole checkpoint."""
    from ept.training.checkpoints import last_checkpoint

    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() in ("true", "auto"):
        found = last_checkpoint(output_dir)
        if found is None and wanted.lower() == "true":
            raise ValueError(
                f"{output_dir} holds no whole checkpoint to resume from: leave out --resume_from_checkpoint"
            )
        return found
    if not (Path(wanted) / STEPS_NAME).is_file():
        raise ValueError(f"{wanted} is not a whole checkpoint: it has no {STEPS_NAME}")
    return wanted


def _refuse_used(output_dir: str) -> None:
    path = Path(output_dir)
    if path.is_file():
        raise ValueError(f"--output_dir {output_dir} is a file: give a directory")
    if not path.is_dir() or not any(path.iterdir()):
        return
    held = "holds another run" if (path / CONFIG_NAME).is_file() or any(path.glob("checkpoint-*")) else "is not empty"
    raise ValueError(
        f"--output_dir {output_dir} {held}: go on with it (--resume_from_checkpoint true), give another directory, "
        "or write over it (--overwrite_output_dir)"
    )


def _check_same_run(checkpoint: str, model: EPTModel) -> None:
    """ValueError if a checkpoint's adapter has other sizes or labels than the one that is to go on from it."""
    saved = read_adapter(checkpoint)[0]
    own = model.ept_config.to_dict()
    for name, value in own.items():
        if saved.get(name) != value:
            raise ValueError(f"{checkpoint} was trained with {name} {saved.get(name)}, not {value}: resume as it began")
    names = _label_names(model)
    if model.head_names and saved.get("label_names") != names:
        raise ValueError(f"{checkpoint} was trained with the labels {saved.get('label_names')}, not {names}")


def _stream(files: Any, no_header: bool, args: Any) -> Any:
    """The training rows as a RowStream; ValueError if the other options do not go with one."""
    from ept.data.streaming import RowStream

    if args.max_steps < 1:
        raise ValueError("--streaming needs --max_steps: how many rows there are is not known before the end")
    if args.dataloader_num_workers > 1:
        raise ValueError("--streaming reads in one process: --dataloader_num_workers 0 or 1")
    # Every process reads the stream and takes its rows of each batch; by default one reads and sends whole batches of
    # one shape, which batches of text are not.
    args.accelerator_config.dispatch_batches = False
    if files.train_file is not None:
        return RowStream(files.train_file, header=not no_header)
    if files.dataset_name is None:
        raise ValueError("say what to train on with --train_file (or --dataset_name)")
    return RowStream(f"{files.dataset_name} (train)", hub=(files.dataset_name, files.dataset_config_name, "train"))


def _read_tables(files: Any, no_header: bool, stream: Any) -> dict[str, tuple[Any, str]]:
    """The rows and their source by split; "train" is always there, of a stream its first rows."""
    from ept.data.tables import read_file, read_hub

    tables = {}
    if stream is not None:
        tables["train"] = (stream.head(files.shuffle_buffer), stream.source)
    for split in ("train", "validation", "test"):
        if split in tables:
            continue
        path = getattr(files, f"{split}_file")
        if path is not None:
            tables[split] = (read_file(path, header=not no_header), path)
        elif files.dataset_name is not None:
            table = read_hub(files.dataset_name, files.dataset_config_name, split)
            if table is not None:
                tables[split] = (table, f"{files.dataset_name} ({split})")
    if "train" not in tables:
        raise ValueError("say what to train on with --train_file (or --dataset_name)")
    return tables


def _read_problem(model_args: Any, files: Any, given: Any, stream: Any) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """What is to be learned, and the rows and their source by split: of own files, or of a benchmark's task."""
    from ept.backbone.loading import is_causal, is_text_to_text
    from ept.data.tables import Columns, choose_columns
    from ept.tasks.glue import benchmark_task
    from ept.tasks.glue_files import read_benchmark
    from ept.tasks.task import Problem

    kind = model_args.task or ("text2text" if is_text_to_text(model_args.model_name_or_path) else None)
    if files.task_name is not None:
        if files.train_file or files.validation_file or files.test_file or files.dataset_name:
            raise ValueError(
                "--task_name brings its own rows: give --data_dir (or nothing, for the hub's), no other data"
            )
        if stream is not None:
            raise ValueError("--streaming reads own files: leave it out with --task_name")
        if kind is None and is_causal(model_args.model_name_or_path):
            kind = "continuation"
        task = benchmark_task(files.task_name)
        return Problem.of_benchmark(task, kind), read_benchmark(task, files.data_dir, ("train", "validation"))
    if files.data_dir is not None:
        raise ValueError("--data_dir holds a benchmark's task: say which with --task_name")
    if stream is not None and kind == "continuation":
        raise ValueError("--streaming does not know --task continuation: leave one of them out")
    tables = _read_tables(files, given.no_header, stream)
    wanted = Columns(given.text_column, given.text_pair_column, given.label_column)
    problem = Problem.of_table(*tables["train"], wanted, kind, stream)
    for other, name in tables.values():
        choose_columns(other, name, problem.columns)
    return problem, tables


def _trainer(
    model: EPTModel, args: Any, splits: dict[str, Any], tokenizer: Any, problem: Any, patience: int | None
) -> Any:
    from transformers import EarlyStoppingCallback

    from ept.training.trainer import EPTContinuationTrainer, EPTSeq2SeqTrainer, EPTTrainer

    validation = splits.get("validation")
    trainer = {"text2text": EPTSeq2SeqTrainer, "continuation": EPTContinuationTrainer}.get(problem.kind, EPTTrainer)
    return trainer(
        model,
        args,
        train_dataset=splits["train"].data,
        eval_dataset=None if validation is None else validation.data,
        data_collator=problem.collator(tokenizer),
        processing_class=tokenizer,
        compute_metrics=None if validation is None else _compute_metrics(problem, validation, tokenizer),
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )


def _try_optimizer(trainer: Any) -> None:
    """ValueError if the optimiser or its schedule cannot be made; the trainer makes its own when it trains."""
    args = trainer.args
    if args.optim_args and not all(word.count("=") == 1 for word in args.optim_args.split(",")):
        raise ValueError(f"--optim_args {args.optim_args} must be name=value, with commas between several")
    if not isinstance(args.lr_scheduler_kwargs, dict | None):
        raise ValueError(
            f"--lr_scheduler_kwargs {args.lr_scheduler_kwargs} must be a JSON object with names and values"
        )
    try:
        optimizer = trainer.create_optimizer()
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"--optim {args.optim.value}: {error}") from error
    trainer.optimizer = None
    steps = args.max_steps
    if steps < 0:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = math.ceil(args.num_train_epochs * math.ceil(len(trainer.train_dataset) / rows))
    warmup, said = args.get_warmup_steps(steps), f"--lr_scheduler_type {args.lr_scheduler_type.value}"
    try:
        schedule = transformers.get_scheduler(
            args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs
        )
        for factor in getattr(schedule, "lr_lambdas", []):
            factor(steps)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{said}: {error} (--lr_scheduler_kwargs '{{\"name\": value}}')") from error
    except ZeroDivisionError as error:
        raise ValueError(
            f"{said}: {warmup} of {steps} steps are warm-up, which leaves none: --warmup_steps 0"
        ) from error
