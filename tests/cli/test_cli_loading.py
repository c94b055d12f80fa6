"""What commands share: adapters, bases and data, by their names."""

import json

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from rlora_cli.loading import load_adapter, local_record
from rlora_trl import RLoraConfig, requirements
from rlora_trl.files.checks import check_adapter


def test_adapters_that_are_not_there(rlora, rows_folder, tmp_path):
    result = rlora("eval", tmp_path / "nothing", "--data", rows_folder)
    assert result.exit_code == 1 and "There is no folder" in result.stderr
    result = rlora("eval", "user/nothing", "--data", rows_folder)
    assert result.exit_code == 1 and "not in the cache" in result.stderr
    result = rlora("pull", tmp_path / "nothing")
    assert result.exit_code == 1 and "There is no folder" in result.stderr
    (tmp_path / "empty").mkdir()
    result = rlora("pull", tmp_path / "empty")
    assert result.exit_code == 1 and "adapter_config.json" in result.stderr


def test_save_is_for_folders_of_the_user(rlora, make_adapter, rows_folder):
    with pytest.raises(ValueError, match="rlora pull user/name --output FOLDER"):
        local_record(check_adapter(make_adapter()), "user/name")


def test_dtype_and_quantization_of_the_base(make_adapter, model_folders, tmp_path):
    assert load_adapter(check_adapter(make_adapter()), dtype="bfloat16").model.dtype == torch.bfloat16
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama64"])
    get_peft_model(model, RLoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "four")
    loaded = load_adapter(check_adapter(tmp_path / "four"), load_in_4bit=True)
    assert loaded.model.get_base_model().is_loaded_in_4bit


@pytest.mark.parametrize("command", ["eval", "analyze", "export"])
def test_4_bits_need_bitsandbytes_before_anything_is_read(rlora, monkeypatch, command):
    monkeypatch.setattr(requirements, "find_spec", lambda name: None)
    output = ["out"] if command == "export" else []
    result = rlora(command, "no-adapter", *output, "--data", "no-data", "--load-in-4bit")
    assert result.exit_code == 2
    assert "needs bitsandbytes, which is not installed. Run `pip" in " ".join(result.stderr.replace("│", "").split())


def test_a_base_in_a_folder_that_is_not_here(rlora, make_adapter, rows_folder):
    result = rlora("eval", make_adapter(), "--data", rows_folder, "--base", "/models/moved")
    assert result.exit_code == 1
    assert "There is no model in /models/moved. It is the base model of the adapter" in result.stderr


@pytest.mark.parametrize("command", ["eval", "analyze", "export"])
@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"question": "a", "answer": "b"}],
            "has the columns 'question', 'answer'; accepted are 'prompt' with 'comple",
        ),
        ([{"prompt": "a", "completion": None}], "rows.jsonl, row 1, column 'completion': it is missing or null"),
        ([{"prompt": "a", "completion": 4}], "rows.jsonl, row 1, column 'completion': it is 4, of type int"),
        ('{"prompt": "a",', "rows.jsonl, line 1: Expecting property name enclosed in double quotes"),
        ("", "rows.jsonl is empty."),
    ],
    ids=["columns", "null", "number", "broken", "empty"],
)
def test_data_of_another_form(rlora, make_adapter, tmp_path, command, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
    output = [tmp_path / "out"] if command == "export" else []
    result = rlora(command, make_adapter(), *output, "--data", path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr and "Traceback" not in result.stderr


def test_plain_text_has_no_answer_to_score(rlora, make_adapter, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1 w2"}')
    assert "plain text has no answer to score" in rlora("eval", make_adapter(), "--data", path).stderr
    assert rlora("analyze", make_adapter("again"), "--data", path).exit_code == 0


def test_conversations_are_analyzed_and_exported(rlora, make_adapter, tmp_path):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "task": "same"}))
    folder, data = make_adapter(), tmp_path / "rows.jsonl"
    assert rlora("analyze", folder, "--data", data).exit_code == 0
    result = rlora("export", folder, tmp_path / "out", "--task", "same", "--data", data, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["rows"] == 1, result.stderr
