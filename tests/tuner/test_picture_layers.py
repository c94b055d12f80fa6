"""Adapters of vision towers, which see all pictures of a batch at once: each picture must belong to a known row."""

import picture_models
import pytest
import torch
from peft import get_peft_model
from testing_utils import perturb
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from rlora_trl import RLoraConfig


TASKS = ["first", "second"]
TOWER = r".*(vision_tower|visual)\..*\.fc[12]"
IMAGE = picture_models.IMAGE_TOKEN


def adapted(name, **fields):
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[name](**picture_models.SETTINGS[name]))
    settings = {"target_modules": TOWER, "router": "task", "tasks": TASKS, **fields}
    model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    perturb(model, scale=1.0)
    return model


def llava_batch(pictures_of_rows):
    """Rows of equal length with some pictures each."""
    block, rows = [IMAGE] * picture_models.PATCHES, []
    for count in pictures_of_rows:
        rows.append(block * count + [7] * (2 * len(block) + 4 - count * len(block)))
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": picture_models.pictures(sum(pictures_of_rows)),
    }


def qwen_batch(heights):
    """A picture of 4 columns of patches in each row; four patches are one token."""
    rows = [[IMAGE] * height + [7] * (12 - height) for height in heights]
    ids = torch.tensor(rows)
    width = 6 * picture_models.PATCH**2
    patches = torch.randn(4 * sum(heights), width, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, height, 4] for height in heights]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def first_logits(model, batch, **settings):
    """Of the next token of each row, in a call and in `generate`."""
    with torch.no_grad():
        called = model(**batch, **settings).logits[:, -1]
    generated = model.generate(
        **batch, **settings, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    torch.testing.assert_close(generated.logits[0].float(), called, rtol=1e-4, atol=1e-4)
    return called


def by_task(model, batch):
    results = []
    for task in TASKS:
        model.set_task(task)
        results.append(first_logits(model, batch))
    model.set_task(None)
    assert not torch.allclose(results[0], results[1], atol=1e-3)
    return results


def test_one_picture_in_each_row():
    model, batch = adapted("llava"), llava_batch([1, 1])
    first, second = by_task(model, batch)
    mixed = first_logits(model, batch, task_ids=TASKS)
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-4)


UNEVEN = {"llava": llava_batch([2, 0]), "qwen2_vl": qwen_batch([8, 4])}


@pytest.mark.parametrize("name", UNEVEN)
def test_rows_with_different_pictures_are_refused(name):
    """As many pictures as rows, or patches that divide by the rows, are not one for each row."""
    model, batch = adapted(name), UNEVEN[name]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"fc1' sees the pictures.*`task_ids` differs.*Pass one row at a time"):
            call(**batch, task_ids=TASKS)
    by_task(model, batch)  # one task for all rows

    model.add_adapter("other", RLoraConfig(task_type="CAUSAL_LM", target_modules=TOWER))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"`adapter_names` differs"):
            call(**batch, adapter_names=["other", "__base__"])


def test_generation_with_pictures_of_one_size():
    model, batch = adapted("qwen2_vl"), qwen_batch([4, 4])
    settings = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    alone = []
    for task in TASKS:
        model.set_task(task)
        alone.append(model.generate(**batch, **settings).logits[0])
    mixed = model.generate(**batch, **settings, task_ids=TASKS).logits[0]
    torch.testing.assert_close(mixed, torch.stack([alone[0][0], alone[1][1]]), rtol=1e-4, atol=1e-4)


def test_a_batch_of_one_row_is_of_one_task():
    model, batch = adapted("qwen2_vl"), qwen_batch([8])
    first, second = by_task(model, batch)
    for task, expected in zip(TASKS, (first, second), strict=True):
        torch.testing.assert_close(first_logits(model, batch, task_ids=[task]), expected)


def test_adapters_of_the_language_model_may_get_any_pictures():
    model, batch = adapted("llava", target_modules=None), llava_batch([2, 0])
    first, second = by_task(model, batch)
    mixed = first_logits(model, batch, task_ids=TASKS)
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-4)
    # Nor is a tower refused whose router needs no tasks.
    first_logits(adapted("llava", router="softmax", tasks=None), batch)
