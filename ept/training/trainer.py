"""The trainers: transformers' own with three differences, and the table of them by kind of task.

Every part of EPT has its own learning rate, checkpoints hold the adapter instead of the backbone, and each evaluation
logs the gate.
"""

import copy
import logging
import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer, TrainerState
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ept.files.adapter_dir import read_adapter
from ept.files.hub import hub_errors, upload
from ept.model.model import EPTModel
from ept.sharding import load_optimizer_state, whole_optimizer_state
from ept.tasks.continuation import ContinuationCollator, label_scores
from ept.tasks.kinds import (
    CausalText2Text,
    Classification,
    Continuation,
    MultiLabel,
    Regression,
    Text2Text,
    TokenClassification,
)
from ept.tasks.predicting import written_answers
from ept.tasks.writing import prompt_of
from ept.training.checkpoints import last_checkpoint
from ept.training.health import gate_health
from ept.training.rates import (
    EPTArguments,
    EPTSeq2SeqTrainingArguments,
    EPTTrainingArguments,
    merged,
    parameter_groups,
    regrouped,
)
from ept.training.sampling import LengthGroupedByEpoch, check_tokenised, knows_lengths
from ept.training.stopping import StopOnSignal

__all__ = ["TRAINERS", "EPTContinuationTrainer", "EPTSeq2SeqTrainer", "EPTTrainer", "EPTWritingTrainer"]

logger = logging.getLogger("ept")


class _EPTTrainerMixin(Trainer):
    """What every trainer here adds to transformers' own."""

    model: EPTModel
    args: EPTTrainingArguments | EPTSeq2SeqTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        self._has_rates_by_part = False
        self._rates_now: dict[str, float] = {}  # by part, when transformers last asked for the learning rate
        self._evaluations: dict[int, dict[str, float]] = {}  # metrics on `eval_dataset` by step of this training
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, EPTModel):
            raise TypeError(
                f"{type(self).__name__} trains an EPTModel, not {type(self.model).__name__}: see get_ept_model"
            )
        if not isinstance(self.args, EPTArguments):
            raise TypeError(
                f"{type(self).__name__} needs EPT's learning rates: give it EPTTrainingArguments (or the Seq2Seq form), "
                f"not {type(self.args).__name__}"
            )
        if self.args.bf16_full_eval or self.args.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval would round the trained tensors: load the backbone in half precision "
                "instead, what is trained stays fp32"
            )
        rows_by_name = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        for name, rows in rows_by_name.items():
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                check_tokenised(part, name, self.data_collator)
        if self.args.label_smoothing_factor:
            _check_label_smoothing(self.model)
        if self.args.torch_compile:
            # One compilation for all batches and lengths; by itself torch compiles the first of them alone.
            self.accelerator.state.dynamo_plugin.dynamic = True
        self._stop = StopOnSignal()
        self.add_callback(self._stop)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the optimiser that `args.optim` names, over `parameter_groups`: those of one rate and decay together."""
        if self.optimizer is None:
            model_here: Any = self.model  # not a PreTrainedModel, but asked for its modules alone
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model_here)
            rates = {f"{part}_learning_rate": rate for part, rate in self.args.rates(self._layer_rate()).items()}
            groups = parameter_groups(self.model, **rates, weight_decay=self.args.weight_decay)
            self.optimizer = optimizer_class(merged(groups), **settings)
            for group in self.optimizer.param_groups:
                group["initial_lr"] = group["lr"]  # as most schedules note it, but not all
            self._has_rates_by_part = True
            logger.info("learning rates: %s", self.rates_in_words())
        return self.optimizer

    def _drop_optimizer_of_others(self) -> None:
        """Lets the trainer's own optimiser go where the active adapter trains tensors that it lacks.

        Raises ValueError where an optimiser that the caller made holds none of them.
        """
        if self.optimizer is None:
            return
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if not self._has_rates_by_part:
            if not self.is_deepspeed_enabled and trained.isdisjoint(_held(self.optimizer)):
                raise ValueError(
                    f"the optimiser holds no tensor that the active adapter {self.model.active_adapter!r} trains: make one of "
                    "its tensors, or set the trainer's optimizer and lr_scheduler to None for its own"
                )
        elif not trained or not trained <= _held(self.optimizer):
            self.optimizer = None
            if self.accelerator.num_processes > 1:
                # DDP sums the gradients of the tensors that trained when it was made.
                self.model_wrapped = self.model

    def _layer_rate(self) -> float:
        """The model's `layer_rate` as the first process measured it, so that all processes step alike."""
        found = [self.model.layer_rate]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found, from_process=0)
        return found[0]

    def rates_in_words(self) -> str:
        """The peak learning rate of each part that is trained."""
        rates = self.args.rates(self.model.layer_rate)
        parts = [part for group in parameter_groups(self.model) for part in group["parts"]]
        words = {part: f"{part} {rates[part]:g}" for part in dict.fromkeys(parts)}
        if self.model.layer_rate < 1 and self.args.deep_learning_rate is None:
            words["deep"] += f" ({self.model.layer_rate:g} times the usual on this backbone)"
        return ", ".join(words.values())

    def _get_learning_rate(self) -> float:
        """Returns `learning_rate` where its schedule is; transformers takes the first group's, which is the prompt's."""
        if not self._has_rates_by_part:
            return super()._get_learning_rate()
        groups = self._optimizer_and_schedule()[0].param_groups
        self._rates_now = {f"{part}_learning_rate": float(group["lr"]) for group in groups for part in group["parts"]}
        group = max(groups, key=lambda group: group.get("initial_lr", 0.0))
        peak = group.get("initial_lr", 0.0)  # an optimiser from an older checkpoint may lack it
        return float(self.args.learning_rate * group["lr"] / peak) if peak else super()._get_learning_rate()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' `log`, with the rate of each part beside the learning rate."""
        super().log(logs | self._rates_now if "learning_rate" in logs else logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; True resumes from the last whole checkpoint, passing over one that a kill cut short.

        SIGTERM ends the training after the step that it falls into, with a checkpoint; `terminated` says so then.
        Where another adapter is active than in the training before, it has an optimiser of its own.

        Raises:
            OSError: a checkpoint cannot be written; nothing of it is left, and older ones are as they were.
            ValueError: there is no checkpoint to resume from, or an optimiser that the caller made holds no tensor of the
                active adapter.
        """
        self._drop_optimizer_of_others()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self._directory)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self._directory} holds no whole checkpoint to resume from: train from the start")
        if isinstance(resume_from_checkpoint, str) and self.args.logging_steps < 1:
            # The checkpoint's number of steps, which transformers takes in any case; it warns where they differ.
            state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
            self.args.logging_steps = state.logging_steps
        self._evaluations = {}
        with self._stop.on_sigterm():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def _directory(self) -> str:
        return cast(str, self.args.output_dir)  # None only until the arguments have seen to it themselves

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM ended the training."""
        return self._stop.came

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        """Makes transformers' sampler; rows whose lengths are not known come in random order in place of that by length."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        by_length = self.args.train_sampling_strategy == "group_by_length"
        if by_length and hasattr(rows, "__len__") and not knows_lengths(rows, self.args.length_column_name):
            return torch.utils.data.RandomSampler(rows)
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return LengthGroupedByEpoch(sampler, seed, self.args.world_size)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        # In the rows' order: some metrics belong to groups of rows, and transformers' order by length loses them.
        if not hasattr(eval_dataset, "__len__") or self.args.world_size > 1:
            return None
        return torch.utils.data.SequentialSampler(eval_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """transformers' `evaluate`, with the gate's state where the adapter has a gate."""
        # A data loader draws a seed: kept apart, evaluating more or less often does not change the training, and a
        # run that resumes past an evaluation has the random state of one that evaluated.
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(*args, **kwargs)
        metrics.pop("num_input_tokens_seen", None)  # of the training, put in by its log
        health = gate_health(self.model.gate_weights())
        if health:
            self.log(health)
        metrics |= health
        if not args and not kwargs.keys() - {"ignore_keys"}:
            self._evaluations[self.state.global_step] = metrics
        return metrics

    def final_metrics(self) -> dict[str, float]:
        """Returns the metrics on `eval_dataset` of the weights that a training ended with.

        It evaluates where the training did not evaluate these weights itself.
        """
        step, best = self.state.global_step, self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            step = int(best.rpartition("-")[2])
        metrics = self._evaluations.get(step)
        return self.evaluate() if metrics is None else metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Its presence says that a checkpoint is whole: it must not be there while an old checkpoint is written over.
        directory = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        (directory / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError) as error:  # torch.save says of a full disk with a RuntimeError
            if self.args.should_save:
                shutil.rmtree(directory, ignore_errors=True)
            raise OSError(
                f"{directory} could not be written ({error}): nothing of it is left; make room and go on from the "
                "checkpoint before it, with resume_from_checkpoint"
            ) from error

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository on the hub; OSError, of one sentence, where the hub cannot be reached or refuses."""
        of_all = self.args.hub_private_repo
        if private is not None:
            self.args.hub_private_repo = private  # transformers 5.19 has no argument for it
        try:
            with hub_errors(f"{self.args.hub_model_id or self._directory} cannot be written on the hub"):
                super().init_hf_repo(token)
        finally:
            self.args.hub_private_repo = of_all

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card_settings: Any,
    ) -> Any:
        """Saves the adapter and uploads it: its files, the tokenizer's, run.json, and transformers' model card.

        Every process calls it, one uploads. Arguments as transformers'; returns the commit, or its Future where not
        `blocking`. Raises OSError, of one sentence, where the hub cannot be reached or refuses.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo_id = cast(str, self.hub_model_id)
        self.create_model_card(**{"model_name": repo_id.split("/")[-1]} | card_settings)
        self._finish_current_push()
        settings: dict[str, Any] = {
            "commit_message": commit_message,
            "token": token,
            "revision": revision or self.args.hub_revision,
        }
        if blocking:
            return upload(self._directory, repo_id, **settings)
        return HfApi().run_as_future(upload, self._directory, repo_id, **settings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Of the adapter's files alone; transformers uploads all that output_dir holds, and the adapter only beside PEFT.
        args: Any = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        api, repo_id = HfApi(), cast(str, self.hub_model_id)
        settings = {"token": args.hub_token, "revision": args.hub_revision}
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [api.run_as_future(upload, checkpoint_folder, repo_id, commit_message=message, **settings)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    run_as_future=True,
                    **settings,
                )
            )
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        in_progress: Any = self.push_in_progress or PushInProgress()  # transformers' own types name neither
        in_progress.jobs.extend(jobs)
        self.push_in_progress = in_progress

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter; every process calls it, one writes."""
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = self._directory if output_dir is None else output_dir
        self.model.save_pretrained(output_dir, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(output_dir)
        args = copy.copy(self.args)
        args.hub_token = None  # a checkpoint may be uploaded
        torch.save(args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # One form for any number of processes and any sharding: transformers would write a sharded backbone, too, and
        # an optimiser that only as many processes can read.
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)  # its own files, which hold the backbone's shards, too
            return
        optimizer, schedule = self._optimizer_and_schedule()
        state = whole_optimizer_state(optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(schedule.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [os.path.join(checkpoint, name) for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        for file in files:
            if not os.path.isfile(file):
                raise FileNotFoundError(
                    f"{checkpoint} holds no {os.path.basename(file)} (save_only_model), without which a training cannot "
                    "go on as it was: train from the start"
                )
        optimizer, schedule = self._optimizer_and_schedule()
        before = _peaks(optimizer)
        state, schedule_state = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
        state, schedule_state = regrouped(state, schedule_state, optimizer.param_groups)
        load_optimizer_state(optimizer, state)
        schedule.load_state_dict(schedule_state)
        changed = [f"{part} {peak:g}" for part, peak in _peaks(optimizer).items() if peak != before[part]]
        if changed:
            logger.warning("the checkpoint's learning rates go on, in place of those above: %s", ", ".join(changed))

    def _optimizer_and_schedule(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        if self.optimizer is None or self.lr_scheduler is None:
            raise RuntimeError("there is no optimiser yet: train makes it")
        return self.optimizer, self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_adapter(self.state.best_model_checkpoint)

    def _load_adapter(self, directory: str) -> None:
        self.model.load_adapter_tensors(read_adapter(directory)[1], source=directory)


class EPTTrainer(_EPTTrainerMixin, Trainer):
    """transformers' Trainer for an EPTModel; use it with EPTTrainingArguments."""


class EPTSeq2SeqTrainer(_EPTTrainerMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer for an EPTModel; use it with EPTSeq2SeqTrainingArguments."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Computes transformers' loss. With label smoothing it hides the labels, of which the decoder's input is made."""
        if self.label_smoother is not None and "labels" in inputs and "decoder_input_ids" not in inputs:
            backbone: Any = self.model.base_model
            shifted = backbone.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
            inputs = {**inputs, "decoder_input_ids": shifted}
        return super().compute_loss(model, inputs, *args, **kwargs)


class EPTContinuationTrainer(_EPTTrainerMixin, Trainer):
    """Trains a causal model on its rows' label words; evaluation predicts every label's score [rows, labels].

    Its `data_collator` is a ContinuationCollator.
    """

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns no loss, the scores of all labels, and the rows' class numbers."""
        collate = self.data_collator
        if not isinstance(collate, ContinuationCollator):
            raise TypeError(f"data_collator must be a ContinuationCollator, not {type(collate).__name__}")
        contexts, classes = collate.separate(inputs)
        scores = label_scores(model.eval(), contexts, collate)
        return None, scores.to(self.args.device), torch.tensor(classes, device=self.args.device)


class EPTWritingTrainer(_EPTTrainerMixin, Trainer):
    """Trains a causal model on answers; with `predict_with_generate` an evaluation writes them.

    Its rows have labels on the answers alone, at their end. An answer is the likeliest tokens: ValueError where the arguments
    ask for another way to generate.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in ("generation_num_beams", "generation_config"):
            if getattr(self.args, name, None) is not None:
                raise ValueError(
                    f"`{name}` would have no effect: a causal model's answers are the likeliest tokens; leave it out"
                )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the loss, the tokens written after each row's prompt [rows, new], and the labels."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        args: Any = self.args
        if prediction_loss_only or not args.predict_with_generate:
            return loss, None, None
        tokenizer: Any = self.processing_class
        ids = written_answers(model, _prompts_in(inputs), tokenizer, args.generation_max_length)
        return loss, ids.to(args.device), inputs["labels"].to(args.device)


def _prompts_in(batch: dict[str, Tensor]) -> list[list[int]]:
    """Returns the token ids before the last answer of each row of a padded batch."""
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        text = mask != 0
        rows.append(prompt_of({"input_ids": ids[text].tolist(), "labels": labels[text].tolist()}))
    return rows


def _warn_of_failure(push: Future[Any]) -> None:
    """Logs why a push from a checkpoint failed; the training goes on, and the push at its end has all."""
    error = push.exception()
    if error is not None:
        logger.warning("a checkpoint could not be uploaded: %s", error)


def _held(optimizer: torch.optim.Optimizer) -> set[int]:
    """The ids of an optimiser's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _peaks(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The peak learning rate of each part, where the optimiser notes it."""
    noting = (group for group in optimizer.param_groups if "initial_lr" in group)
    return {part: group["initial_lr"] for group in noting for part in group["parts"]}


def _check_label_smoothing(model: EPTModel) -> None:
    """Raises ValueError where transformers' smoothed loss is wrong.

    It takes labels for class numbers that stand beside their logits.
    """
    backbone: Any = model.base_model
    problem_type = getattr(backbone.config, "problem_type", None)
    if problem_type in ("regression", "multi_label_classification"):
        raise ValueError(f"label_smoothing_factor is for single classes, and the model's task is {problem_type}")
    if type(backbone).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError("label_smoothing_factor: the labels of a causal model are not shifted for it: leave it out")
    if backbone.config.is_encoder_decoder and not hasattr(backbone, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(f"label_smoothing_factor: {type(backbone).__name__} makes no decoder input from labels")


# Name of a kind of task -> the trainer for it.
TRAINERS: dict[str, type[_EPTTrainerMixin]] = {
    Classification.name: EPTTrainer,
    MultiLabel.name: EPTTrainer,
    Regression.name: EPTTrainer,
    TokenClassification.name: EPTTrainer,
    Text2Text.name: EPTSeq2SeqTrainer,
    CausalText2Text.name: EPTWritingTrainer,
    Continuation.name: EPTContinuationTrainer,
}
