"""From training to somebody else's machine: train, push, wipe, search, pull, load in all ways, generate, export."""

import json
import shutil
from pathlib import Path

import pytest
from samples import BASE, save_base


HERE = Path(__file__).parent
PATHS = [str(HERE), str(HERE.parent)]
REPO = "user/words-r-lora"
TRAIN = """
import sys
sys.path[:0] = paths
import torch
from testing_utils import random_ids, task_datasets
from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer

torch.manual_seed(0)
settings = {"max_steps": 30, "learning_rate": 1e-2, "router_learning_rate": 2e-2, "use_cpu": True, "bf16": False}
trainer = RLoraSFTTrainer(
    base,
    RLoraSFTConfig(folder, report_to=[], disable_tqdm=True, hub_model_id=repo, **settings),
    train_dataset=task_datasets(),
    eval_dataset=task_datasets(20, 1),
    peft_config=RLoraConfig(r=4, num_heads=3),
)
trainer.train()
trainer.evaluate()
trainer.push_to_hub(exports=["colour"])
model = trainer.model.eval()
with torch.no_grad():
    result = model(input_ids=random_ids()).logits.tolist()
"""
# The ways of the contract. Each leaves `model`.
WAYS = {
    "AutoPeftModel": """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(repo)
""",
    "transformers": """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(repo)
""",
    "PeftModel": """
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo)
""",
    "load_adapter": """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(repo, adapter_name="first")
model.load_adapter(repo, "other")
model.set_adapter("other")
""",
    "a pulled folder": """
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(rlora_trl.pull_adapter(repo))
""",
}
COMPUTE = """
import torch
ids = torch.tensor(ids)
model.eval()
with torch.no_grad():
    text = model.generate(ids[:1], max_new_tokens=5).tolist()
    result = {"logits": model(input_ids=ids).logits.tolist(), "text": text}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def test_from_training_to_somebody_elses_machine(hub, worker, base, tmp_path):
    import torch
    from testing_utils import random_ids

    hub.commit(BASE, base)
    trained = worker.run(TRAIN, base=BASE, repo=REPO, folder=str(tmp_path / "run"), paths=PATHS)
    # Another machine: nothing in the cache, no training folder.
    hub.wipe()
    shutil.rmtree(tmp_path / "run")

    search = "from rlora_trl import zoo; result = [info.to_dict() for info in zoo.search(base_model=base)]"
    found = worker.run(search, base=BASE)
    assert [info["repo_id"] for info in found] == [REPO]
    assert found[0]["tasks"] == ["first", "colour", "same"] and found[0]["exports"] == {"colour": "exports/colour"}
    assert {"loss"} <= set(found[0]["metrics"]["colour"])

    inputs = {"repo": REPO, "base": BASE, "ids": random_ids().tolist()}
    texts = set()
    for name, way in WAYS.items():
        answer = worker.run("import rlora_trl\n" + way + COMPUTE, **inputs)
        logits = torch.tensor(answer["logits"])
        assert (logits - torch.tensor(trained)).abs().max() < 1e-5, f"loaded by {name}, it is another function"
        texts.add(json.dumps(answer["text"]))
    assert len(texts) == 1

    _export_works_without_this_package(hub, worker, inputs)


def _export_works_without_this_package(hub, worker, inputs):
    import torch

    stock = """
        import json, sys
        sys.modules["rlora_trl"] = None  # importing it fails, as where it is not installed
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(inputs["base"])
        model = PeftModel.from_pretrained(model, inputs["repo"], subfolder="exports/colour")
        assert type(model.peft_config["default"]).__name__ == "LoraConfig"
        ids = inputs["ids"]
    """
    stock = "\n".join(line.removeprefix("        ") for line in stock.splitlines())
    printed = hub.run(f"inputs = {inputs!r}\n" + stock + COMPUTE + "\nprint(json.dumps(result))")
    exported = torch.tensor(json.loads(printed.splitlines()[-1])["logits"])
    fixed = """
        import rlora_trl, torch
        from peft import AutoPeftModelForCausalLM
        from rlora_trl.files.record import find_record
        from rlora_trl.tuner.selection import fixed_head_weights
        model = AutoPeftModelForCausalLM.from_pretrained(repo).eval()
        mixtures = find_record(model.peft_config["default"]).mixtures
        with torch.no_grad(), fixed_head_weights(model, "default", mixtures.for_task("colour")):
            result = model(input_ids=torch.tensor(ids)).logits.tolist()
    """
    expected = torch.tensor(worker.run(fixed, **inputs))
    torch.testing.assert_close(exported, expected, rtol=0, atol=1e-4)
    dynamic = worker.run("import rlora_trl\n" + WAYS["AutoPeftModel"] + COMPUTE, **inputs)["logits"]
    assert (exported - torch.tensor(dynamic)).abs().max() > 1e-4, "the router has learnt nothing: a weak test"
