"""A classification head for each task: chosen by task ids, trained through `transformers.Trainer`, saved, loaded."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from testing_utils import perturb
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from rlora_trl import MultiHeadAdapter, RLoraCallback, RLoraConfig, add_task_heads, export_lora, set_task
from rlora_trl.tuner.task_heads import TaskHeads


LABELS = {"half": 2, "third": 3}
TASKS = list(LABELS)
TOKENS, LENGTH = 6, 5
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "num_labels": 5,
}


def build(model_type="bert", auto=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    decoder = {"decoder_start_token_id": 0} if model_type == "t5" else {}
    config = AutoConfig.for_model(model_type, **SIZES, **decoder)
    return auto.from_config(config).eval()


def examples(count, by_token=False, seed=0):
    """Rows with a task: the half, or the third, of the vocabulary that the first token (or each token) is in."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        task = index % 2
        tokens = draw.integers(0, TOKENS, LENGTH)
        labels = tokens // 3 if task == 0 else tokens // 2
        rows.append(
            {
                "input_ids": (tokens + 5).tolist(),
                "attention_mask": [1] * LENGTH,
                "labels": labels.tolist() if by_token else int(labels[0]),
                "task_ids": task,
            }
        )
    return Dataset.from_list(rows)


def accuracy(prediction):
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    rows = predicted == labels
    rows = rows if rows.ndim == 1 else rows.mean(-1)
    return {name: float(rows[index::2].mean()) for index, name in enumerate(TASKS)}


def make_trainer(model, folder, by_token=False, steps=70, **settings):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=16,
        max_steps=steps,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        logging_steps=35,
        # The task of each row is no argument of the base model.
        remove_unused_columns=False,
        label_names=["labels"],
        **settings,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=examples(200, by_token),
        eval_dataset=examples(60, by_token, seed=1),
        compute_metrics=accuracy,
    )


def adapted(base, task_type="SEQ_CLS", targets="all-linear", **fields):
    # A pooler gets one vector for each row, whose task the layers of a task router can't know.
    pooler = ["pooler.dense"] if targets == "all-linear" and base.config.model_type == "bert" else None
    config = RLoraConfig(task_type=task_type, target_modules=targets, exclude_modules=pooler, **fields)
    return get_peft_model(base, config)


@pytest.mark.parametrize(
    ("kind", "router"),
    [
        ("sequence", "softmax"),
        pytest.param("sequence", "task", marks=pytest.mark.slow),
        pytest.param("tokens", "task", marks=pytest.mark.slow),
    ],
)
def test_two_tasks_with_their_own_labels(tmp_path, kind, router):
    auto = AutoModelForTokenClassification if kind == "tokens" else AutoModelForSequenceClassification
    task_type = "TOKEN_CLS" if kind == "tokens" else "SEQ_CLS"
    base = add_task_heads(build(auto=auto), LABELS)
    untouched = copy.deepcopy(base)
    torch.manual_seed(0)
    model = adapted(base, task_type, router=router, tasks=TASKS)
    trainer = make_trainer(model, tmp_path, kind == "tokens")
    before = trainer.evaluate()
    trainer.add_callback(RLoraCallback(trainer))
    trainer.train()
    after = trainer.evaluate()
    for task in TASKS:
        assert before[f"eval_{task}"] < 0.6 and after[f"eval_{task}"] > 0.85, (before, after)
    assert after["eval_loss"] < before["eval_loss"]
    assert "router_entropy" in trainer.state.log_history[1]
    frozen = {name: p for name, p in base.named_parameters() if not p.requires_grad and "rlora" not in name}
    started = dict(untouched.named_parameters())
    for name, parameter in frozen.items():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        assert torch.equal(parameter, started[plain]), name

    # On a new base with heads of the same tasks, the adapter gives the same results.
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(add_task_heads(build(auto=auto), LABELS), tmp_path / "adapter")
    again = make_trainer(loaded, tmp_path, kind == "tokens").evaluate()
    assert again["eval_loss"] == after["eval_loss"]


def batch_of(model, rows=4):
    ids = torch.randint(5, 11, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # where such a model classifies
    return {"input_ids": ids}


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "llama", "modernbert", "distilbert", "electra", "eurobert", "t5"]
)
def test_each_row_gets_the_head_of_its_task(model_type):
    """Heads of one linear layer, or of several; of encoders and of decoders."""
    # PEFT (0.21) takes "pre_classifier" for a head when it looks for "classifier".
    targets = None if model_type == "distilbert" else "all-linear"
    model = adapted(add_task_heads(build(model_type), LABELS), targets=targets).eval()
    batch = batch_of(model)
    with torch.no_grad():
        alone = [model(**batch, task_ids=[task] * 4).logits for task in TASKS]
        mixed = model(**batch, task_ids=["half", "third", "third", "half"]).logits
    # EuroBERT takes the mean of the logits of all tokens.
    absent = -(torch.finfo(torch.float32).max ** 0.5)
    assert mixed.shape == (4, 3) and bool((alone[1] > -1000.0).all())
    torch.testing.assert_close(alone[0][:, 2], torch.full((4,), absent))
    expected = torch.stack([alone[0][0], alone[1][1], alone[1][2], alone[0][3]])
    torch.testing.assert_close(mixed, expected)
    assert not torch.allclose(alone[0][:, :2], alone[1][:, :2])

    # The same by `set_task`, of the method and of the function; task ids of a batch come first.
    for choose in (model.set_task, lambda task: set_task(model, task)):
        choose("third")
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, alone[1])
            torch.testing.assert_close(model(**batch, task_ids=["half"] * 4).logits, alone[0])
        choose(None)
        with pytest.raises(ValueError, match="a row without a task.*`remove_unused_columns=False`"):
            model(**batch)


def test_heads_of_all_tasks_get_a_gradient():
    """Also without a row of their task, as DDP needs; it is zero then."""
    model = adapted(add_task_heads(build(), LABELS))
    model(**batch_of(model), task_ids=["half"] * 4, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    heads = model.base_model.model.classifier.modules_to_save["default"]
    assert isinstance(heads, TaskHeads)
    norms = [float(head.weight.grad.norm()) for head in heads.heads]
    assert norms[0] > 0 and norms[1] == 0
    adapters = [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]
    assert all(adapter.B.grad.isfinite().all() for adapter in adapters)


def test_a_disabled_adapter_uses_the_heads_of_the_base():
    base = add_task_heads(build(), LABELS)
    batch = batch_of(base)
    set_task(base, "third")
    expected = base(**batch).logits
    set_task(base, None)
    model = adapted(base).eval()
    for head in model.base_model.model.classifier.modules_to_save["default"].heads:
        nn.init.ones_(head.weight)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch, task_ids=["third"] * 4).logits, expected)


def test_what_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r'must be a dictionary of tasks.*\{"sst2": 2, "mnli": 3\}'):
        add_task_heads(build(), ["half"])
    for labels in ({}, {"half": 1, "third": 3}):
        with pytest.raises(ValueError, match="2 or more labels for each"):
            add_task_heads(build(), labels)
    with pytest.raises(ValueError, match="has no head classifier or score"):
        add_task_heads(build().bert, LABELS)
    with pytest.raises(ValueError, match="no linear layer with 5 outputs"):
        add_task_heads(build(), LABELS, head="bert")
    with pytest.raises(ValueError, match="before they are added"):
        add_task_heads(get_peft_model(build(), RLoraConfig()).base_model.model, LABELS)

    model = adapted(add_task_heads(build(), LABELS), router="task", tasks=TASKS[::-1]).eval()
    with pytest.raises(ValueError, match="'half', 'third'.*'third', 'half'.*same order"):
        model(**batch_of(model), task_ids=[0, 1, 0, 1])
    model = adapted(add_task_heads(build(), LABELS)).eval()
    with pytest.raises(ValueError, match="The adapter has no task 'other'"):
        model(**batch_of(model), task_ids=["other"] * 4)
    with pytest.raises(ValueError, match="don't fit features"):
        model(**batch_of(model), task_ids=torch.zeros(4, LENGTH, dtype=torch.int64))

    # A base without the heads, or with those of other tasks.
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="add_task_heads"):
        PeftModel.from_pretrained(build(), tmp_path)
    with pytest.raises((ValueError, RuntimeError), match="heads.1"):
        PeftModel.from_pretrained(add_task_heads(build(), {"half": 2, "third": 4}), tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_the_export_for_a_task_has_its_head(tmp_path, model_type):
    model = adapted(add_task_heads(build(model_type), LABELS), targets=None, router="task", tasks=TASKS).eval()
    perturb(model)
    batch = batch_of(model)
    with torch.no_grad():
        expected = model(**batch, task_ids=["half"] * 4).logits[:, :2]
    export_lora(model, tmp_path / "export", task="half")
    base = build(model_type)
    plain = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(model_type, **SIZES | {"num_labels": 2})
    )
    weights = {
        name: value for name, value in base.state_dict().items() if value.shape == plain.state_dict()[name].shape
    }
    plain.load_state_dict(weights, strict=False)
    exported = PeftModel.from_pretrained(plain, tmp_path / "export").eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(**batch).logits, expected, rtol=1e-4, atol=1e-4)

    with pytest.raises(ValueError, match="'half', 'third', and an export has one"):
        export_lora(model, tmp_path / "other", routing=[1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="can't be used with heads of tasks"):
        export_lora(model, tmp_path / "other", task="half", merge=True)


def test_an_adapter_without_heads_does_not_load_on_a_model_with_them(tmp_path):
    get_peft_model(build(), RLoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier"):
        PeftModel.from_pretrained(add_task_heads(build(), LABELS), tmp_path)
