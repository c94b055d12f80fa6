"""Fine-tune one language model on many tasks with R-LoRA.

Without arguments it trains a real 135M model on ten small tasks that are generated on the spot, on whatever this
machine has, in a few minutes:

    accelerate launch examples/sft_flan.py

With a model and data of your own (any data set in TRL's formats, from the Hub or a local JSONL or Parquet file):

    accelerate launch examples/sft_flan.py \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my_tasks.jsonl --task_column task \\
        --output_dir qwen-tasks --learning_rate 2e-4 --num_train_epochs 1 --r 4 --num_heads 3

On Flan v2 as in the paper's Setting 2, with a 4-bit base:

    accelerate launch examples/sft_flan.py --model_name_or_path Qwen/Qwen2.5-3B --flan --load_in_4bit

All fields of RLoraConfig, RLoraSFTConfig and TRL's ModelConfig are arguments, and keys of a file given by `--config`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from transformers.utils import logging as transformers_logging
from trl import ScriptArguments, TrlParser, get_quantization_config

from rlora_trl import RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.evaluation import TaskScore, score_tasks
from rlora_trl.trainer.arguments import RLoraArguments, RLoraModelConfig, rlora_config_from_arguments


sys.path.insert(0, str(Path(__file__).parent))
from flan_v2 import load_flan
from smollm2 import smollm2_folder
from tiny_flan import load_tiny_flan


# What the run without arguments uses; each is an argument like any other.
DEMO_DEFAULTS: dict[str, Any] = {
    "output_dir": "rlora-smollm2-135m-tiny-flan",
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 16,
    "max_steps": 80,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
}


@dataclass
class FlanArguments(ScriptArguments):
    """
    Which data to train on, and how many rows to score.

    Args:
        flan (`bool`, *optional*, defaults to `False`):
            Train on the Flan v2 collection, downloaded from the Hub.
        flan_clusters (`list[str]`, *optional*):
            Clusters of Flan v2 to use; by default all ten.
        rows_per_task (`int`, *optional*):
            Training rows of each task, for Flan v2 and the generated tasks; by default 1,000 and 160.
        score_rows (`int`, *optional*, defaults to `25`):
            Test rows of each task to score before and after training. Scoring needs prompt-completion data with a test
            split and tasks; 0 turns it off.
    """

    flan: bool = field(
        default=False,
        metadata={
            "help": "Train on the Flan v2 collection, downloaded from the Hub: the paper's Setting 2, with the "
            "training task `wsc` in place of WSC273, which has a test split only."
        },
    )
    flan_clusters: list[str] | None = field(
        default=None, metadata={"help": "Clusters of Flan v2 to use; by default all ten."}
    )
    rows_per_task: int | None = field(
        default=None, metadata={"help": "Training rows of each task, for Flan v2 and the generated tasks."}
    )
    score_rows: int = field(
        default=25, metadata={"help": "Test rows of each task to score before and after training; 0 turns it off."}
    )


def load_user_dataset(args: FlanArguments) -> DatasetDict:
    """A data set from the Hub, from a folder, or from one JSON-lines or Parquet file."""
    formats = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    suffix = Path(args.dataset_name).suffix
    if suffix in formats and Path(args.dataset_name).is_file():
        files = {args.dataset_train_split: args.dataset_name}
        return load_dataset(formats[suffix], data_files=files, streaming=args.dataset_streaming)
    return load_dataset(args.dataset_name, args.dataset_config, streaming=args.dataset_streaming)


def rows_by_task(dataset: Any, task_column: str, limit: int) -> dict[str, list[dict]]:
    """The first rows of each task of a prompt-completion data set of plain text; nothing if it is not one."""
    columns = set(dataset.column_names or [])
    if not {"prompt", "completion", task_column} <= columns or not isinstance(next(iter(dataset))["prompt"], str):
        return {}
    rows: dict[str, list[dict]] = {}
    if limit == 0 or isinstance(dataset, IterableDataset):  # a stream would have to be read to its end
        return rows
    for row in dataset:
        task_rows = rows.setdefault(row[task_column], [])
        if len(task_rows) < limit:
            task_rows.append(row)
    return rows


def load_data(args: FlanArguments, training_args: RLoraSFTConfig) -> tuple[Any, Any, dict[str, list[dict]]]:
    """Training data, evaluation data or `None`, and rows to score by task."""
    if args.dataset_name is not None:
        splits = load_user_dataset(args)
        if args.dataset_train_split not in splits:
            raise ValueError(
                f"`--dataset_train_split {args.dataset_train_split}` is not a split of {args.dataset_name}, which has "
                f"{', '.join(splits)}."
            )
        test = splits.get(args.dataset_test_split)
        scored = rows_by_task(test, training_args.task_column, args.score_rows) if test is not None else {}
        evaluated = test if training_args.eval_strategy != "no" else None
        return splits[args.dataset_train_split], evaluated, scored
    if args.flan:
        options = {"clusters": args.flan_clusters, "seed": training_args.seed}
        train = load_flan(rows_per_task=args.rows_per_task or 1000, **options)
        if args.score_rows == 0 and training_args.eval_strategy == "no":
            return train, None, {}
        test = load_flan(split="test", rows_per_task=max(args.score_rows, 1), **options)
        return (
            train,
            test if training_args.eval_strategy != "no" else None,
            {t: list(rows) for t, rows in test.items()},
        )
    train = load_tiny_flan("train", seed=training_args.seed, rows_per_task=args.rows_per_task or 160)
    test = load_tiny_flan("test", seed=training_args.seed, rows_per_task=max(args.score_rows, 1))
    as_datasets = {task: Dataset.from_list(rows) for task, rows in train.items()}
    evaluated = {task: Dataset.from_list(rows) for task, rows in test.items()}
    return as_datasets, evaluated if training_args.eval_strategy != "no" else None, test


def print_scores(before: Mapping[str, TaskScore], after: Mapping[str, TaskScore]) -> None:
    """Accuracy by task before and after training, as a table."""
    width = max(len("mean of tasks"), *(len(task) for task in before))
    print(f"\n{'accuracy, %':<{width}}  {'rows':>5}  {'before':>6}  {'after':>6}")
    for task, score in before.items():
        print(f"{task:<{width}}  {score.total:>5}  {100 * score.accuracy:>6.1f}  {100 * after[task].accuracy:>6.1f}")
    means = [100 * sum(score.accuracy for score in scores.values()) / len(scores) for scores in (before, after)]
    rows = sum(score.total for score in before.values())
    print(f"{'mean of tasks':<{width}}  {rows:>5}  {means[0]:>6.1f}  {means[1]:>6.1f}")


def use_all_cores() -> None:
    """`accelerate launch` sets one thread for a process; a single process on a CPU may have all cores."""
    if not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(os.cpu_count() or 1)


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices faster than float32 ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def parse_arguments(argv: list[str] | None = None) -> tuple[FlanArguments, RLoraSFTConfig, RLoraModelConfig, Any]:
    """The command line through TRL's parser; without a model or data, with the defaults of the demonstration."""
    parser = TrlParser((FlanArguments, RLoraSFTConfig, RLoraModelConfig, RLoraArguments))
    argv = sys.argv[1:] if argv is None else argv
    parsed = parser.parse_args_and_config(list(argv))
    script_args, _, model_args, _ = parsed
    if script_args.flan_clusters and not script_args.flan:
        raise ValueError("`--flan_clusters` selects clusters of Flan v2 and needs `--flan`, which is not set. Add it.")
    if model_args.model_name_or_path is None and script_args.dataset_name is None and not script_args.flan:
        fast_bf16 = has_fast_bf16()
        on_gpu = torch.cuda.is_available()
        parser.set_defaults_with_config(
            **DEMO_DEFAULTS,
            dtype="bfloat16" if fast_bf16 else "float32",
            # On a CPU the base runs in its own dtype: autocast would cast all of its weights in every step.
            bf16=fast_bf16 and on_gpu,
            # For sequences this short, PyTorch's fused attention is slower on a CPU.
            attn_implementation=None if on_gpu else "eager",
        )
        # A file given by `--config` sets its defaults after these, and arguments come before both.
        parsed = parser.parse_args_and_config(list(argv))
    return parsed


def main(argv: list[str] | None = None) -> None:
    """Train, score, save, and say how to load the adapter."""
    script_args, training_args, model_args, rlora_args = parse_arguments(argv)
    use_all_cores()
    transformers_logging.set_verbosity_warning()
    model_name = model_args.model_name_or_path or str(smollm2_folder())
    train_dataset, eval_dataset, test_rows = load_data(script_args, training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = RLoraSFTTrainer(
        model=model_name,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=rlora_config_from_arguments(rlora_args, model_args),
        quantization_config=get_quantization_config(model_args),
    )
    # DeepSpeed places and shards the model when training starts; there is nothing to score before.
    scoring = bool(test_rows) and script_args.score_rows > 0 and not trainer.is_deepspeed_enabled
    tokenizer = trainer.processing_class
    before = score_tasks(trainer.model, tokenizer, test_rows, description="Scoring, before") if scoring else {}
    resume = training_args.resume_from_checkpoint
    # On the command line "true" stands for the last checkpoint in the output folder.
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    after = score_tasks(trainer.model, tokenizer, test_rows, description="Scoring, after") if scoring else {}
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    if trainer.accelerator.is_main_process:
        if scoring:
            print_scores(before, after)
        print(f"\nAdapter saved in {training_args.output_dir}. To load it again:\n")
        print("    import rlora_trl")
        print("    from peft import AutoPeftModelForCausalLM")
        print(f"    model = AutoPeftModelForCausalLM.from_pretrained({training_args.output_dir!r})")


if __name__ == "__main__":
    main()
