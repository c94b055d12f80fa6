"""The workflow that publishes: which job gets a token, and what it runs."""

import re

import pytest
import yaml
from processes import ROOT


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8"))


def test_only_publishing_jobs_get_a_token(workflow):
    assert workflow["permissions"] == {}
    jobs = workflow["jobs"]
    assert {name for name, job in jobs.items() if "id-token" in job["permissions"]} == {"testpypi", "pypi"}
    for name in ("testpypi", "pypi"):
        assert jobs[name]["environment"] == name and jobs[name]["needs"] == "build"
        assert jobs[name]["permissions"] == {"id-token": "write"}
        assert not [step for step in jobs[name]["steps"] if "run" in step], "nothing of the repository beside a token"
    assert "password" not in str(workflow) and "secrets." not in str(workflow)


def test_commands_exist(workflow):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "\n".join(step.get("run", "") for step in workflow["jobs"]["build"]["steps"])
    targets = re.findall(r"^make ([\w-]+)$", text, re.MULTILINE)
    assert targets == ["dist"]
    checklist = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
    for target in {*targets, *re.findall(r"`make ([\w-]+)`", checklist)}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    # The version is read where it stands.
    pattern = re.search(r"sed -n '(.+)' (\S+)\)", text)
    assert pattern[2] == "rlora_trl/_version.py"
    assert '__version__ = "' in (ROOT / pattern[2]).read_text(encoding="utf-8")
