"""The resolver for vLLM: which names it serves, what it answers with, and what it refuses."""

import asyncio
import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_stand_ins
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from testing_utils import perturb, random_ids
from transformers import AutoModelForCausalLM

from rlora_plugins.vllm import register
from rlora_trl import RLoraConfig
from rlora_trl.files.checks import AdapterCheckError, check_adapter
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.files.record import AdapterRecord
from rlora_trl.integrations import vllm as integration
from rlora_trl.integrations import vllm_layers
from rlora_trl.integrations.vllm import (
    ADAPTERS,
    CACHE,
    CACHE_GB,
    LAYERS,
    MAX_KL,
    RESOLVER,
    AdapterTask,
    Settings,
    TaskExports,
    parse_name,
)


ROOT = Path(__file__).parents[2]
BASE = "org/base"
TASKS = ["sst2", "rte"]
FIELDS = {
    "user/task": {"router": "task"},
    "user/uniform": {"router": "uniform"},
    "user/softmax": {},
    "user/unmeasured": {},
    "org/unrecorded": {},
}
MEASURED = 0.02  # nats per token, in the record of `user/softmax`


@pytest.fixture(scope="module")
def repositories(model_folders, tmp_path_factory):
    """Folders of adapters by the name of their repository."""
    folders = {}
    for name, fields in FIELDS.items():
        folder = folders[name] = tmp_path_factory.mktemp("repository")
        base = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        model = get_peft_model(base, RLoraConfig(tasks=TASKS, task_type="CAUSAL_LM", **fields))
        perturb(model)
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained(folder)
        if name == "org/unrecorded":
            continue
        layers = check_adapter(folder).layers
        weights = {task: torch.rand(len(layers), 3).softmax(-1) for task in TASKS}
        exports = [{"task": "sst2", "path": "exports/sst2", "kl": MEASURED}] if name == "user/softmax" else []
        mixtures = HeadWeights(layers, weights, dict.fromkeys(TASKS, 10))
        AdapterRecord(base_model=BASE, mixtures=mixtures, exports=exports).save(folder)
    return folders


@pytest.fixture
def pulls(repositories, monkeypatch):
    """Names that were pulled; a repository that doesn't exist is an error of the Hub's client."""
    pulled = []

    def pull(repo_id, revision=None, *, base_model=None):
        pulled.append((repo_id, revision))
        if repo_id not in repositories:
            raise FileNotFoundError(f"404: {repo_id}")
        return check_adapter(repositories[repo_id], base_model=base_model, name=repo_id)

    monkeypatch.setattr(integration, "pull_checked", pull)
    return pulled


@pytest.fixture
def exports(monkeypatch):
    """Tasks that were exported."""
    made, export = [], integration.export_folder

    def slow(checked, folder, *, task):
        made.append(task)
        time.sleep(0.2)
        return export(checked, folder, task=task)

    monkeypatch.setattr(integration, "export_folder", slow)
    return made


@pytest.fixture
def log():
    """Messages of the plugin; vLLM's logger does not pass them to the root, where pytest looks."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    integration.logger.addHandler(handler)
    level = integration.logger.level
    integration.logger.setLevel(logging.INFO)
    yield messages
    integration.logger.removeHandler(handler)
    integration.logger.setLevel(level)


def settings(tmp_path, allowed=("*",), max_kl=None, cache_bytes=10**9, layers=False):
    return Settings(tuple(allowed), tmp_path / "cache", cache_bytes, max_kl, layers)


@pytest.fixture
def resolve(vllm, pulls, tmp_path):
    """Asks for names at once, as the clients of a server do; a list of answers."""

    def ask(*names, base=BASE, **values):
        resolver = integration.resolver_class()(settings(tmp_path, **values))

        async def together():
            return await asyncio.gather(*(resolver.resolve_lora(base, name) for name in names))

        return asyncio.run(together())

    return ask


@pytest.mark.parametrize("router", ["task", "uniform"])
@pytest.mark.parametrize("task", TASKS)
def test_answer_is_the_adapter_for_its_task(resolve, vllm, repositories, model_folders, router, task):
    name = f"user/{router}:{task}"
    (answer,) = resolve(name)
    assert isinstance(answer, vllm.LoRARequest)
    assert answer.lora_name == name and answer.lora_int_id > 0

    def base():
        return AutoModelForCausalLM.from_pretrained(model_folders["llama"])

    model = PeftModel.from_pretrained(base(), repositories[f"user/{router}"]).eval()
    if router == "task":
        model.set_task(task)
    plain = PeftModel.from_pretrained(base(), answer.lora_path).eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        expected = model(input_ids=random_ids()).logits
        torch.testing.assert_close(plain(input_ids=random_ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_requests_at_once_share_one_export(resolve, exports):
    first, second, third = resolve("user/task:sst2", "user/task:sst2", "user/task@main:sst2")
    assert exports == ["sst2"]
    assert first.lora_path == second.lora_path == third.lora_path
    assert resolve("user/task:sst2")[0].lora_path == first.lora_path
    assert exports == ["sst2"], "it was in the cache"
    assert resolve("user/task:rte")[0].lora_path != first.lora_path


def test_processes_share_one_export(repositories, tmp_path):
    """Each pulls and waits for the other's export."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from types import SimpleNamespace
from rlora_trl.files.checks import check_adapter
from rlora_trl.integrations import vllm
folder, root = Path({str(repositories["user/task"])!r}), Path({str(tmp_path)!r})
export = vllm.export_folder
def slow(*args, **kwargs):
    with open(root / "made", "a") as log: log.write("x")
    time.sleep(1)
    return export(*args, **kwargs)
vllm.export_folder, vllm.pull_checked = slow, lambda *args, **kwargs: check_adapter(folder)
exports = vllm.TaskExports(vllm.Settings(("*",), root / "cache", 10**9))
print("ready", flush=True); sys.stdin.readline()
print(exports.find("user/task:sst2", "org/base"))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=100)[0].strip() for process in processes]
    assert outputs[0] == outputs[1] and Path(outputs[0], "adapter_model.safetensors").is_file()
    assert (tmp_path / "made").read_text() == "x"


def test_tasks_of_a_uniform_adapter_are_one_export(resolve, exports):
    first, second = resolve("user/uniform:sst2", "user/uniform:rte")
    assert first.lora_path == second.lora_path and len(exports) == 1
    assert resolve("user/uniform:unknown") == [None]


def test_a_new_version_of_an_adapter_is_exported_again(resolve, repositories, exports, tmp_path):
    (old,) = resolve("user/task:sst2")
    path = repositories["user/task"] / "adapter_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(before), "lora_alpha": 16}))
        (new,) = resolve("user/task:sst2")
    finally:
        path.write_text(before)
    assert new.lora_path != old.lora_path and len(exports) == 2


def test_names_of_unknown_tasks_do_not_have_the_adapter_checked_each_time(resolve, pulls, log, monkeypatch):
    """A check reads all weights, which would let a client keep the server busy."""
    names = [f"user/task:{number}" for number in range(20)]
    assert resolve(*names, "user/task:sst2")[:-1] == [None] * 20
    assert pulls == [("user/task", None)]
    assert sum("The adapter's tasks are 'rte', 'sst2'" in message for message in log) == 20

    monkeypatch.setattr(integration, "_FRESH", 0.0)
    resolve("user/task:1", "user/task:sst2")
    assert len(pulls) == 3, "a new commit is seen after that time"


def test_few_checks_are_remembered(pulls, repositories, monkeypatch, tmp_path):
    for number in range(100):
        monkeypatch.setitem(repositories, f"user/copy-{number}", repositories["user/task"])
    exports = TaskExports(settings(tmp_path))
    for number in range(100):
        exports.find(f"user/copy-{number}:sst2", BASE)
    exports.find("user/copy-99:rte", BASE)
    exports.find("user/copy-0:rte", BASE)
    assert len(pulls) == 101


HOSTILE = {
    "no separator": "user/adapter",
    "parent": "../adapter:sst2",
    "parents": "user/../../etc:sst2",
    "absolute": "/etc/passwd:sst2",
    "three parts": "user/adapter/more:sst2",
    "one part": "adapter:sst2",
    "a tag of another tool": "llama3:8b",
    "drive": "C:\\adapter:sst2",
    "NUL": "user/ada\0pter:sst2",
    "NUL in the task": "user/task:ss\0t2",
    "line end": "user/task:sst2\nINFO all is well",
    "escape": "user/task:\x1b[2J",
    "surrogate": "user/task:\ud800",
    "long": "user/task:" + "x" * 100_000,
    "long repository": "user/" + "x" * 100 + ":sst2",
    "long revision": "user/task@" + "x" * 300 + ":sst2",
    "no task": "user/task:",
    "blank task": "user/task:  ",
    "revision that is a path": "user/task@../main:sst2",
    "revision that is absolute": "user/task@/main:sst2",
    "empty revision": "user/task@:sst2",
    "option": "--user/task:sst2",
    "address": "http://user/task:sst2",
    "empty": "",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_names_reach_neither_hub_nor_disk(resolve, pulls, log, tmp_path, kind):
    before = sorted((tmp_path / "cache").rglob("*")) if (tmp_path / "cache").exists() else []
    assert resolve(HOSTILE[kind]) == [None]
    assert pulls == []
    made = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not made and not before
    for message in log:
        assert message.isprintable() and len(message) < 3000
    assert bool(log) == (":" in HOSTILE[kind]), "names without a task are those of other models"


def test_names():
    assert parse_name("user/adapter:sst2") == AdapterTask("user/adapter", None, "sst2")
    assert parse_name("user/adapter@refs/pr/1:a:b") == AdapterTask("user/adapter", "refs/pr/1", "a:b")
    assert parse_name("u/a:Satz über Ähnliches").task == "Satz über Ähnliches"


def test_only_what_is_allowed(resolve, pulls, log):
    allowed = ("user/task", "org/*")
    answers = resolve("user/task:sst2", "user/uniform:sst2", "other/org/x:sst2", "User/task:sst2", allowed=allowed)
    assert [answer is not None for answer in answers] == [True, False, False, False]
    assert pulls == [("user/task", None)]
    assert any(f"'user/uniform' is not among the adapters in `{ADAPTERS}`" in message for message in log)
    resolve("org/missing:sst2", allowed=allowed)
    assert pulls[-1] == ("org/missing", None) and "FileNotFoundError: 404: org/missing" in log[-1]


def test_a_folder_is_not_a_repository(resolve, pulls, log, tmp_path, monkeypatch):
    (tmp_path / "user" / "task").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("user/task:sst2") == [None] and pulls == []
    assert "is also a folder in the working directory" in log[-1]


def test_adapter_of_another_base(resolve, log):
    assert resolve("user/task:sst2", base="org/other") == [None]
    assert "AdapterCheckError: user/task was trained on 'org/base', and is being loaded on 'org/other'" in log[-1]


def test_other_failures_are_not_hidden(vllm, tmp_path, monkeypatch):
    """A defect is no missing model: vLLM reports it."""

    def defect(*_, **__):
        raise RuntimeError("defect")

    monkeypatch.setattr(integration, "pull_checked", defect)
    resolver = integration.resolver_class()(settings(tmp_path))
    with pytest.raises(RuntimeError, match="defect"):
        asyncio.run(resolver.resolve_lora(BASE, "user/task:sst2"))


def test_gap_of_other_routers_is_logged(resolve, log):
    assert resolve("user/softmax:sst2")[0] is not None
    assert any("`router='softmax'`, so its export is an approximation, whose KL" in m and "is 0.02" in m for m in log)
    log.clear()
    assert resolve("user/unmeasured:sst2")[0] is not None
    assert any(message.startswith("WARNING") and "is unknown, as its record has none" in message for message in log)
    log.clear()
    assert resolve("user/task:sst2", "user/uniform:sst2")
    assert not any("approximation" in message for message in log)


@pytest.mark.parametrize(
    ("name", "max_kl", "served"),
    [
        ("user/softmax:sst2", 0.03, True),
        ("user/softmax:sst2", MEASURED, True),
        ("user/softmax:sst2", 0.01, False),
        ("user/softmax:rte", 0.03, False),  # not measured for this task
        ("user/unmeasured:sst2", 100.0, False),
        ("user/task:sst2", 0.0, True),
        ("user/uniform:sst2", 0.0, True),
    ],
)
def test_threshold(resolve, log, exports, name, max_kl, served):
    (answer,) = resolve(name, max_kl=max_kl)
    assert (answer is not None) == served == bool(exports)
    if not served:
        assert (
            "RefusedError" in log[-1] and f"`{MAX_KL}` is {max_kl:g}" in log[-1] and "Serve an adapter with" in log[-1]
        )


@pytest.mark.parametrize("kl", [float("nan"), -1.0, float("inf")])
def test_a_threshold_is_not_passed_by_nonsense(repositories, tmp_path, kl):
    checked = check_adapter(repositories["user/softmax"])
    checked.record.exports[0]["kl"] = kl
    assert integration.recorded_kl(checked, "sst2") is None


def test_with_layers_routers_of_tokens_are_served_exactly(resolve, exports, log):
    """Packed once for all tasks, beside exports; a threshold on the gap and a record don't matter."""
    names = ["user/softmax:sst2", "user/softmax:rte", "org/unrecorded:sst2", "user/task:sst2", "user/uniform:rte"]
    answers = resolve(*names, layers=True, max_kl=0.0)
    folders = [Path(answer.lora_path) for answer in answers]
    assert folders[0] == folders[1] and len(set(folders)) == 4
    assert sorted(exports) == ["rte", "sst2"], "of the routers by task"
    packed = load_file(folders[0] / "adapter_model.safetensors")
    plain = load_file(folders[3] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert packed[name].shape[1] == plain[name].shape[1] + 8
    assert any("which is served exactly" in m and "`--max-lora-rank` must be at least 16" in m for m in log)
    assert not any("approximation" in message for message in log)

    (answer,) = resolve("user/softmax:sst2")
    assert Path(answer.lora_path) not in folders, "a server without the layers shares the cache"
    assert resolve("user/softmax:unknown", layers=True) == [None]


def test_head_weights_must_be_known(resolve, log):
    assert resolve("org/unrecorded:sst2") == [None]
    assert "no mean weights are known for task 'sst2'" in log[-1]


def test_a_full_cache_refuses_and_serves_on(resolve, exports, log, tmp_path):
    (first,) = resolve("user/task:sst2")
    size = sum(path.stat().st_size for path in Path(first.lora_path).iterdir())
    first, second = resolve("user/task:sst2", "user/task:rte", cache_bytes=int(1.5 * size))
    assert first is not None and second is None
    assert "CacheFullError" in log[-1] and Path(first.lora_path).is_dir()


def test_a_damaged_adapter_leaves_nothing(vllm, tmp_path, monkeypatch):
    def damaged(*_, **__):
        raise AdapterCheckError("is truncated")

    monkeypatch.setattr(integration, "pull_checked", damaged)
    with pytest.raises(AdapterCheckError, match="truncated"):
        TaskExports(settings(tmp_path)).find("user/task:sst2", BASE)
    assert not [path for part in ("entries", "making") for path in (tmp_path / "cache" / part).iterdir()]


def test_many_requests_use_few_threads(resolve, monkeypatch):
    running, most = set(), []

    def pull(*_, **__):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.05)
        raise AdapterCheckError("no")

    monkeypatch.setattr(integration, "pull_checked", pull)
    assert resolve(*(f"user/adapter-{number}:sst2" for number in range(20))) == [None] * 20
    assert len(most) == 20 and max(most) <= 4


# Registration


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in (ADAPTERS, CACHE, CACHE_GB, MAX_KL, LAYERS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CACHE, str(tmp_path / "of-variable"))
    return monkeypatch


def test_registers_when_it_is_turned_on(vllm, environment, tmp_path):
    for value in (None, "", "  "):
        if value is not None:
            environment.setenv(ADAPTERS, value)
        register()
        assert not list(vllm.LoRAResolverRegistry.get_supported_resolvers())
    assert not (tmp_path / "of-variable").exists()

    environment.setenv(ADAPTERS, "user/*, org/adapter")
    environment.setenv(MAX_KL, "0.05")
    environment.setenv(CACHE_GB, "0.5")
    register()
    resolver = vllm.LoRAResolverRegistry.get_resolver(RESOLVER)
    register()
    assert vllm.LoRAResolverRegistry.get_resolver(RESOLVER) is resolver
    assert isinstance(resolver, vllm.LoRAResolver)
    expected = Settings(("user/*", "org/adapter"), tmp_path / "of-variable", 500_000_000, 0.05)
    assert resolver.exports.settings == expected


@pytest.mark.parametrize("value", ["0", "1", " 1 ", "", "yes", "2"])
def test_layers_are_registered_when_they_are_turned_on(vllm, environment, value):
    registered = []
    environment.setattr(vllm_layers, "register_layers", lambda: registered.append(True))
    environment.setenv(LAYERS, value)
    if value in ("yes", "2"):
        with pytest.raises(ValueError, match=f"`{LAYERS}` must be 0 or 1, got '{value}'"):
            register()
        return
    register()
    assert len(registered) == int(value or "0") and not list(vllm.LoRAResolverRegistry.get_supported_resolvers())
    environment.setenv(ADAPTERS, "*")
    register()
    assert vllm.LoRAResolverRegistry.get_resolver(RESOLVER).exports.settings.layers == (value.strip() == "1")


@pytest.mark.parametrize("name", [CACHE_GB, MAX_KL])
@pytest.mark.parametrize("value", ["much", "nan", "-1", "inf"])
def test_settings_that_cannot_be_used(vllm, environment, name, value):
    environment.setenv(ADAPTERS, "*")
    environment.setenv(name, value)
    with pytest.raises(ValueError, match=f"`{name}` must be a number of at least 0, got '{value}'"):
        register()
    assert not list(vllm.LoRAResolverRegistry.get_supported_resolvers())


@pytest.mark.parametrize(
    "name",
    ['"user/adapter"', "'*'", "https://huggingface.co/user/adapter", "adapter", "user/adapter:sst2", "user/a b"],
)
def test_repositories_that_no_request_can_match(vllm, environment, name):
    """Quotes, for example, which a shell removes, and a file of variables for a container does not."""
    environment.setenv(ADAPTERS, f"org/adapter,{name}")
    with pytest.raises(ValueError, match=f"`{ADAPTERS}` must have names of repositories.*got {re.escape(repr(name))}"):
        register()
    assert not list(vllm.LoRAResolverRegistry.get_supported_resolvers())


@pytest.mark.parametrize("name", ["*", "*-r-lora", "org/*", "user/a?", "[ab]*/x", "org.a/b_c-1"])
def test_repositories_that_requests_can_match(environment, name):
    assert Settings.from_environment({ADAPTERS: name}).allowed == (name,)


@pytest.mark.parametrize("folder", ["file", "file/cache", "~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_written(vllm, environment, tmp_path, folder):
    """When the server starts, and by the name of the setting."""
    (tmp_path / "file").write_text("")
    environment.setenv(ADAPTERS, "*")
    environment.setenv(CACHE, folder if folder.startswith("~") else str(tmp_path / folder))
    with pytest.raises(ValueError, match=f"`{CACHE}`.* to a folder that can be written|`{CACHE}` is '~nobody"):
        register()
    assert not list(vllm.LoRAResolverRegistry.get_supported_resolvers())


def test_a_cache_is_a_whole_path(environment, tmp_path):
    """Workers have another working directory; and spaces are no name."""
    environment.chdir(tmp_path)
    settings = [Settings.from_environment({ADAPTERS: "*", CACHE: value}) for value in ("exports", "  ")]
    assert [found.cache for found in settings] == [
        tmp_path / "exports",
        Settings.from_environment({ADAPTERS: "*"}).cache,
    ]


def test_defaults(environment):
    environment.delenv(CACHE)
    values = Settings.from_environment({ADAPTERS: "*"})
    assert values.cache.parts[-2:] == ("rlora_trl", "vllm")
    assert (values.cache_bytes, values.max_kl) == (20_000_000_000, None)
    with pytest.raises(ValueError, match=f"`{ADAPTERS}` must name"):
        Settings.from_environment({ADAPTERS: " , "})


def test_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["rlora"].partition(":")
    assert (module, name) == (register.__module__, register.__name__)


def test_plugin_that_is_off_imports_nothing():
    code = "import sys, rlora_plugins.vllm as p; p.register(); assert not {'torch', 'peft', 'vllm'} & set(sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != ADAPTERS}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_module_imports_without_vllm(monkeypatch):
    for name in ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, integration.__name__)
    assert importlib.import_module(integration.__name__) is not integration
    with pytest.raises(ImportError):
        integration.resolver_class()


# The page


RECORDER = """
record() { printf '%s\\0' "$@" > "$LOG/$1"; }
pip() { record pip "$@"; }
vllm() { record vllm "$@"; env -0 > "$LOG/env"; }
curl() { record curl "$@"; }
"""


def test_block_of_the_page(vllm, pulls, repositories, monkeypatch, tmp_path):
    """As written, with other programs of the names pip, vllm and curl: the server's settings serve the request."""
    page = (ROOT / "docs" / "integrations" / "vllm.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", page, re.DOTALL).group(1)
    assert page.index("```bash") < 20, "the page starts with it"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RLORA_", "VLLM_"))}
    environment |= {"LOG": str(tmp_path), CACHE: str(tmp_path / "cache")}
    subprocess.run(["bash", "-euc", f"{RECORDER}{block}\nwait"], check=True, cwd=tmp_path, env=environment)
    installed, served, asked, variables = (
        (tmp_path / name).read_text().rstrip("\0").split("\0") for name in ("pip", "vllm", "curl", "env")
    )
    assert installed[1] == "install" and "." in installed
    assert served[1] == "serve" and {"--enable-lora", "--max-lora-rank"} <= set(served)
    variables = dict(line.split("=", 1) for line in variables)
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"

    request = json.loads(asked[asked.index("-d") + 1])
    monkeypatch.setitem(repositories, parse_name(request["model"]).repo_id, repositories["user/task"])
    resolver = integration.resolver_class()(Settings.from_environment(variables))
    answer = asyncio.run(resolver.resolve_lora(BASE, request["model"]))
    config = json.loads(Path(answer.lora_path, "adapter_config.json").read_text())
    assert config["r"] == int(served[served.index("--max-lora-rank") + 1])


def test_page_has_the_settings():
    page = (ROOT / "docs" / "integrations" / "vllm.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(RLORA_VLLM_\w+)` \| (.*?) \|", page, re.MULTILINE))
    assert list(table) == [ADAPTERS, CACHE, CACHE_GB, LAYERS, MAX_KL]
    assert float(table[CACHE_GB]) * 1e9 == Settings.from_environment({ADAPTERS: "*"}).cache_bytes


# vLLM itself


def test_stand_ins_are_like_vllm(real_vllm):
    """Methods and their parameters, in order and by name; fields with their defaults."""
    for owner, name in [("LoRAResolver", "resolve_lora")]:
        ours, theirs = (getattr(getattr(module, owner), name) for module in (vllm_stand_ins, real_vllm))
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
        assert inspect.iscoroutinefunction(theirs) and name in real_vllm.LoRAResolver.__abstractmethods__
    for name in ("get_supported_resolvers", "register_resolver", "get_resolver"):
        ours, theirs = (getattr(module.LoRAResolverRegistry, name) for module in (vllm_stand_ins, real_vllm))
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    values = {"lora_name": "a", "lora_int_id": 3, "lora_path": "/path"}
    ours, theirs = (module.LoRARequest(**values) for module in (vllm_stand_ins, real_vllm))
    for name in inspect.signature(vllm_stand_ins.LoRARequest).parameters:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_vllm_finds_the_plugin(real_vllm, environment, tmp_path, monkeypatch):
    """By the entry point of an installed package, as a server does when it starts."""
    plugins = pytest.importorskip("vllm.plugins")
    distribution = tmp_path / "rlora_trl-0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: rlora-trl-of-this-test\nVersion: 0\n")
    group, value = "vllm.general_plugins", "rlora_plugins.vllm:register"
    (distribution / "entry_points.txt").write_text(f"[{group}]\nrlora = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "plugins_loaded", False)
    monkeypatch.setattr(real_vllm.LoRAResolverRegistry, "resolvers", {})
    environment.setenv(ADAPTERS, "user/*")
    environment.setenv("VLLM_PLUGINS", "rlora")
    plugins.load_general_plugins()
    assert list(real_vllm.LoRAResolverRegistry.get_supported_resolvers()) == [RESOLVER]


def test_a_server_of_vllm_asks_the_resolver(real_vllm, pulls, exports, tmp_path, monkeypatch):
    """The part of vLLM's server that answers for models, which has the resolver's answer loaded by vLLM's own code."""
    try:
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
        from vllm.lora import lora_model
        from vllm.lora.peft_helper import PEFTHelper
    except ImportError as error:
        pytest.skip(f"vLLM's server can't be imported here: {error}")
    monkeypatch.setattr(lora_model, "PIN_MEMORY", False)
    loaded = {}

    async def add_lora(request):
        helper = PEFTHelper.from_local_dir(request.lora_path, None)
        projections = {"gate_proj", "up_proj", "down_proj"}
        loaded[request.lora_name] = lora_model.LoRAModel.from_local_checkpoint(
            request.lora_path, projections, helper, lora_model_id=request.lora_int_id, device="cpu"
        )

    monkeypatch.setattr(real_vllm.LoRAResolverRegistry, "resolvers", {})
    resolver = integration.resolver_class()(settings(tmp_path))
    real_vllm.LoRAResolverRegistry.register_resolver(RESOLVER, resolver)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(model=BASE), renderer=None, input_processor=None, add_lora=add_lora
    )

    async def serve():
        models = OpenAIServingModels(engine, [])
        names = ("user/task:sst2", "user/task:sst2", "user/task:rte", "user/task:none", "../task:sst2")
        return await asyncio.gather(*map(models.resolve_lora, names))

    first, second, other, unknown, hostile = asyncio.run(serve())
    assert first is second and first.lora_int_id != other.lora_int_id and sorted(exports) == ["rte", "sst2"]
    assert unknown.error.code == hostile.error.code == 404
    layers = loaded["user/task:sst2"].loras
    assert len(layers) == 6 and all(weights.rank == 8 and weights.scaling == 1.0 for weights in layers.values())
