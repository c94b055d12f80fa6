"""Classification of real pictures, the digits of scikit-learn, through `transformers.Trainer`."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    SiglipConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
)

from rlora_trl import RLoraCallback, RLoraConfig, add_task_heads


data = pytest.importorskip("sklearn.datasets")
TRAINED = 1400
VISION = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    # Features of order one: the model is not pretrained.
    "initializer_range": 0.1,
}
CONFIGS = {
    "vit": lambda: ViTConfig(**VISION, num_labels=10),
    "clip": lambda: CLIPConfig(vision_config=VISION, num_labels=10),
    "siglip": lambda: SiglipConfig(vision_config=VISION, num_labels=10),
}


def build(name):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(CONFIGS[name]()).eval()


def digits(tasks=False):
    """Pictures of 8 x 8 pixels with their digits; or every second one with its digit modulo 2."""
    pictures, labels = data.load_digits(return_X_y=True)
    columns = {"pixel_values": (pictures.reshape(-1, 1, 8, 8) / 8 - 1).astype("float32"), "labels": labels}
    if tasks:
        task_ids = [index % 2 for index in range(len(labels))]
        parity = [int(label) % 2 if task else int(label) for label, task in zip(labels, task_ids, strict=True)]
        columns |= {"labels": parity, "task_ids": task_ids}
    dataset = Dataset.from_dict(columns).with_format("torch")
    return dataset.select(range(TRAINED)), dataset.select(range(TRAINED, len(dataset)))


def accuracy(prediction):
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": right.mean(), "even": right[::2].mean(), "odd": right[1::2].mean()}


def make_trainer(model, folder, tasks=False):
    train, test = digits(tasks)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=400,
        max_steps=200,
        learning_rate=6e-3,
        logging_steps=100,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    return Trainer(model, arguments, train_dataset=train, eval_dataset=test, compute_metrics=accuracy)


@pytest.mark.parametrize("name", CONFIGS)
def test_digits(tmp_path, name):
    model = get_peft_model(build(name), RLoraConfig(modules_to_save=["classifier"], head_dropout=0.0))
    targeted = model.base_model.targeted_module_names
    assert len(targeted) >= 4 and all(path.endswith((".mlp.fc1", ".mlp.fc2")) for path in targeted)
    trainer = make_trainer(model, tmp_path)
    trainer.add_callback(RLoraCallback(trainer))
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    assert before < 0.25 and after > 0.85, (before, after)
    assert "head_load_max" in trainer.state.log_history[1]

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "adapter")
    assert make_trainer(loaded, tmp_path).evaluate()["eval_accuracy"] == after


def test_two_tasks_on_digits(tmp_path):
    """Which digit, and whether it is odd: each task with its own head and head weights."""
    labels = {"digit": 10, "odd": 2}
    base = add_task_heads(build("vit"), labels)
    model = get_peft_model(base, RLoraConfig(router="task", tasks=list(labels), head_dropout=0.0))
    trainer = make_trainer(model, tmp_path, tasks=True)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_even"] < 0.25 and after["eval_even"] > 0.8, (before, after)
    assert before["eval_odd"] < 0.65 and after["eval_odd"] > 0.8, (before, after)
