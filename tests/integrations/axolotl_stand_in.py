"""
Axolotl's interface of plugins, for tests where axolotl is not installed: names and parameters only.

`test_axolotl.py` compares it with the real one where that is installed (axolotl 0.19.0).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    def get_input_args(self):
        return None

    def get_adapter_capabilities(self):
        return []

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        return None

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []

    def post_train_unload(self, cfg):
        return None
