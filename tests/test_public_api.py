"""What `import rlora_trl` gives, costs, and promises; and the README's snippet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlora_trl


ROOT = Path(__file__).parent.parent


def test_names():
    assert len(set(rlora_trl.__all__)) == len(rlora_trl.__all__)
    for name in rlora_trl.__all__:
        assert getattr(rlora_trl, name) is not None
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", rlora_trl.__version__)
    with pytest.raises(AttributeError, match="no_such_name"):
        rlora_trl.no_such_name  # noqa: B018


def test_import_registers_and_loads_neither_trl_nor_datasets(tmp_path):
    """In a program of the user's that is called like the command, and imports it too."""
    code = (
        "import sys, rlora_cli, rlora_trl, peft\n"
        "assert 'trl' not in sys.modules and 'datasets' not in sys.modules, 'heavy imports'\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\n"
        "assert m['RLORA'] is rlora_trl.RLoraConfig\n"
        "rlora_trl.tuner.register(); assert m['RLORA'] is rlora_trl.RLoraConfig\n"
        "import rlora_trl.trainer; assert rlora_trl.RLoraSFTTrainer is rlora_trl.trainer.RLoraSFTTrainer\n"
    )
    program = tmp_path / "rlora"
    program.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, str(program)], check=True, env=environment)


def readme_snippet():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return snippets[0]


def test_readme_snippet_runs_as_written(model_folders, tmp_path, monkeypatch, capsys):
    """Word for word, but for the model's name, which stands for a download."""
    snippet = readme_snippet()
    assert len([line for line in snippet.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    code = snippet.replace("Qwen/Qwen2.5-0.5B", model_folders["llama"])
    assert code != snippet
    exec(code, {})
    promised = re.search(r"print\(.*\)\s+# (.*)", snippet).group(1)
    assert capsys.readouterr().out.splitlines()[-1] == promised


def test_readme_names_both_commands():
    text = (ROOT / "README.md").read_text()
    assert "make quickstart" in text and "make test" in text


def test_importing_registers_after_the_command_ran_in_the_same_process():
    """As in a notebook."""
    code = (
        "import sys, rlora_cli, torch\n"
        "for words in (['--version'], ['--help'], ['no-such-command'], ['env']):\n"
        "    sys.argv = ['rlora', *words]\n"
        "    try: rlora_cli.main()\n"
        "    except SystemExit: pass\n"
        "import rlora_trl\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\n"
        "assert m['RLORA'] is rlora_trl.RLoraConfig\n"
        "import rlora_cli\n"
        "assert rlora_cli.app is not None\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
