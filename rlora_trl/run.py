"""Run a program that does not import this package, with R-LoRA registered in PEFT.

    python -m rlora_trl.run script.py ARGUMENTS
    python -m rlora_trl.run -m module ARGUMENTS
    accelerate launch -m rlora_trl.run script.py ARGUMENTS

The program is run like by `python script.py` and `python -m module`: same `sys.argv`, `sys.path`, `__main__` and exit
code. `python -m` has imported the package, which registers the method, before this module runs.
"""

from __future__ import annotations

import os
import runpy
import sys
import zipfile
from importlib.machinery import SourceFileLoader, SourcelessFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn


USAGE = "usage: python -m rlora_trl.run (SCRIPT | -m MODULE) [ARGUMENTS]"


def main(words: list[str]) -> None:
    """
    Run a script or a module as the main program of this process.

    Args:
        words (`list[str]`): A script, or `-m` and a module, then the program's own arguments.

    Raises:
        SystemExit: With code 2 if no program is named, or it does not exist or is a package or folder without a
            `__main__` module; 0 after `--help`; or as the program exits.
    """
    if words[:1] in (["-h"], ["--help"]):
        sys.stdout.write(f"{USAGE}\n\n{__doc__}")
        raise SystemExit(0)
    is_module = words[:1] == ["-m"]
    program, arguments = (words[1:2], words[2:]) if is_module else (words[:1], words[1:])
    if not program:
        _refuse("the program is missing: name a script, or `-m` and a module")
    if program[0] == "-" or program[0].startswith("-c"):
        _refuse(f"{program[0]!r} is not accepted: name a script, or `-m` and a module. /dev/stdin is a script, too")
    if program[0].startswith("-"):
        _refuse(f"no such option: {program[0]}. Options of Python belong before `-m rlora_trl.run`")

    if is_module:
        sys.argv = ["-m", *arguments]  # the name while Python searches for the module
        _check_module(program[0])
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        return
    if not os.path.exists(program[0]):
        _refuse(f"{program[0]!r} does not exist. Name a script, or `-m` and a module")
    if os.path.isdir(program[0]) and not any(name.startswith("__main__.") for name in os.listdir(program[0])):
        _refuse(f"the folder {program[0]!r} has no `__main__.py`. Name a script in it")
    _run_path(program[0], arguments)


def _check_module(name: str) -> None:
    """Refuse a module that does not exist. Packages around it are imported, as `python -m` does."""
    try:
        found = find_spec(name)
        main = found and (found.submodule_search_locations is None or find_spec(f"{name}.__main__"))
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import in a package around it
        found = None
    except (ImportError, ValueError):
        return  # of a name that is no name; the text of `runpy` says so
    if found is None:
        _refuse(f"there is no module {name!r}. Name one that `python -m` finds, or a script")
    if not main:
        _refuse(f"the package {name!r} has no `__main__` module. Name a module in it")


def _run_path(path: str, arguments: list[str]) -> None:
    """Run a script, or a folder or zip file with a `__main__.py`."""
    sys.argv = [path, *arguments]
    # A pipe, such as `<(...)` of a shell, can be read once: only ordinary files are looked into.
    is_source = not os.path.isdir(path) and not (os.path.isfile(path) and zipfile.is_zipfile(path))
    # `python -m` has put the working directory first. `runpy` puts a folder or a zip file there itself.
    if not sys.flags.safe_path:
        sys.path[0:1] = [os.path.dirname(os.path.realpath(path))] if is_source else []
    if not is_source:
        runpy.run_path(path, run_name="__main__")
        return

    # Not with `runpy`, which makes `__file__` and `sys.argv[0]` one path: Python's are absolute and as typed.
    module = ModuleType("__main__")
    module.__file__ = os.path.abspath(path)
    sys.modules["__main__"] = module
    if path.endswith(".pyc"):
        module.__loader__ = compiled = SourcelessFileLoader("__main__", module.__file__)
        code = compiled.get_code("__main__")
    else:
        module.__loader__ = loader = SourceFileLoader("__main__", module.__file__)
        code = loader.source_to_code(loader.get_data(module.__file__), module.__file__)
    assert code is not None  # only for the type checker: loaders raise
    exec(code, vars(module))


def _refuse(reason: str) -> NoReturn:
    sys.stderr.write(f"{USAGE}\nrlora_trl.run: {reason}.\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
