"""
The parts of a training program: arguments, data, training, scores. `rlora train` and the examples use them.

All fields of `RLoraConfig`, `RLoraSFTConfig` and TRL's `ModelConfig` are arguments, and keys of a YAML file for
`--config`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import ScriptArguments, TrlParser, get_quantization_config

from ..evaluation import TaskScore, score_tasks
from ..evaluation.formats import check_rows
from ..evaluation.loading import READING_ERRORS, explain_read_errors, load_splits
from ..evaluation.rows import is_scorable, rows_by_task
from .arguments import RLoraArguments, RLoraModelConfig, rlora_config_from_arguments
from .config import RLoraSFTConfig
from .cores import use_all_cores
from .stopping import StopOnSignal
from .trainer import RLoraSFTTrainer


# Steps after the first that are timed, and the shortest time worth printing, in seconds.
_TIMED_STEPS, _LONG = 2, 20


@dataclass
class RLoraScriptArguments(ScriptArguments):
    """
    Which data to train on, and how many rows to score.

    Args:
        score_rows (`int`, *optional*, defaults to `25`):
            Number of test rows of each task to score before and after training; 0 turns it off. Scoring needs
            prompt-completion data with a test split and tasks.
    """

    score_rows: int = field(
        default=25,
        metadata={"help": "Number of test rows of each task to score before and after training; 0 turns it off."},
    )


@dataclass
class TrainingData:
    """
    The data of a run.

    Args:
        train: The `train_dataset` of [`RLoraSFTTrainer`].
        evaluation (*optional*): Its `eval_dataset`.
        scored (`Mapping[str, Sequence[Mapping]]`, *optional*): Rows by task to score before and after training.
        source (`str`, *optional*): File, folder or dataset on the Hub, for messages about files that can't be read.
    """

    train: Any
    evaluation: Any = None
    scored: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    source: str | None = None


@dataclass
class TrainingResult:
    """
    The result of a run.

    Args:
        trainer ([`RLoraSFTTrainer`]): The trainer, with the trained model.
        before (`dict[str, TaskScore]`), after (`dict[str, TaskScore]`): Scores by task; empty if nothing was scored.
    """

    trainer: RLoraSFTTrainer
    before: dict[str, TaskScore]
    after: dict[str, TaskScore]

    def describe(self) -> str:
        """A table of the scores, if there are any, and the code that loads the adapter."""
        folder = self.trainer.args.output_dir
        table = f"\n{format_scores(self.before, self.after)}\n" if self.before else ""
        return (
            f"{table}\nAdapter saved in {folder}. To load it again:\n\n"
            "    import rlora_trl\n"
            "    from peft import AutoPeftModelForCausalLM\n"
            f"    model = AutoPeftModelForCausalLM.from_pretrained({folder!r})"
        )


def make_parser(arguments: type[RLoraScriptArguments] = RLoraScriptArguments, **options: Any) -> TrlParser:
    """
    TRL's parser for a training program.

    Args:
        arguments (`type[RLoraScriptArguments]`, *optional*): The program's own arguments.
        options: Options of `argparse.ArgumentParser`, such as `prog`.

    Returns:
        `TrlParser`: Parses into `arguments`, [`RLoraSFTConfig`], [`RLoraModelConfig`] and [`RLoraArguments`].
    """
    return TrlParser((arguments, RLoraSFTConfig, RLoraModelConfig, RLoraArguments), **options)


def load_data(args: RLoraScriptArguments, training_args: RLoraSFTConfig) -> TrainingData:
    """
    Load and check the dataset that the arguments name.

    Args:
        args ([`RLoraScriptArguments`]): Has the dataset, its splits, and the number of rows to score.
        training_args ([`RLoraSFTConfig`]): Has the names of columns, and whether there is evaluation.

    Returns:
        [`TrainingData`].

    Raises:
        ValueError: If there is no `dataset_name` or no such split, or rows can't be trained on or scored.
    """
    if args.dataset_name is None:
        raise ValueError(
            "`--dataset_name` is missing: the data to train on, as a JSON-lines, Parquet or CSV file, a folder of "
            "such files, or the name of a dataset on the Hub."
        )
    splits = load_splits(
        args.dataset_name,
        args.dataset_config,
        file_split=args.dataset_train_split,
        streaming=args.dataset_streaming,
    )
    if args.dataset_train_split not in splits:
        raise ValueError(
            f"`--dataset_train_split {args.dataset_train_split}` is not a split of {args.dataset_name}, which has "
            f"{', '.join(splits)}. Name one of them."
        )

    test = splits.get(args.dataset_test_split)
    evaluation = test if training_args.eval_strategy != "no" else None
    data = TrainingData(splits[args.dataset_train_split], evaluation, source=args.dataset_name)
    with explain_read_errors(Path(args.dataset_name), READING_ERRORS):
        if not (training_args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            used = {args.dataset_train_split: data.train, args.dataset_test_split: evaluation}
            for name, split in used.items():
                if split is not None:
                    where = _split_name(args, splits, name)
                    check_rows(split, where, text_column=training_args.dataset_text_field)
                    if isinstance(split, Dataset):  # whose tasks can be read now, to refuse rows without one
                        _rows_by_task(split, training_args.task_column, 1, where)
        if args.score_rows > 0 and test is not None and is_scorable(test):
            where = _split_name(args, splits, args.dataset_test_split)
            data.scored = _rows_by_task(test, training_args.task_column, args.score_rows, where, scored=True)
    return data


def _split_name(args: RLoraScriptArguments, splits: Mapping[str, Any], split: str) -> str:
    return args.dataset_name if len(splits) == 1 else f"{args.dataset_name}, split {split!r}"


def _rows_by_task(
    split: Any, column: str, limit: int, where: str, *, scored: bool = False
) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """See [`rows_by_task`]; nothing without the column."""
    if column not in split.column_names:
        return {}
    # As in training, the default column need not name tasks; the trainer warns of that.
    warn = (lambda text: None) if column == "task" else None
    return rows_by_task(split, column, limit, where=where, scored=scored, warn=warn)


def train(
    model: str,
    data: TrainingData,
    training_args: RLoraSFTConfig,
    model_args: RLoraModelConfig,
    rlora_args: Any,
) -> TrainingResult:
    """
    Train, score before and after, save, and push if `training_args.push_to_hub`.

    Args:
        model (`str`): Folder or Hub name of the base model.
        data ([`TrainingData`]): The data to train on and to score.
        training_args ([`RLoraSFTConfig`]), model_args ([`RLoraModelConfig`]), rlora_args ([`RLoraArguments`]): The
            parsed arguments.

    Returns:
        [`TrainingResult`].

    Raises:
        TrainingStopped: If a signal has stopped it; see [`StopOnSignal`].
    """
    explained = nullcontext() if data.source is None else explain_read_errors(Path(data.source), READING_ERRORS)
    with StopOnSignal(training_args) as stop, explained:
        return _train(model, data, training_args, model_args, rlora_args, [stop])


def _train(
    model: str,
    data: TrainingData,
    training_args: RLoraSFTConfig,
    model_args: RLoraModelConfig,
    rlora_args: Any,
    callbacks: list[TrainerCallback],
) -> TrainingResult:
    # The trainer.
    use_all_cores()
    transformers_logging.set_verbosity_warning()
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = RLoraSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        peft_config=rlora_config_from_arguments(rlora_args, model_args),
        quantization_config=get_quantization_config(model_args),
        callbacks=callbacks,
    )

    # On the command line "true" is the last checkpoint in the output folder.
    resume = training_args.resume_from_checkpoint
    resume = True if str(resume).lower() == "true" else resume
    trainer.check_resume(resume)

    # Scores before. DeepSpeed places and shards the model only when training starts.
    scored = {} if trainer.is_deepspeed_enabled else data.scored
    start = time.perf_counter()
    tokenizer = trainer.processing_class
    before = score_tasks(trainer.model, tokenizer, scored, description="Scoring, before") if scored else {}
    trainer.add_callback(ExpectedTime(time.perf_counter() - start if scored else 0.0))

    # Training.
    trainer.train(resume_from_checkpoint=resume)

    # Scores after, which are saved and published in the adapter's record.
    after = score_tasks(trainer.model, tokenizer, scored, description="Scoring, after") if scored else {}
    measured = {f"eval_{task}_accuracy": score.accuracy for task, score in after.items()}
    measured |= {f"eval_{task}_base_accuracy": score.accuracy for task, score in before.items()}
    trainer.note_metrics(measured, scored)

    trainer.save_model(training_args.output_dir)
    trainer.save_state()  # all logs, for `rlora analyze --report`
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return TrainingResult(trainer, before, after)


class ExpectedTime(TrainerCallback):
    """
    Prints after the first steps how long the run will take, scoring included.

    Args:
        scoring (`float`, *optional*, defaults to `0.0`): Seconds of scoring after training.
    """

    def __init__(self, scoring: float = 0.0) -> None:
        self.scoring = scoring
        self._ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ends = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if len(self._ends) > _TIMED_STEPS or not state.is_local_process_zero:
            return
        self._ends.append(time.perf_counter())
        if len(self._ends) <= _TIMED_STEPS:
            return

        # The first step is left out: it allocates memory and selects kernels.
        step = (self._ends[-1] - self._ends[0]) / _TIMED_STEPS
        steps = state.max_steps - state.global_step
        seconds = steps * step + self.scoring
        if seconds >= _LONG:
            scoring = f", and {describe_seconds(self.scoring)} of scoring" if self.scoring >= 1 else ""
            tqdm.write(
                f"About {describe_seconds(seconds)} left: {steps} steps of {step:.1f} s{scoring}.", file=sys.stderr
            )


def describe_seconds(seconds: float) -> str:
    """A duration in words: `"45 s"`, `"4 min"`, `"2.5 h"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def format_scores(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> str:
    """Accuracy by task before and after training, as a table of plain text."""
    width = max(len("mean of tasks"), *(len(task) for task in before))
    lines = [f"{'accuracy, %':<{width}}  {'rows':>5}  {'before':>6}  {'after':>6}"]
    for task, score in before.items():
        shares = (100 * score.accuracy, 100 * after[task].accuracy)
        lines.append(f"{task:<{width}}  {score.total:>5}  {shares[0]:>6.1f}  {shares[1]:>6.1f}")
    means = [100 * sum(score.accuracy for score in scores.values()) / len(scores) for scores in (before, after)]
    rows = sum(score.total for score in before.values())
    return "\n".join([*lines, f"{'mean of tasks':<{width}}  {rows:>5}  {means[0]:>6.1f}  {means[1]:>6.1f}"])
