"""The plugin for vLLM, which serves tasks of R-LoRA adapters as plain LoRA; see docs/integrations/vllm.md."""

import os


def register() -> None:
    """
    Register the resolver, if `RLORA_VLLM_ADAPTERS` names the adapters that may be served. May be called repeatedly.

    Raises:
        ValueError: If a setting can't be used.
    """
    if os.environ.get("RLORA_VLLM_ADAPTERS", "").strip():
        from rlora_trl.integrations.vllm import register_resolver

        register_resolver()
