"""The HTML page about an adapter: what it shows, that it loads nothing, and that foreign names stay text."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from peft import get_peft_model
from testing_utils import TINY_MODELS, perturb

from rlora_trl import RLoraConfig
from rlora_trl.analysis import HeadWeights, write_report
from rlora_trl.analysis.history import read_history
from rlora_trl.analysis.kinds import color_span
from rlora_trl.files.record import AdapterRecord, TaskRecord


LAYERS = tuple(f"model.layers.{depth}.mlp.{kind}_proj" for depth in (0, 1) for kind in ("up", "down"))
EVIL = "<script>alert(1)</script>\"'&\x1b[2J"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = RLoraConfig(num_heads=3, target_modules=["up_proj", "down_proj"], tasks=["sst2", "rte"])
    model = get_peft_model(TINY_MODELS["llama"](), config)
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def weights_of(tasks, layers=LAYERS, heads=3):
    drawn = {task: torch.randn(len(layers), heads, generator=torch.Generator().manual_seed(1)) for task in tasks}
    return HeadWeights(tuple(layers), {t: w.softmax(-1) for t, w in drawn.items()}, dict.fromkeys(tasks, 10))


def write_state(path, steps):
    logs = [{"step": step, "loss": 1.0, "head_similarity": step / 100} for step in steps]
    path.mkdir(exist_ok=True)
    (path / "trainer_state.json").write_text(json.dumps({"log_history": [*logs, {"step": 9, "train_loss": 1.0}]}))


class Page(HTMLParser):
    """Tags, links, texts and the balance of elements."""

    VOID = {"meta", "wbr", "rect", "path"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.texts, self.titles, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.titles if self.open and self.open[-1] == "title" else self.texts).append(data.strip())


def test_whole_page(folder, tmp_path):
    tasks = [
        TaskRecord("sst2", rows=30, share=0.75, metrics={"accuracy": 0.9, "base_accuracy": 0.5}),
        TaskRecord("rte"),
    ]
    AdapterRecord(base_model="user/base", tasks=tasks, mixtures=weights_of(["sst2", "rte"])).save(folder)
    write_state(folder, range(1, 6))
    text = write_report(folder, tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)

    # One file, without scripts and without anything from elsewhere, for both color schemes and for phones.
    assert not page.links and "script" not in page.tags and "img" not in page.tags
    assert "default-src 'none'" in text and not re.search(r"url\(|@import|https?:", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text

    # Names of tasks and layers, and numbers that can be checked.
    assert {"adapter", "sst2", "rte", "mlp.down_proj", "mlp.up_proj"} <= set(page.texts)
    cells = [text for text in page.texts if text]
    start = cells.index("adapter %") + 1
    assert cells[start : start + 6] == ["sst2", "30", "75.0", "50.0", "90.0", "rte"]
    weight = float(weights_of(["sst2"]).weights["sst2"][0, 1])
    assert f"sst2, model.layers.0.mlp.up_proj, head 2: {weight:.3f}" in page.titles
    assert sum("head 1: " in title for title in page.titles) == 2 * len(LAYERS)
    assert "0.010 at first, 0.050 at step 5" in " ".join(page.texts)
    assert "effective rank of the delta" in page.texts and set(LAYERS) <= set(page.texts)


def test_what_is_unknown_is_named(folder, tmp_path):
    page = Page(write_report(folder, tmp_path / "page.html", name="mine").read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    assert "Head weights were not measured" in text and "mine" in page.texts and "Tasks" not in page.texts
    assert "no trainer_state.json" in text.replace("  ", " ") and "rect" not in page.tags


def test_foreign_names_stay_text(folder, tmp_path):
    AdapterRecord(base_model=EVIL, tasks=[TaskRecord(EVIL.replace("\x1b", ""))]).save(folder)
    weights = weights_of([EVIL], layers=[f"{EVIL}.{n}.x" for n in range(4)])
    text = write_report(folder, tmp_path / "page.html", head_weights=weights, name=EVIL).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and "\x1b" not in text
    assert any("<script>alert(1)</script>\"'&\\x1b[2J" in title for title in page.titles)


def test_many_tasks_and_layers_stay_a_page(folder, tmp_path):
    layers = [f"model.layers.{depth}.mlp.{kind}" for depth in range(80) for kind in ("up", "down", "gate")]
    weights = weights_of([f"task {n}" for n in range(300)], layers)
    page = write_report(folder, tmp_path / "page.html", head_weights=weights)
    assert page.stat().st_size < 8 * 2**20
    texts = Page(page.read_text(encoding="utf-8")).texts
    assert any("of 300 tasks, evenly spaced in their order" in text for text in texts)
    assert {"task 0", "task 299"} <= set(texts)


def test_head_weights_of_another_adapter(folder, tmp_path):
    with pytest.raises(ValueError, match="are of 5 heads, and the adapter has 3"):
        write_report(folder, tmp_path / "page.html", head_weights=weights_of(["a"], heads=5))


def test_one_head_and_a_new_adapter(tmp_path):
    for name, config in {"one": {"num_heads": 1, "router": "uniform"}, "new": {}}.items():
        get_peft_model(TINY_MODELS["llama"](), RLoraConfig(**config)).save_pretrained(tmp_path / name)
        page = Page(write_report(tmp_path / name, tmp_path / f"{name}.html").read_text(encoding="utf-8"))
        assert ("The adapter has one head: there is nothing to compare." in page.texts) == (name == "one")
        assert "0.0" in page.texts  # effective rank


def test_history(folder):
    assert read_history(folder) is None
    write_state(folder / "checkpoint-9", range(1, 3))
    write_state(folder / "checkpoint-10", range(1, 4))
    assert read_history(folder).steps == [1, 2, 3], "the newest checkpoint"
    write_state(folder, range(1, 2001))
    history = read_history(folder)
    assert len(history.steps) <= 501 and (history.steps[0], history.steps[-1]) == (1, 2000)
    assert history.similarity[-1] == 20
    (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1, "head_similarity": "high"}, 3]}')
    assert read_history(folder) is None
    (folder / "trainer_state.json").write_text('{"log_history": 3}')
    with pytest.raises(ValueError, match="no list `log_history`"):
        read_history(folder)


def test_colors_end_before_a_few_strong_weights():
    table = torch.full((1, 100, 3), 1 / 3)
    table[0, 0] = torch.tensor([1.0, 0.0, 0.0])
    assert color_span(table) == (pytest.approx(0.05), True)
    assert color_span(torch.tensor([[0.5, 0.3, 0.2]])) == (pytest.approx(1 / 6), False)
