"""What a run knows of its adapter, without a trainer."""

from types import SimpleNamespace

import pytest
from testing_utils import task_datasets
from trainer_utils import arguments

from rlora_trl import RLoraConfig
from rlora_trl.files.record import AdapterRecord, TaskRecord
from rlora_trl.trainer.run_record import RunRecord, describe_quantization


MODEL = SimpleNamespace(config=SimpleNamespace(dtype="torch.bfloat16", quantization_config=None))
TASKS = ["first", "same"]


def build(run, tmp_path, step, **kwargs):
    options = {"hyperparameters": {"learning_rate": 0.1}, "base_commit": None, **kwargs}
    config = RLoraConfig(base_model_name_or_path="org/base", tasks=TASKS)
    return run.build(arguments(tmp_path), config, MODEL, TASKS, step=step, **options)


def test_counts_become_shares(tmp_path):
    run = RunRecord(task_datasets(4), "task")
    run.seen = {"first": {"rows": 30, "tokens": 90}, "same": {"rows": 10, "tokens": 20}}

    record = build(run, tmp_path, 5)

    assert [task.share for task in record.tasks] == [0.75, 0.25]
    assert (record.base_model, record.base_dtype, record.quantization) == ("org/base", "bfloat16", None)


def test_metrics_are_those_of_one_step(tmp_path):
    run = RunRecord(None, "task")
    data = task_datasets(4)
    run.note_metrics(5, {"eval_first_loss": 1.0, "eval_same_accuracy": 0.5, "eval_loss": 3.0}, TASKS, data)

    measured = build(run, tmp_path, 5)
    assert [task.metrics for task in measured.tasks] == [{"loss": 1.0}, {"accuracy": 0.5}]
    assert [task.metric_rows for task in measured.tasks] == [4, 4]
    assert not any(task.metrics for task in build(run, tmp_path, 6).tasks)

    run.note_metrics(6, {"eval_same_loss": 2.0}, TASKS, data)
    assert [task.metrics for task in build(run, tmp_path, 6).tasks] == [{}, {"loss": 2.0}]


def test_metrics_of_a_checkpoint_are_taken(tmp_path):
    run = RunRecord(None, "task")
    run.take_metrics(9, AdapterRecord(tasks=[TaskRecord("same", metrics={"accuracy": 0.9}, metric_rows=7)]))
    assert build(run, tmp_path, 9).tasks[1].metrics == {"accuracy": 0.9}
    run.forget_metrics()
    assert build(run, tmp_path, 9).tasks[1].metrics == {}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (None, None),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes 4-bit nf4"),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq 4-bit"),
    ],
)
def test_quantization_in_words(config, text):
    assert describe_quantization(config) == text
