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


def run_python(*arguments):
    """Run Python with this tree in its path; its stdout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *arguments], check=True, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout


def test_import_registers_and_loads_neither_trl_nor_datasets(tmp_path):
    """In a user's program with the name of the command."""
    code = (
        "import sys, rlora_trl, peft\n"
        "assert 'trl' not in sys.modules and 'datasets' not in sys.modules, 'heavy imports'\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\n"
        "assert m['RLORA'] is rlora_trl.RLoraConfig\n"
        "rlora_trl.tuner.register(); assert m['RLORA'] is rlora_trl.RLoraConfig\n"
        "import rlora_trl.trainer; assert rlora_trl.RLoraSFTTrainer is rlora_trl.trainer.RLoraSFTTrainer\n"
    )
    program = tmp_path / "rlora"
    program.write_text(code)
    run_python(str(program))


@pytest.mark.slow
def test_import_takes_little_longer_than_that_of_peft():
    """At most 1.5 times; each in a process of its own, in turns, and the fastest of several counts."""
    code = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"
    seconds = {"peft": [], "rlora_trl": []}
    for _ in range(5):
        for name, times in seconds.items():
            times.append(float(run_python("-c", code.format(name))))
    assert min(seconds["rlora_trl"]) <= 1.5 * min(seconds["peft"]), seconds


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


def test_the_command_runs_in_a_process_that_goes_on():
    """As in a notebook: what is imported afterwards registers, and the command runs again."""
    code = (
        "import sys, rlora_cli\n"
        "for words in (['--version'], ['--help'], ['no-such-command'], ['env']):\n"
        "    sys.argv = ['rlora', *words]\n"
        "    try: rlora_cli.main()\n"
        "    except SystemExit: pass\n"
        "import rlora_trl\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\n"
        "assert m['RLORA'] is rlora_trl.RLoraConfig\n"
    )
    run_python("-c", code)
