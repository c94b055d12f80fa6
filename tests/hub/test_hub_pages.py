"""Blocks of the documentation that talk to the Hub, as written, against a real HTTP server."""

import re
from pathlib import Path

import pytest
from processes import ROOT
from samples import save_adapter, save_base


HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent)]
BASE = "Qwen/Qwen2.5-0.5B"
# What a reader of the page has made before: a trained trainer, an adapter of it, and rows.
BEFORE = """
import os, sys
sys.path[:0] = paths
os.chdir(folder)
from peft import AutoPeftModelForCausalLM
from testing_utils import build_tokenizer, task_datasets, task_rows
from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer, push_adapter

rows, tokenizer = task_rows("first", 4), build_tokenizer()
model = AutoPeftModelForCausalLM.from_pretrained("adapter")
"""
TRAINED = """
settings = {"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True, "hub_model_id": "user/trained"}
tasks = dict(zip(("sst2", "rte", "trec"), task_datasets(12).values(), strict=True))
trainer = RLoraSFTTrainer(base, RLoraSFTConfig("trained", **settings), train_dataset=tasks, peft_config=RLoraConfig())
trainer.train()
trainer.save_model()
"""


def python_blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def blocks(page, part):
    """The Python block of a page that has this part."""
    (block,) = [block for block in python_blocks(page) if part in block]
    return block


@pytest.fixture
def run(hub, worker, tmp_path):
    hub.commit(BASE, save_base(tmp_path / "base"))
    save_adapter(tmp_path / "adapter", base=BASE, tasks=["sst2", "rte"])

    def execute(source):
        return worker.run(BEFORE + source, paths=PATHS, folder=str(tmp_path), base=BASE)

    return execute


def test_publish(hub, run):
    """With exports and scores, from a trainer, a folder and a model; then the same adapter again."""
    run(TRAINED + blocks("docs/hub.md", "push_adapter(model"))
    assert {"README.md", "adapter_config.json", "exports/sst2/adapter_config.json"} <= set(hub.files("user/trained"))
    card = hub.files("user/adapter")["README.md"].decode()
    assert "sst2" in card and "license: mit" in hub.files("user/trained")["README.md"].decode()


def test_pull(hub, run, tmp_path):
    pushed = run('push_adapter("adapter", "user/adapter")\n')
    assert pushed is None
    commit = hub.head("user/adapter")
    source = blocks("docs/hub.md", 'revision="5d1f0b1e..."').replace("5d1f0b1e...", commit)
    assert source.count(commit) == 1
    assert commit in run(source + "result = folder")


def test_the_zoo(hub, run, tmp_path):
    save_adapter(tmp_path / "second", seed=2, base=BASE, tasks=["sst2"])
    run('push_adapter("adapter", "user/adapter"); push_adapter("second", "org/other")')
    found = run(blocks("docs/hub.md", "zoo.compare") + "result = sorted(model.peft_config)")
    assert found == ["adapter", "other"]


def test_exports_with_data(hub, run):
    before = TRAINED + 'model = AutoPeftModelForCausalLM.from_pretrained("trained")\n'
    run(before + blocks("docs/integrations/vllm.md", "export_data="))
    assert "nats per token" in hub.files("user/words-r-lora")["exports/sst2/README.md"].decode()


@pytest.mark.parametrize(
    "block", [block for block in python_blocks("README.md") if "push_to_hub" in block or "zoo." in block]
)
def test_readme(hub, run, tmp_path, block):
    save_adapter(tmp_path / "second", seed=2, base=BASE, tasks=["sst2"])
    run('push_adapter("adapter", "user/adapter"); push_adapter("second", "org/other")\n' + TRAINED + block)
