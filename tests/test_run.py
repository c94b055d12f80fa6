"""`python -m rlora_trl.run`: programs as Python runs them, with R-LoRA registered."""

import json
import os
import py_compile
import sys

import processes
import pytest

from rlora_trl import run


SHOW = """\
import json, multiprocessing, sys
import neighbor
main = sys.modules["__main__"]
registered = "peft" in sys.modules and "RLORA" in sys.modules["peft.mapping"].PEFT_TYPE_TO_CONFIG_MAPPING
facts = {"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "same": vars(main) is globals(),
         "spec": getattr(__spec__, "name", None), "package": __package__, "neighbor": neighbor.VALUE}
print(json.dumps([facts, registered]))
sys.exit(7)
"""


def python(*words, cwd):
    path = os.pathsep.join([str(processes.ROOT), os.environ.get("PYTHONPATH", "")])
    return processes.run(
        [sys.executable, *map(str, words)], cwd=cwd, env={**os.environ, **processes.CPU, "PYTHONPATH": path}
    )


@pytest.fixture
def program(tmp_path):
    """A script, and the same in a package, each with a module beside it."""
    for folder in (tmp_path / "scripts", tmp_path / "tools"):
        folder.mkdir()
        (folder / "show.py").write_text(SHOW)
        (folder / "neighbor.py").write_text(f"VALUE = {folder.name!r}")
    py_compile.compile(str(tmp_path / "scripts" / "show.py"), str(tmp_path / "scripts" / "compiled.pyc"))
    (tmp_path / "tools" / "show.py").write_text(SHOW.replace("import neighbor", "from . import neighbor"))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [("scripts/show.py",), ("scripts/compiled.pyc",), ("-m", "tools.show")],
    ids=["script", "compiled", "module"],
)
def test_as_python_runs_it(program, words):
    words = [*words, "--help", "-m", "x", "--", "-c"]
    plain = python(*words, cwd=program)
    result = python("-m", "rlora_trl.run", *words, cwd=program)
    assert plain.returncode == result.returncode == 7, result.stderr
    (expected, was_registered), (facts, registered) = json.loads(plain.stdout), json.loads(result.stdout)
    assert facts == expected and facts["name"] == "__main__" and facts["same"]
    assert registered and not was_registered


def test_an_exception_ends_it_with_its_traceback(tmp_path):
    (tmp_path / "fails.py").write_text("def f():\n    raise KeyError('of the program')\nf()\n")
    result = python("-m", "rlora_trl.run", "fails.py", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert 'fails.py", line 2, in f' in result.stderr and result.stderr.endswith("KeyError: 'of the program'\n")


def test_a_pipe_is_run(tmp_path):
    """As `<(...)` of a shell gives it: it can be read once, and must not be taken for an empty program."""
    code = "import os, subprocess, sys; r, w = os.pipe(); os.write(w, b'print(6 * 7, __name__)'); os.close(w); "
    code += (
        "sys.exit(subprocess.run([sys.executable, '-m', 'rlora_trl.run', f'/dev/fd/{r}'], pass_fds=[r]).returncode)"
    )
    result = python("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "42 __main__\n"), result.stderr


def test_folder_with_a_main_module(tmp_path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text(
        "import os, sys, helper\nprint(helper.X, sys.argv, os.path.abspath(sys.path[0]))"
    )
    (tmp_path / "app" / "helper.py").write_text("X = 3")
    plain, result = (python(*words, "app", "a", cwd=tmp_path) for words in ((), ("-m", "rlora_trl.run")))
    assert (result.stdout, result.returncode) == (plain.stdout, 0), result.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "the program is missing"),
        (["-m"], "the program is missing"),
        (["none.py", "a"], "'none.py' does not exist"),
        (["-u", "none.py"], "no such option: -u. Options of Python belong before"),
        (["-c", "print(1)"], "'-c' is not accepted: name a script, or `-m` and a module"),
        (["-"], "'-' is not accepted: name a script"),
        (["-m", "none"], "there is no module 'none'. Name one that `python -m` finds"),
        (["-m", "none.of.these"], "there is no module 'none.of.these'"),
        (["-m", "tools.none"], "there is no module 'tools.none'"),
        (["-m", "tools.show.none"], "there is no module 'tools.show.none'"),
        (["-m", "tools"], "the package 'tools' has no `__main__` module"),
        (["tools"], "the folder 'tools' has no `__main__.py`"),
    ],
)
def test_no_program(words, reason, capsys, program, monkeypatch):
    monkeypatch.chdir(program)
    monkeypatch.syspath_prepend(program)
    (program / "tools" / "show.py").write_text("")
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as caught:
        run.main(words)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err


def test_an_import_that_fails_around_a_module_is_shown(tmp_path, monkeypatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("import a_module_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(ModuleNotFoundError, match="a_module_that_nobody_has"):
        run.main(["-m", "broken_package.show"])


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert caught.value.code == 0 and "accelerate launch -m rlora_trl.run" in capsys.readouterr().out
