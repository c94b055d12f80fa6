"""No network and no telemetry, set before anything of Hugging Face is imported; and fixtures that folders share."""

import gc
import os
import signal
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# `nohup` and background jobs ignore them, and programs leave it so; tests send these signals.
for name, handler in (("SIGHUP", signal.SIG_DFL), ("SIGINT", signal.default_int_handler)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(ROOT / "examples"))

import processes
import pytest
import torch
from testing_utils import TINY_MODELS, build_tokenizer


def pytest_collection_finish():
    """
    Exclude what imports made from later garbage collections.

    Each trainer collects several times, which would take half a second every time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """The same for the imports of earlier test files."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def fresh_compiler():
    """Forget what `torch.compile` made of this code in earlier tests, which counts toward its limit."""
    import torch._dynamo

    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tokenizer):
    """Folders of the tiny models by name, each with a tokenizer."""
    folders = {}
    for name, build in TINY_MODELS.items():
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp(name)
        build().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts training runs on the CPU, of one rank or of several, in milliseconds."""
    server = processes.Server(tmp_path_factory.mktemp("server"), {**os.environ, **processes.CPU})
    yield server
    server.close()


@pytest.fixture(scope="session")
def smollm2():
    """Folder of the real 135M model, or a skip where its package is not installed."""
    from smollm2 import smollm2_folder

    try:
        return str(smollm2_folder())
    except ImportError as error:
        pytest.skip(str(error))
