"""A tiny base model and adapters as training leaves them, to publish on the test Hub."""

from pathlib import Path

import torch
from peft import get_peft_model
from testing_utils import TINY_MODELS, build_tokenizer, perturb

from rlora_trl import RLoraConfig
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.files.record import AdapterRecord, TaskRecord


BASE = "user/tiny-llama"
TASKS = ("first", "colour", "same")


def save_base(folder: Path) -> Path:
    """The base model with its tokenizer."""
    torch.manual_seed(1)
    TINY_MODELS["llama"]().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def tiny_adapter(seed: int = 0, base: str = BASE, **config):
    """A model with an adapter that has left its initial values."""
    torch.manual_seed(1)
    model = TINY_MODELS["llama"]()
    model.config._name_or_path = model.name_or_path = base
    torch.manual_seed(seed)
    config = {"tasks": list(TASKS), "task_type": "CAUSAL_LM", **config}
    model = get_peft_model(model, RLoraConfig(**config))
    perturb(model, seed=seed)
    return model.eval()


def tiny_record(base: str | None = BASE, layers: int = 2, heads: int = 3) -> AdapterRecord:
    names = tuple(f"model.layers.{i}.mlp.{p}_proj" for i in range(layers) for p in ("gate", "up", "down"))
    generator = torch.Generator().manual_seed(0)
    weights = {task: torch.rand(len(names), heads, generator=generator).softmax(-1) for task in TASKS}
    accuracies = {"first": 0.9, "colour": 0.75, "same": 0.5}
    return AdapterRecord(
        base_model=base,
        tasks=[
            TaskRecord(task, cluster="words", rows=40, tokens=400, share=1 / 3, metrics={"accuracy": accuracies[task]})
            for task in TASKS
        ],
        hyperparameters={"learning_rate": 2e-4},
        versions={"rlora_trl": "0.1.0"},
        mixtures=HeadWeights(names, weights, dict.fromkeys(TASKS, 100)),
    )


def save_adapter(folder: Path, seed: int = 0, **config) -> Path:
    """A folder as a trainer leaves it, with a checkpoint and private files around the adapter."""
    model = tiny_adapter(seed, **config)
    model.save_pretrained(folder)
    tiny_record().save(folder)
    build_tokenizer().save_pretrained(folder)
    checkpoint = folder / "checkpoint-20"
    checkpoint.mkdir()
    (folder / "training_args.bin").write_bytes(b"\x80\x04 hf_secretsecretsecretsecret")
    (checkpoint / "optimizer.pt").write_bytes(b"\x80\x04")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"old")
    (folder / "notes.txt").write_text("/home/user/private")
    return folder
