"""The plugin for vLLM, which serves tasks of R-LoRA adapters; see docs/integrations/vllm.md."""

import os


def register() -> None:
    """
    Register the resolver, if `RLORA_VLLM_ADAPTERS` names the adapters that may be served, and the experimental layers,
    if `RLORA_VLLM_LAYERS` is 1. May be called repeatedly.

    Raises:
        ValueError: If a setting can't be used.
        RuntimeError: If the layers are for another release of vLLM.
    """
    if os.environ.get("RLORA_VLLM_LAYERS", "").strip():
        from rlora_trl.integrations.vllm import layers_wanted

        if layers_wanted(os.environ):
            from rlora_trl.integrations.vllm_layers import register_layers

            register_layers()
    if os.environ.get("RLORA_VLLM_ADAPTERS", "").strip():
        from rlora_trl.integrations.vllm import register_resolver

        register_resolver()
