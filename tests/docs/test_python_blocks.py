"""
Python blocks of the documentation, run as written, page by page, on tiny models.

Blocks of a page share their names, as a reader would type them. Names of models and adapters are folders of the
working directory, so that nothing is downloaded; what a page has introduced in words only is made here. Blocks that
can't run here say where they do.
"""

import sys

import pytest
import torch
from blocks import BLOCKS
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from processes import ROOT
from testing_utils import TINY_MODELS, build_tokenizer, perturb, task_rows
from transformers import AutoModelForCausalLM, ViTConfig, ViTModel

from rlora_trl import RLoraConfig, RLoraSFTConfig
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.files.record import AdapterRecord
from rlora_trl.tuner.layer import RLoraLayer


sys.path.append(str(ROOT / "tests" / "convert"))
from authors_code import authors_model, save, tiny_base, train


# Part of a block, and where it is run or why it is not.
NOT_HERE = {
    ("README.md", 'print(AutoPeftModelForCausalLM.from_pretrained("adapter")'): "tests/test_public_api.py",
    ("README.md", "trainer.push_to_hub(exports"): "tests/hub/test_hub_pages.py",
    ("docs/hub.md", "push_adapter(model"): "tests/hub/test_hub_pages.py",
    ("docs/hub.md", 'revision="5d1f0b1e..."'): "tests/hub/test_hub_pages.py",
    ("docs/hub.md", "zoo.compare"): "tests/hub/test_hub_pages.py",
    ("docs/integrations/ms-swift.md", "ms_swift import register"): "tests/integrations/test_ms_swift.py",
    ("docs/integrations/signatures.md", "sign="): "tests/hub/test_signed_push.py",
    ("docs/integrations/trl.md", "SFTTrainer("): "tests/integrations/test_trl_page.py",
    ("docs/integrations/vllm.md", "export_data="): "tests/hub/test_hub_pages.py",
    ("docs/convert.md", 'model.save_pretrained("start'): "a line for the script of the authors' code",
}
# What a CPU needs, where transformers asks for a GPU otherwise.
ON_A_CPU = {
    'DPOConfig("dpo", max_steps=4)': 'DPOConfig("dpo", max_steps=4, bf16=False, use_cpu=True)',
    "bf16=True": "use_cpu=True",
}
PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})
MODELS = ("Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-135M-Instruct")


def python_blocks(page):
    return [block for block in BLOCKS if block.page == page and block.language == "python"]


def reason(block):
    return next((why for (page, part), why in NOT_HERE.items() if page == block.page and part in block.text), None)


def adapter(folder, **fields):
    """An adapter of the tiny model that has left its initial values, with a tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(MODELS[0])
    model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM", tasks=["sst2", "rte"], **fields))
    perturb(model)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    layers = tuple(name for name, module in model.get_base_model().named_modules() if isinstance(module, RLoraLayer))
    weights = {task: torch.full((len(layers), 3), 1 / 3) for task in ("sst2", "rte")}
    AdapterRecord(mixtures=HeadWeights(layers, weights, dict.fromkeys(weights, 9))).save(folder)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """A working directory with models and adapters, and the names that pages use without making them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    for model in MODELS:
        TINY_MODELS["llama64"]().save_pretrained(model)
        build_tokenizer().save_pretrained(model)
    TINY_MODELS["bert"]().save_pretrained("google-bert/bert-base-uncased")
    vit = ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=32)
    ViTModel(vit).save_pretrained("google/vit-base-patch16-224-in21k")
    adapter("adapter")
    adapter("other")
    adapter("task-adapter", router="task")
    return {
        "__name__": "page",
        "model": AutoPeftModelForCausalLM.from_pretrained("adapter").eval(),
        "base": AutoModelForCausalLM.from_pretrained(MODELS[0]),
        "tokenizer": build_tokenizer(),
        "rows": task_rows("first", 4),
        "other_rows": task_rows("same", 4),
        "RLoraConfig": RLoraConfig,
        "RLoraSFTConfig": RLoraSFTConfig,
    }


def convert_md(names, folder):
    """What the authors' code leaves, and an adapter of PEFT's LoRA."""
    model = authors_model(tiny_base(), rank_stablization=True, random_heads=True)
    for name in ("start", "run"):
        (folder / name).mkdir()
        save(folder / name / "sft_lora_model", model)
        train(model)
    train(model)
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(MODELS[0]), LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained("my-lora")


def other_trainers_md(names, folder):
    row = {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}
    data = Dataset.from_list([{**row, "labels": task, "task_ids": task} for task in (0, 1)] * 4)
    names |= {"train_dataset": data, "eval_dataset": data}


# What a page has before its first block.
BEFORE = {"docs/convert.md": convert_md, "docs/other-trainers.md": other_trainers_md}


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, names, tmp_path, capsys):
    if page in BEFORE:
        BEFORE[page](names, tmp_path)
    for block in python_blocks(page):
        text = block.text
        for written, here in ON_A_CPU.items():
            text = text.replace(written, here)
        code = compile("\n" * (block.line - 1) + text, page, "exec")  # errors name the line of the page
        if reason(block) is None:
            capsys.readouterr()
            exec(code, names)
            follows = next((other for other in BLOCKS if other.page == page and other.line > block.line), None)
            if follows is not None and follows.language == "text":
                assert capsys.readouterr().out.strip() == follows.text.strip()


@pytest.mark.parametrize("part", NOT_HERE)
def test_exceptions_are_on_their_page(part):
    page, text = part
    found = sum(text in block.text for block in python_blocks(page))
    assert found == 1 or (page == "README.md" and found == 0)  # the README has what fits on a screen
    where = NOT_HERE[part]
    assert not where.startswith("tests/") or (ROOT / where).exists()
