"""`rlora analyze`: similarity and head weights."""

import json

import pytest

from rlora_trl.analysis import head_similarities
from rlora_trl.files.record import AdapterRecord


def test_analyze(rlora, make_adapter, rows_folder, tmp_path):
    folder = make_adapter()
    shown = json.loads(rlora("analyze", folder, "--json").stdout)
    similarities = head_similarities(folder)
    assert {layer: len(matrix) for layer, matrix in shown["similarities"].items()} == dict.fromkeys(similarities, 3)
    off_diagonal = [float(m[i][j]) for m in similarities.values() for i in range(3) for j in range(i)]
    assert shown["mean_similarity"] == pytest.approx(sum(off_diagonal) / len(off_diagonal), abs=1e-6)
    assert shown["mixtures"] is None
    assert "mean of layers" in rlora("analyze", folder).stdout
    assert rlora("analyze", folder, "--save").exit_code == 2


def test_analyze_on_data(rlora, make_adapter, rows_folder, tmp_path):
    folder = make_adapter()
    words = ["--data", rows_folder, "--save", "--output", tmp_path / "drawn"]
    result = rlora("analyze", folder, *words)
    assert result.exit_code == 0, result.stderr
    assert {"same", "colour", "first"} <= {line.split()[0] for line in result.stdout.splitlines() if line}
    assert "head 1  head 2  head 3" in result.stdout, "as figures count them"
    assert set(AdapterRecord.load(folder).mixtures.weights) == {"same", "colour", "first"}
    for name in ("head_similarity.png", "routing.png"):
        assert (tmp_path / "drawn" / "figures" / name).stat().st_size > 1000


def test_report(rlora, make_adapter, rows_folder, tmp_path):
    folder, page = make_adapter(), tmp_path / "new" / "page.html"
    result = rlora("analyze", folder, "--data", rows_folder, "--report", page, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["report"] == str(page)
    text = page.read_text()
    assert "mlp.down_proj" in text and ">colour<" in text and str(folder) in text
    assert f"Wrote {page}" in rlora("analyze", folder, "--report", page).stderr
