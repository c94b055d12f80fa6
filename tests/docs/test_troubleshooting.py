"""docs/troubleshooting.md: each message on it is one of the package, so that the page can't become outdated unseen."""

import ast
import re
from functools import cache

import pytest
from processes import ROOT


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SYMPTOMS = re.findall(r"```text\n(.*?)\n```", PAGE, re.DOTALL)
# Messages of other programs, with the file that shows where they come from.
OTHERS = {
    "CUDA out of memory": None,  # PyTorch
    "'Parameter' object has no attribute 'CB'": "docs/quantization.md",
    "KeyError: 'RLORA'": "tests/integrations/test_trl_page.py",
    "You set `ignore_mismatched_sizes` to `False`, thus raising an error.": None,  # transformers
    "Unknown PEFT type passed": "docs/integrations/axolotl.md",
    "missing 1 required positional argument: 'peft_config'": "tests/integrations/test_trl_page.py",
    "Failed to load CPU gemm_4bit_forward from kernels-community": None,  # bitsandbytes 0.50, backends/cpu/ops.py
}


def template(node):
    """The text of a string or f-string, with "..." for its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value


@cache
def messages():
    """All texts in the source of the package and its command."""
    found = set()
    for package in ("rlora_trl", "rlora_cli"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                    found.add(template(node))
    return found


def is_in(symptom, text):
    """Whether the parts of a symptom occur in this order."""
    return re.search(".*".join(map(re.escape, symptom.split("..."))), text, re.DOTALL) is not None


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_symptom_is_a_message_of_the_package(symptom):
    assert len(symptom.replace("...", "").strip()) >= 17, "too little to search for"
    if symptom in OTHERS:
        shown_in = OTHERS[symptom]
        assert shown_in is None or symptom in " ".join((ROOT / shown_in).read_text(encoding="utf-8").split())
    else:
        assert any(is_in(symptom, text) for text in messages())


def test_page_is_complete():
    """At least 25 messages, none twice, each with a remedy below it."""
    assert len(set(SYMPTOMS)) == len(SYMPTOMS) >= 25
    assert len(re.findall(r"```text\n[^`]*(?:`[^`]+`[^`]*)*?\n```\n\n(?=\S)(?!```|#)", PAGE)) == len(SYMPTOMS)
    assert set(OTHERS) <= set(SYMPTOMS)


def test_a_changed_message_is_found():
    assert not is_in(
        "`balance_loss=...` needs a router with many heads",
        template(ast.parse("f'`balance_loss={x}` needs a router with several heads'", mode="eval").body),
    )
    assert is_in("a ... c ... e", "a ... c d ... e") and not is_in("a ... c ... e", "c ... a ... e")
