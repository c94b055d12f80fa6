import json

import pytest
from sample_rows import ROWS


@pytest.fixture
def folder(tmp_path):
    for split, rows in (("train", ROWS), ("test", ROWS[:2])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
