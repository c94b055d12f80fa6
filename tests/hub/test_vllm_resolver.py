"""The plugin for vLLM against a real HTTP server: from the name of a model to a plain LoRA adapter."""

import json
from pathlib import Path

import pytest
from samples import BASE, save_adapter

from rlora_trl.files.layout import published_files


REPO = "user/words"
PATHS = [str(Path(__file__).parents[1] / "integrations")]
ASK = """
import asyncio, os, sys, types
sys.path[:0] = paths
import vllm_stand_ins
for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(vars(vllm_stand_ins))
os.environ.update(environment)
from rlora_plugins.vllm import register
register()
resolver = vllm_stand_ins.LoRAResolverRegistry.get_resolver("R-LoRA")

async def together():
    return await asyncio.gather(*(resolver.resolve_lora(base, name) for name in names))

result = [answer and answer.lora_path for answer in asyncio.run(together())]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), router="task")


def contents(folder):
    return {path: (Path(folder) / path).read_bytes() for path in published_files(folder)}


@pytest.fixture
def ask(hub, worker, folder, tmp_path):
    hub.commit(REPO, contents(folder))

    def run(*names, base=BASE, **environment):
        environment = {"RLORA_VLLM_ADAPTERS": "user/*", "RLORA_VLLM_CACHE": str(tmp_path / "cache"), **environment}
        return worker.run(ASK, names=names, base=base, paths=PATHS, environment=environment)

    return run


def test_first_request_pulls_and_exports_and_later_ones_do_not(hub, ask):
    first, again, other = ask(f"{REPO}:first", f"{REPO}:first", f"{REPO}:same")
    assert first == again != other
    for path in (first, other):
        assert sorted(file.name for file in Path(path).iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        config = json.loads(Path(path, "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 8, BASE)

    hub.requests.clear()
    assert ask(f"{REPO}:first") == [first], "another server with the same cache"
    assert hub.downloaded_bytes() == 0


def test_a_new_commit_is_another_adapter(hub, ask, tmp_path):
    old_commit = hub.head(REPO)
    (old,) = ask(f"{REPO}:first")
    newer = save_adapter(tmp_path / "newer", seed=8, router="task")
    hub.commit(REPO, {"adapter_model.safetensors": (newer / "adapter_model.safetensors").read_bytes()})
    new, pinned = ask(f"{REPO}:first", f"{REPO}@{old_commit}:first")
    assert pinned == old != new


def test_what_the_hub_does_not_have_is_not_served(hub, ask):
    names = ["user/none:first", f"{REPO}:none", f"{REPO}@no-such-branch:first", "other/words:first"]
    assert ask(*names) == [None] * 4
    assert ask(f"{REPO}:first", base="user/another-base") == [None]


def test_a_damaged_adapter_is_not_served(hub, ask, folder):
    weights = (folder / "adapter_model.safetensors").read_bytes()
    hub.commit(REPO, {"adapter_model.safetensors": weights[:-8]})
    assert ask(f"{REPO}:first") == [None]
    hub.commit(REPO, {"adapter_model.safetensors": weights, "handler.py": b"print()"})
    assert ask(f"{REPO}:first") == [None]


def test_without_the_hub_the_cache_serves(hub, ask):
    (online,) = ask(f"{REPO}:first")
    hub.fail("*", "/api/", drop_after=0, times=None)
    assert ask(f"{REPO}:first", "user/none:first") == [online, None]
