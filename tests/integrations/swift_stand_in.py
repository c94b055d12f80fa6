"""
Ms-swift's interface of tuners, for tests where ms-swift is not installed: names and parameters only.

`test_ms_swift.py` compares it with the real one where that is installed (ms-swift 4.6.0).
"""

from peft import PeftModel


tuners_map = {}


class PeftTuner:
    @staticmethod
    def prepare_model(args, model):
        raise NotImplementedError

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        return PeftModel.from_pretrained(model, model_id, **kwargs)
