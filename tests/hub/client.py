"""Runs source text that talks to the Hub, in forks of a process that has everything imported and has used nothing yet.

`huggingface_hub` reads its settings when it is imported, so client code cannot run in pytest's own process.
"""

import contextlib
import linecache
import time

import peft  # noqa: F401
import testing_utils  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401
from trl import SFTTrainer  # noqa: F401

import rlora_cli.app  # noqa: F401
from rlora_trl import RLoraSFTTrainer, export_lora, pull_adapter, push_adapter, zoo  # noqa: F401


with contextlib.suppress(ImportError):
    import bitsandbytes  # noqa: F401  (PEFT imports it where it is installed)


def execute(folder, source, variables):
    """Execute source text with these variables; what it leaves in its variable `result`."""
    # As many waits before another attempt as users have, but shorter ones.
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 10)
    # Lines of the source in tracebacks.
    linecache.cache["<source>"] = (len(source), None, source.splitlines(keepends=True), "<source>")
    namespace = {"__name__": "__client__", **variables}
    exec(compile(source, "<source>", "exec"), namespace)
    return namespace.get("result")
