"""Tasks with pictures: on a tiny Llava, whose tokens are made with the batch."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_task_features import USER
from testing_utils import TINY_MODELS, build_tokenizer, task_rows
from trainer_utils import arguments
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from rlora_trl import MultiHeadAdapter, RLoraConfig, RLoraSFTTrainer
from rlora_trl.trainer.task_ids import TASK_IDS


PIL = pytest.importorskip("PIL.Image")
TASKS = ["red", "blue"]
SIZE, PATCH = 8, 4


@pytest.fixture(scope="module")
def processor():
    # The one that needs no torchvision.
    from transformers import CLIPImageProcessorPil

    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {% if message['content'] is string %}"
        "{{ message['content'] }} {% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def build_model(processor):
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=16,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=TINY_MODELS["llama"]().config,
            image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        )
    )


def picture(task):
    return PIL.new("RGB", (SIZE, SIZE), task)


def rows(task, count, form="image"):
    answers = [{"prompt": f"<image> {row['prompt']}", "completion": f" {task}"} for row in task_rows("first", count)]
    if form == "messages":
        answer = {"role": "assistant", "content": task}
        return [{"images": [picture(task)], "messages": [USER, answer]} for _ in answers]
    if form == "images":
        return [{"images": [picture(task)] * 2, **row, "prompt": f"<image> {row['prompt']}"} for row in answers]
    return [{"image": picture(task), **row} for row in answers]


def datasets(form="image", **counts):
    return {
        task: Dataset.from_list(rows(task, count, form)) for task, count in (counts or {"red": 12, "blue": 4}).items()
    }


def column(by_task):
    listed = [{**row, "task": task} for task, dataset in by_task.items() for row in dataset]
    return Dataset.from_list(listed)


LANGUAGE_MODEL = ".*language_model.*(gate|up|down)_proj"


def make_trainer(processor, folder, train, router="task", evaluate=None, targets=LANGUAGE_MODEL, **kwargs):
    torch.manual_seed(0)
    return RLoraSFTTrainer(
        build_model(processor),
        arguments(folder, per_device_train_batch_size=4, **{"max_steps": 2, "max_length": None, **kwargs}),
        train_dataset=train,
        eval_dataset=evaluate,
        processing_class=processor,
        peft_config=RLoraConfig(router=router, target_modules=targets),
    )


@pytest.mark.parametrize("form", ["image", "images", "messages"])
@pytest.mark.parametrize("kind", ["dictionary", "column", "stream"])
def test_training_knows_the_task_of_each_picture(processor, tmp_path, kind, form):
    train = datasets(form)
    if kind == "stream":
        train = {task: dataset.to_iterable_dataset() for task, dataset in train.items()}
    trainer = make_trainer(processor, tmp_path, column(train) if kind == "column" else train, max_steps=4)
    names = trainer._task_data.names
    assert sorted(names) == sorted(TASKS)
    words = {processor.tokenizer.convert_tokens_to_ids(task): task for task in TASKS}
    seen, tokens = Counter(), Counter()
    for batch in trainer.get_train_dataloader():
        for ids, mask, task in zip(batch["input_ids"], batch["attention_mask"], batch[TASK_IDS].tolist(), strict=True):
            (own,) = {words[token] for token in ids.tolist() if token in words}
            assert names[task] == own
            seen[own] += 1
            tokens[own] += int(mask.sum())
    assert seen == {"red": 12, "blue": 4}
    trainer.train()
    assert trainer.tasks_seen() == {task: {"rows": seen[task], "tokens": tokens[task]} for task in names}
    if kind != "stream":
        assert dict(trainer.mixture.rows) == dict(seen)


@pytest.mark.parametrize("kind", ["dictionary", "column"])
def test_rows_are_mixed(processor, tmp_path, kind):
    train = datasets() if kind == "dictionary" else column(datasets())
    trainer = make_trainer(processor, tmp_path, train, mixing="equal", max_steps=-1, num_train_epochs=1)
    assert trainer.mixture.draws == {"red": 8, "blue": 8}
    trainer.train()
    assert {task: counts["rows"] for task, counts in trainer.tasks_seen().items()} == {"red": 8, "blue": 8}
    with pytest.raises(ValueError, match="counts the column 'input_ids'.*images.*Set `mixing_unit='rows'`"):
        make_trainer(processor, tmp_path, train, mixing="equal", mixing_unit="tokens")


@pytest.mark.parametrize("form", ["image", "images"])
def test_evaluation_by_task(processor, tmp_path, form):
    given = datasets(form, red=4, blue=4)
    # Options would be scored without the picture.
    options = {task: data.add_column("options", [[" red", " blue"]] * 4) for task, data in given.items()}
    trainer = make_trainer(processor, tmp_path, datasets(form), evaluate=options, eval_strategy="steps", eval_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_red_loss", "eval_blue_loss", "eval_loss"} <= set(metrics) and "eval_accuracy" not in metrics
    by_column = trainer.evaluate(column(given), metric_key_prefix="test")
    assert by_column["test_red_loss"] == pytest.approx(metrics["eval_red_loss"], rel=1e-5)
    # With the mixture of its own task, which differ by now.
    adapters = [module for module in trainer.model.modules() if isinstance(module, MultiHeadAdapter)]
    with torch.no_grad():
        for adapter in adapters:
            adapter.router += torch.randn_like(adapter.router)
    unknown = trainer.evaluate({"other": given["red"]})
    assert unknown["eval_other_loss"] != pytest.approx(trainer.evaluate()["eval_red_loss"], rel=1e-4)


def test_the_right_mixture_is_trained(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, {"red": datasets()["red"], "blue": datasets()["blue"]})
    adapters = [module for module in trainer.model.modules() if isinstance(module, MultiHeadAdapter)]
    batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset.filter(lambda row: row[TASK_IDS] == 1))))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert [(adapter.router.grad.abs().sum(1) > 0).tolist() for adapter in adapters] == [[False, True]] * len(adapters)


def test_all_linear_layers(processor, tmp_path):
    """Those of the encoder see the patches of pictures, one picture for each row here."""
    trainer = make_trainer(processor, tmp_path, datasets(), targets="all-linear", max_steps=4)
    trainer.train()
    assert {task: counts["rows"] for task, counts in trainer.tasks_seen().items()} == {"red": 12, "blue": 4}


def test_one_data_set_of_pictures_without_tasks(processor, tmp_path):
    trainer = make_trainer(processor, tmp_path, datasets()["red"], router="softmax")
    trainer.train()
    assert trainer.tasks_seen() == {} and np.isfinite(trainer.state.log_history[0]["loss"])


QUESTIONS = [{"image": picture("red"), "question": "<image> w1", "answer": "w2"}] * 4
NO_COMPLETION = [*rows("red", 3), {"image": picture("red"), "prompt": "<image> w1", "completion": None}]


@pytest.mark.parametrize(
    "listed, settings, message",
    [
        (QUESTIONS, {}, "has the columns 'image', 'question', 'answer'; accepted with images are 'messages', or"),
        (
            QUESTIONS,
            {"remove_unused_columns": False},
            "'answer'; accepted with images are 'messages', 'text', or 'prompt' with 'completion'. Rename",
        ),
        ([{"image": picture("red"), "text": "<image> w1"}], {}, "has the columns 'image', 'text'; accepted"),
        (NO_COMPLETION, {}, ", row 4, column 'completion': it is missing or null, and must be text"),
    ],
)
@pytest.mark.parametrize("place", ["train", "eval"])
def test_other_columns_are_refused_before_the_first_step(processor, tmp_path, listed, settings, message, place):
    good, other = datasets()["red"], Dataset.from_list(listed)
    data = {"train": other} if place == "train" else {"train": good, "evaluate": other}
    with pytest.raises(ValueError, match=f"The dataset {place!r}.*{message}"):
        make_trainer(processor, tmp_path, router="softmax", **data, **settings)


def test_plain_text_beside_pictures(processor, tmp_path):
    dataset = Dataset.from_list([{"image": picture("red"), "text": "<image> w1", "prompt": None}] * 4)
    options = {"router": "softmax", "remove_unused_columns": False, "max_steps": 1}
    assert make_trainer(processor, tmp_path, dataset, **options).train().global_step == 1


def test_pictures_of_one_task_only(processor, tmp_path):
    text = Dataset.from_list(task_rows("first", 4))
    with pytest.raises(ValueError, match="Task 'red' has a column 'image' and task 'text' has not"):
        make_trainer(processor, tmp_path, {"red": datasets()["red"], "text": text})
    # A row may have an empty list of pictures.
    lists = datasets("images", red=4)
    lists["text"] = Dataset.from_list([{"images": [], **row} for row in task_rows("first", 4)])
    trainer = make_trainer(processor, tmp_path, lists)
    trainer.train()
    assert sum(counts["rows"] for counts in trainer.tasks_seen().values()) == 8
