"""Pages of docs/integrations, and an adapter for other tools as training leaves one."""

import re

import pytest
from peft import get_peft_model
from processes import ROOT
from testing_utils import build_tokenizer, perturb
from transformers import AutoModelForCausalLM

from rlora_trl import RLoraConfig


@pytest.fixture
def blocks():
    """The blocks of a language on a page."""

    def find(page, language):
        text = (ROOT / "docs" / "integrations" / page).read_text(encoding="utf-8")
        return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)

    return find


@pytest.fixture
def adapter(model_folders, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]), RLoraConfig(task_type="CAUSAL_LM")
    )
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"
