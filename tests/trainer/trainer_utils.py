"""Trainers of tiny models, and what the tests of this folder read from them."""

from types import SimpleNamespace

from datasets import Dataset
from testing_utils import build_tokenizer, task_datasets, task_rows

from rlora_trl import RLoraSFTConfig, RLoraSFTTrainer
from rlora_trl.trainer.mixing import prepare_tasks


TASKS = ["first", "colour", "same"]
TASK_ROUTER = {"router": "task", "head_dropout": 0.0}
PREPARATIONS = {
    "padded": {},
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 16},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 5},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "padding_free": {"padding_free": True, "max_length": None},
    "packed_rows_to_multiple": {"packing": True, "max_length": 16, "pad_to_multiple_of": 32},
    "truncated": {"max_length": 3},
}


def arguments(folder, **kwargs):
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 30,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 64,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return RLoraSFTConfig(str(folder), **{**defaults, **kwargs})


def make_trainer(
    model_folders, folder, name="llama", train=None, peft_config=None, model=None, evaluate=None, **kwargs
):
    return RLoraSFTTrainer(
        model=model_folders[name] if model is None else model,
        args=arguments(folder, **kwargs),
        train_dataset=task_datasets() if train is None else train,
        eval_dataset=evaluate,
        # Not left to AutoTokenizer, which takes the tokenizer class of the architecture.
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter_state(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters() if "rlora_adapters" in k}


def collect(dataset, task_column="task", text_column="text", seed=0, **kwargs):
    """Training data as one dataset, and the names of its tasks."""
    args = SimpleNamespace(task_column=task_column, dataset_text_field=text_column, seed=seed, mixes_tasks=False)
    rows = prepare_tasks(dataset, args, **kwargs)
    return rows.dataset, rows.names


def rows_of(dataloader, epoch):
    dataloader.set_epoch(epoch)
    return [row for batch in dataloader for row in batch.tolist()]


def scored_rows(task, count, seed=9):
    options = {"colour": [" red", " blue", " green"], "same": [" yes", " no"]}
    return Dataset.from_list([{**row, "options": options.get(task, [])} for row in task_rows(task, count, seed)])


def marked_datasets(count=30):
    """Rows whose every token tells their task: a different word for each."""
    return {
        task: Dataset.from_list(
            [{"text": " ".join([f"w{index}"] * (2 + row % 7))} for row in range(count)]  # EOS is added
        )
        for index, task in enumerate(TASKS)
    }
