# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "rlora-trl>=0.1.0.dev0",
#   "torch>=2.6,<2.14",
#   "transformers>=5.17,<5.24",
#   "datasets>=5.2",
# ]
# ///
"""Fine-tune one language model on many tasks with R-LoRA.

Without arguments it trains a real 135M model on ten small generated tasks, on a GPU or the CPU, in a few minutes:

    accelerate launch examples/sft_flan.py

With your own model and data (any dataset in TRL's formats, from the Hub or a local JSONL or Parquet file):

    accelerate launch examples/sft_flan.py \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name my_tasks.jsonl --task_column task \\
        --output_dir qwen-tasks --learning_rate 2e-4 --num_train_epochs 1 --r 4 --num_heads 3

On Flan v2 as in the paper's Setting 2, with a 4-bit base:

    accelerate launch examples/sft_flan.py --model_name_or_path Qwen/Qwen2.5-3B --flan --load_in_4bit

This file alone, without the repository, trains on your own model and data; uv installs what it needs:

    uv run sft_flan.py --model_name_or_path ... --dataset_name ...
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN sft_flan.py \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name user/tasks --push_to_hub

All fields of RLoraConfig, RLoraSFTConfig and TRL's ModelConfig are arguments, or keys of a file passed as `--config`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlora_cli import wait_passively
from rlora_cli.errors import quieten_libraries


wait_passively()  # for CPUs that other programs use too; must run before PyTorch is imported
quieten_libraries()
import torch
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging as transformers_logging

from rlora_trl import RLoraSFTConfig
from rlora_trl.trainer import script
from rlora_trl.trainer.arguments import RLoraModelConfig
from rlora_trl.trainer.cores import has_fast_bf16


sys.path.insert(0, str(Path(__file__).parent))
# Their tasks and the demo's model are in files beside this one, which `hf jobs uv run` does not upload.
IS_ALONE = find_spec("flan_v2") is None
if not IS_ALONE:
    from flan_v2 import load_flan
    from smollm2 import smollm2_folder
    from tiny_flan import load_tiny_flan


# Defaults of the run without arguments; each can be overridden by its argument.
DEMO_DEFAULTS: dict[str, Any] = {
    "output_dir": "rlora-smollm2-135m-tiny-flan",
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 16,
    "max_steps": 45,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}
# What the demonstration prints and runs at its end, with a question of each of two tasks that is in no training row.
DEMO_TASKS = ("struct_to_text", "commonsense_outcome")
DEMO_CODE = """\
import rlora_trl
from transformers import pipeline

questions = {questions}
answer = pipeline("text-generation", "{folder}", do_sample=False, max_new_tokens=16, return_full_text=False)
learned = answer(questions)
answer.model.disable_adapters()
base = answer(questions)
"""


@dataclass
class FlanArguments(script.RLoraScriptArguments):
    """
    Data to train on, in addition to the arguments of any training program.

    Args:
        flan (`bool`, *optional*, defaults to `False`):
            Train on the Flan v2 collection, downloaded from the Hub.
        flan_clusters (`list[str]`, *optional*):
            Clusters of Flan v2 to use. Defaults to all ten.
        rows_per_task (`int`, *optional*):
            Training rows per task, for Flan v2 and the generated tasks. Defaults to 1,000 and 160.
    """

    flan: bool = field(
        default=False,
        metadata={
            "help": "Train on the Flan v2 collection, downloaded from the Hub: the paper's Setting 2, with the "
            "training task `wsc` in place of WSC273, which has only a test split."
        },
    )
    flan_clusters: list[str] | None = field(
        default=None, metadata={"help": "Clusters of Flan v2 to use. Defaults to all ten."}
    )
    rows_per_task: int | None = field(
        default=None, metadata={"help": "Training rows per task, for Flan v2 and the generated tasks."}
    )


def load_data(args: FlanArguments, training_args: RLoraSFTConfig) -> script.TrainingData:
    """The user's dataset, Flan v2, or the generated tasks."""
    if args.dataset_name is not None:
        return script.load_data(args, training_args)
    evaluates = training_args.eval_strategy != "no"
    seed = training_args.seed
    if args.flan:
        train = load_flan(rows_per_task=args.rows_per_task or 1000, clusters=args.flan_clusters, seed=seed)
        if args.score_rows == 0 and not evaluates:
            return script.TrainingData(train)
        rows = max(args.score_rows, 1)
        evaluated = load_flan(split="test", rows_per_task=rows, clusters=args.flan_clusters, seed=seed)
        test = {task: list(task_rows) for task, task_rows in evaluated.items()}
    else:
        generated = load_tiny_flan("train", seed=seed, rows_per_task=args.rows_per_task or 160)
        test = load_tiny_flan("test", seed=seed, rows_per_task=max(args.score_rows, 1))
        train = {task: Dataset.from_list(rows) for task, rows in generated.items()}
        evaluated = {task: Dataset.from_list(rows) for task, rows in test.items()}
    return script.TrainingData(train, evaluated if evaluates else None, test if args.score_rows > 0 else {})


def is_demo(script_args: FlanArguments, model_args: RLoraModelConfig) -> bool:
    """Whether neither a model nor data are named."""
    return model_args.model_name_or_path is None and script_args.dataset_name is None and not script_args.flan


def parse_arguments(argv: list[str] | None = None) -> tuple[FlanArguments, RLoraSFTConfig, RLoraModelConfig, Any]:
    """Parse the command line with TRL's parser. Without a model and data, the demonstration's defaults apply."""
    parser = script.make_parser(FlanArguments)
    argv = sys.argv[1:] if argv is None else argv
    parsed = parser.parse_args_and_config(list(argv))
    script_args, _, model_args, _ = parsed
    if script_args.flan_clusters and not script_args.flan:
        raise ValueError("`--flan_clusters` selects clusters of Flan v2 and needs `--flan`, which is not set. Add it.")
    if IS_ALONE and (script_args.dataset_name is None or model_args.model_name_or_path is None):
        raise ValueError(
            "The demonstration and `--flan` need the files beside this one in the repository (flan_v2.py, smollm2.py, "
            "tiny_flan.py), which are missing. Pass `--model_name_or_path` and `--dataset_name`, or run this file in "
            "a copy of the repository."
        )
    if is_demo(script_args, model_args):
        fast_bf16 = has_fast_bf16()
        on_gpu = torch.cuda.is_available()
        parser.set_defaults_with_config(
            **DEMO_DEFAULTS,
            dtype="bfloat16" if fast_bf16 else "float32",
            # On a CPU the base runs in its own dtype: autocast would cast all its weights in every step.
            bf16=fast_bf16 and on_gpu,
            # For sequences this short, PyTorch's fused attention is slower on a CPU.
            attn_implementation=None if on_gpu else "eager",
        )
        # A file passed as `--config` overrides these defaults, and arguments override both.
        parsed = parser.parse_args_and_config(list(argv))
    return parsed


def quieten_demo() -> None:
    """Leave the screen to the progress of scoring and training, and to the results."""
    # Bars of steps that take less than a second.
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def show_answers(folder: str, questions: list[str]) -> None:
    """Print code that loads the adapter and asks it questions, run that code, and print the answers."""
    listed = "[\n" + "".join(f"    {question!r},\n" for question in questions) + "]"
    code = DEMO_CODE.format(questions=listed, folder=folder)
    print(f"\nAdapter saved in {folder}. To load it, ask it, and switch it off:\n")
    print("".join(f"    {line}".rstrip() + "\n" for line in code.splitlines()))

    result: dict[str, Any] = {}
    exec(code, result)
    for number, question in enumerate(questions):
        print(f"\n{question}")
        for name in ("learned", "base"):
            text = " ".join(result[name][number][0]["generated_text"].split())
            print(f"  {name:<7}  {text or '(nothing)'}")


def main(argv: list[str] | None = None) -> None:
    """Train, score and save the adapter, and print how to load it."""
    script_args, training_args, model_args, rlora_args = parse_arguments(argv)
    script.use_all_cores()
    demo = is_demo(script_args, model_args)
    if demo:
        quieten_demo()
    model = model_args.model_name_or_path or str(smollm2_folder())
    data = load_data(script_args, training_args)
    result = script.train(model, data, training_args, model_args, rlora_args)
    if not result.trainer.accelerator.is_main_process:
        return
    if demo and result.before:
        print(f"\n{script.format_scores(result.before, result.after)}")
        show_answers(training_args.output_dir, [data.scored[task][0]["prompt"] for task in DEMO_TASKS])
    else:
        print(result.describe())


if __name__ == "__main__":
    main()
