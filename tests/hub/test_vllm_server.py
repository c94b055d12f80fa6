"""vLLM's own server with the plugin, where the command `vllm` is installed, on a CPU or a GPU."""

import ast
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from processes import Program, free_port
from safetensors.torch import load_file
from testing_utils import _DECODER, build_tokenizer, perturb
from transformers import LlamaConfig, LlamaForCausalLM

from rlora_trl import RLoraConfig
from rlora_trl.files.layout import published_files
from rlora_trl.integrations.vllm_layers import VLLM_VERSION


pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("vllm") is None, reason="vLLM is not installed")]

ROOT = Path(__file__).parents[2]
TASKS = ["sst2", "rte"]
PROMPT = [10, 20, 33, 12, 41, 7, 9, 22]
# Of the logarithms of probabilities, computed in float32 by other kernels; measured 2.6e-6 on a CPU. The adapters
# change them by more than 1.
TOLERANCE = 1e-3
VLLM = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Fewer places than adapters, so that vLLM reads exports again later.
OPTIONS = "--enable-lora --max-lora-rank 16 --max-loras 2 --max-cpu-loras 2 --enforce-eager --dtype float32".split()
SIZES = ["--max-model-len", "64", "--max-num-seqs", "8"]


@torch.no_grad()
def predicted(model):
    return model(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


@pytest.fixture
def adapters(hub, tmp_path):
    """A base model, which vLLM's CPU kernels can run, and the predictions of adapters by the name of a model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.08}
    base = LlamaForCausalLM(LlamaConfig(**{**_DECODER, **sizes})).eval()
    base.save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")

    expected = {"base": predicted(base)}
    top_k = {"router_top_k": 2, "router_init": "kaiming_uniform"}
    for router, fields in {"task": {}, "uniform": {}, "softmax": {}, "top_k": top_k}.items():
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        config = RLoraConfig(router=router, tasks=TASKS, task_type="CAUSAL_LM", **fields)
        model = get_peft_model(model, config).eval()
        perturb(model, 1.0)
        model.peft_config["default"].base_model_name_or_path = "user/base"
        model.save_pretrained(tmp_path / router)
        for task in TASKS:
            if router == "task":
                model.set_task(task)
            expected[f"user/{router}:{task}"] = predicted(model)
        folder = tmp_path / router
        hub.commit(f"user/{router}", {path: (folder / path).read_bytes() for path in published_files(folder)})
    return expected


def installed_version():
    """The version of vLLM that the command runs."""
    code = "import importlib.metadata as m; print({d.metadata['Name']: d.version for d in m.distributions()})"
    python = Path(shutil.which("vllm")).with_name("python")
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return next(version for name, version in ast.literal_eval(found.stdout).items() if name in ("vllm", "vllm-cpu"))


KINDS = ["exports", "layers", "layers, compiled", "layers, two ranks", "layers, two ranks, fully sharded"]


@pytest.fixture(params=KINDS)
def server(request, hub, adapters, tmp_path):
    """The address of the server, and the models that it is asked for."""
    layers = request.param.startswith("layers")
    options = [option for option in OPTIONS if "compiled" not in request.param or option != "--enforce-eager"]
    ranks = ["--tensor-parallel-size", "2"] if "two ranks" in request.param else []
    ranks += ["--fully-sharded-loras"] if "fully sharded" in request.param else []
    if layers and installed_version().partition("+")[0] != VLLM_VERSION:
        pytest.skip(f"the layers are for vLLM {VLLM_VERSION}")
    entry_point = tmp_path / "installed" / "rlora_plugin_of_this_test-0.dist-info"
    entry_point.mkdir(parents=True)
    (entry_point / "METADATA").write_text("Metadata-Version: 2.1\nName: rlora-plugin-of-this-test\nVersion: 0\n")
    (entry_point / "entry_points.txt").write_text("[vllm.general_plugins]\nrlora = rlora_plugins.vllm:register\n")
    path = os.pathsep.join([str(ROOT), str(entry_point.parent), os.environ.get("PYTHONPATH", "")])
    environment = hub.env(PYTHONPATH=path, RLORA_VLLM_ADAPTERS="user/*", HF_HUB_OFFLINE="0", **VLLM)
    environment["RLORA_VLLM_LAYERS"] = str(int(layers))

    port = free_port()
    command = ["vllm", "serve", str(tmp_path / "base"), "--served-model-name", "base", "--port", str(port)]
    program = Program(
        [*command, "--host", "127.0.0.1", *options, *SIZES, *ranks], tmp_path / "log.txt", env=environment
    )
    try:
        for _ in range(240):
            assert program.process.poll() is None, program.tail()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                time.sleep(2)
        served = ("user/",) if layers else ("user/task:", "user/uniform:")
        names = [name for name in adapters if name.startswith(served)]
        yield f"http://127.0.0.1:{port}/v1/completions", names
    finally:
        program.stop()


def ask(address, model):
    """The ten most probable next tokens with the logarithms of their probabilities; or the status of an error."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 10}
    body = json.dumps({**body, "return_tokens_as_token_ids": True}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=200) as answer:
            found = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
    except urllib.error.HTTPError as error:
        return error.code
    return {int(token.removeprefix("token_id:")): value for token, value in found.items()}


def largest_difference(answer, expected):
    return max(abs(value - float(expected[token])) for token, value in answer.items())


def test_tasks_are_served(server, adapters, hub):
    address, names = server
    exact = "user/softmax:sst2" in names
    # vLLM's own kernels for CPUs give requests for the base wrong results in a batch with adapters.
    others = ["base", "base"] if exact else []
    for _ in range(2):  # the second time from other places in vLLM's memory
        with ThreadPoolExecutor(16) as threads:
            asked = [*names, names[0], *others, "user/none:sst2", "user/task:none", "other/task:sst2", "../task:sst2"]
            answers = list(threads.map(lambda name: ask(address, name), asked))
        assert answers[-4:] == [404] * 4
        for name, answer in zip(asked, answers[:-4], strict=False):
            assert largest_difference(answer, adapters[name]) < TOLERANCE, name
            assert name == "base" or largest_difference(answer, adapters["base"]) > 1, name

    assert largest_difference(ask(address, "base"), adapters["base"]) < TOLERANCE
    exports = list((hub.home / "rlora_trl" / "vllm" / "entries").iterdir())
    assert len(exports) == (5 if exact else 3), "two tasks, and one for both tasks of each other router"
    assert all(load_file(path / "adapter_model.safetensors") for path in exports)
