"""`rlora env`: facts for a bug report, without secrets."""

import json
import os

from rlora_trl import __version__


def test_env_tells_no_paths(rlora, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = rlora("env", "--json")
    facts = json.loads(result.stdout)
    assert facts["rlora_trl"] == __version__
    assert facts["Kernels"] in ("PyTorch", "Triton")
    text = rlora("env").stdout
    assert f"- rlora_trl: {__version__}" in text
    for secret in ("hf_secret", os.getcwd(), os.path.expanduser("~/"), os.uname().nodename):
        assert secret not in text + result.stdout
