"""The wheel and the sdist: what is in them, and the wheel alone in an environment without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import CPU, ROOT, run

import rlora_trl
from release import contents


BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(what, source, output):
    """Call the build back end as pip does, in an environment that has it."""
    output.mkdir(exist_ok=True)
    done = run([sys.executable, "-c", BUILD, what, str(output)], cwd=source)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """An sdist of the files that git knows, and a wheel built from that sdist alone."""
    if not (ROOT / ".git").exists():
        pytest.skip("There is no repository that lists the files.")
    folder = tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    sdist = build("build_sdist", folder / "source", folder / "out")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("build_wheel", unpacked, folder / "out")


def test_contents(distributions):
    expected, version = contents.package_files(), contents.source_version()
    assert version == rlora_trl.__version__ and len(expected) > 150
    assert {"rlora_trl/py.typed", "rlora_trl/analysis/report_template.html"} <= expected
    for path in distributions:
        assert not contents.problems(path, expected, version)


def test_what_is_wrong_is_found(distributions, tmp_path):
    _, wheel = distributions
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            if name != "rlora_trl/py.typed":
                new.writestr(name, old.read(name))
        new.writestr("tests/key.pem", "x")
    found = " / ".join(contents.problems(changed, contents.package_files(), "9.9"))
    for problem in ("lacks rlora_trl/py.typed", "has tests/key.pem, which is in no package", "not have version 9.9"):
        assert problem in found
    assert "key.pem, which is not for users" in found
    assert contents.main([str(changed)]) == 1 and contents.main([str(wheel)]) == 0


@pytest.mark.slow
def test_the_wheel_alone(distributions, model_folders, tmp_path):
    """Installed without the repository: the command, the templates, and training."""
    _, wheel = distributions
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    done = run([*install, str(wheel)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    # `-P`: neither the working folder nor the repository is searched. Dependencies are those of this environment.
    code = tmp_path / "use.py"
    code.write_text(
        "import sys\n"
        "from datasets import Dataset\n"
        "import rlora_trl, rlora_plugins.vllm\n"
        "from rlora_trl import RLoraSFTConfig, RLoraSFTTrainer\n"
        "from rlora_trl.analysis import write_report\n"
        "assert rlora_trl.__file__.startswith(sys.argv[1]), rlora_trl.__file__\n"
        "rows = Dataset.from_list([{'prompt': 'w1 w2 Answer:', 'completion': ' yes'}] * 4)\n"
        "args = RLoraSFTConfig('out', max_steps=1, report_to='none', bf16=False, save_strategy='no')\n"
        "trainer = RLoraSFTTrainer(sys.argv[2], args, train_dataset={'a': rows, 'b': rows})\n"
        "trainer.train()\n"
        "trainer.save_model()\n"
        "print(write_report('out', 'page.html').stat().st_size)\n"
    )
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    env = {**os.environ, **CPU, "PYTHONPATH": os.pathsep.join([str(site), *others])}
    done = run([sys.executable, "-P", str(code), str(site), model_folders["llama"]], cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (
        int(done.stdout.splitlines()[-1]) > 5000 and (tmp_path / "out" / "README.md").is_file()
    )  # the card's template

    command = site / "bin" / ("rlora" + sysconfig.get_config_var("EXE"))
    done = run([sys.executable, "-P", str(command), "env"], cwd=tmp_path, env=env)
    assert done.returncode == 0 and f"rlora_trl: {rlora_trl.__version__}" in done.stdout, done.stderr
