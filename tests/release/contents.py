"""
What a wheel and an sdist must have. `python tests/release/contents.py dist/*` exits with 1 if they are not so.

Every file of the packages that git knows is in the wheel, and nothing else is. The sdist also has what is needed to
test and repackage it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("rlora_cli", "rlora_plugins", "rlora_trl")
# Besides the packages, in the sdist.
BESIDE = (
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "COMPATIBILITY.md", "Makefile", "constraints.txt"),
    *("examples/sft_flan.py", "examples/tour.ipynb", "deepspeed_configs/zero3.yaml", "docs/method.md"),
    *("tests/conftest.py", "tests/hub/server.py"),
)
# Never, wherever they stand.
_UNWANTED = re.compile(r"(^|/)(\.git|\.venv|__pycache__|build|dist|\.env)(/|$)|\.(pyc|safetensors|bin|pem|jsonl)$")
_FIXTURES = "tests/fixtures/"  # adapters of earlier versions are tensors
_LARGEST = {".whl": 2 * 2**20, ".gz": 12 * 2**20}  # bytes


def package_files() -> set[str]:
    """The files of the packages that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.splitlines() if not name.endswith(".md") or "template" in name}


def read_names(path: Path) -> tuple[set[str], str]:
    """The names of the files in a distribution, without the folder of an sdist, and its metadata."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
            return names, wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    with tarfile.open(path) as sdist:
        files = {member.name.partition("/")[2]: member for member in sdist.getmembers() if member.isfile()}
        metadata = sdist.extractfile(files["PKG-INFO"])
        assert metadata is not None
        return set(files), metadata.read().decode()


def problems(path: Path, expected: set[str], version: str) -> list[str]:
    """
    What is wrong with a distribution, in words.

    Args:
        path (`Path`): The wheel or sdist.
        expected (`set[str]`): Files of the packages, as [`package_files`] lists them.
        version (`str`): The version that it must have.
    """
    names, metadata = read_names(path)
    found = [f"{path.name} lacks {name}" for name in sorted(expected - names)]
    if path.suffix == ".whl":
        others = {name for name in names - expected if ".dist-info/" not in name}
        found += [f"{path.name} has {name}, which is in no package" for name in sorted(others)]
        parts = ("entry_points.txt", "licenses/LICENSE", "RECORD")
        found += [
            f"{path.name} lacks {part}" for part in parts if not any(name.endswith(f"/{part}") for name in names)
        ]
    else:
        found += [f"{path.name} lacks {name}" for name in BESIDE if name not in names]

    unwanted = (name for name in names if _UNWANTED.search(name) and not name.startswith(_FIXTURES))
    found += [f"{path.name} has {name}, which is not for users" for name in sorted(unwanted)]
    if f"\nVersion: {version}\n" not in metadata:
        found.append(f"{path.name} does not have version {version}")
    if path.stat().st_size > _LARGEST[path.suffix]:
        found.append(f"{path.name} has {path.stat().st_size:,} bytes, at most {_LARGEST[path.suffix]:,} are expected")
    return found


def source_version() -> str:
    """The version in the one place that has it."""
    text = (ROOT / "rlora_trl" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "(.+)"', text)
    assert match is not None
    return match[1]


def main(paths: list[str]) -> int:
    """Check the files; prints what is wrong, and returns the exit code."""
    expected, version = package_files(), source_version()
    found = [problem for path in paths for problem in problems(Path(path), expected, version)]
    print(
        "\n".join(found) if found else f"{', '.join(Path(path).name for path in paths)}: complete, version {version}"
    )
    return 1 if found or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
