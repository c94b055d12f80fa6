"""Figures: readable at all sizes, the same bytes each time, and nothing of the user's matplotlib changed."""

import struct
import subprocess
import sys
import time
import zlib

import pytest
import torch

from rlora_trl.analysis import HeadWeights, figures, plot_head_similarity, plot_routing


matplotlib = pytest.importorskip("matplotlib")

MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ALL = (*MLP, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
# Tasks, depth, kinds of layers, heads: the smallest, a usual one, and much of everything.
SIZES = {"small": (2, 2, MLP, 2), "usual": (10, 24, MLP, 3), "large": (40, 12, ALL, 16)}


def head_weights(tasks=3, depth=2, kinds=MLP, heads=3, names=None):
    generator = torch.Generator().manual_seed(0)
    layers = tuple(f"model.layers.{i}.{kind}" for i in range(depth) for kind in kinds)
    names = names or [f"task_{i}" for i in range(tasks)]
    weights = {name: torch.randn(len(layers), heads, generator=generator).softmax(-1) for name in names}
    return HeadWeights(layers, weights, dict.fromkeys(names, 100))


def similarities(depth=2, kinds=MLP, heads=3):
    generator = torch.Generator().manual_seed(0)
    matrices = {}
    for i in range(depth):
        for kind in kinds:
            B = torch.nn.functional.normalize(torch.randn(heads, 20, generator=generator), dim=1)
            matrices[f"model.layers.{i}.{kind}"] = B @ B.T
    return matrices


def chunks(path):
    """Chunks of a PNG file by type, their check sums checked."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    by_kind, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        by_kind.setdefault(kind.decode(), []).append(body)
        at += 12 + length
    return by_kind


@pytest.mark.parametrize("tasks, depth, kinds, heads", SIZES.values(), ids=SIZES)
def test_routing_at_all_sizes(tmp_path, tasks, depth, kinds, heads):
    path = plot_routing(head_weights(tasks, depth, kinds, heads), tmp_path / "figures" / "routing.png")
    width, height = struct.unpack(">II", chunks(path)["IHDR"][0][:8])
    assert width == 1500
    # Each row of each panel has at least 13 pixels: its label stays readable.
    assert height > len(kinds) * tasks * 13
    assert height < len(kinds) * (tasks * 30 + 200) + 200


@pytest.mark.parametrize("depth, kinds, heads", [(1, MLP[:1], 2), (24, MLP, 3), (12, ALL, 16)])
def test_similarity_at_all_sizes(tmp_path, depth, kinds, heads):
    path = plot_head_similarity(similarities(depth, kinds, heads), tmp_path / "head_similarity.png")
    assert struct.unpack(">II", chunks(path)["IHDR"][0][:8])[0] == 1500


def test_same_bytes_and_nothing_of_the_machine(tmp_path):
    for draw, content in ((plot_routing, head_weights()), (plot_head_similarity, similarities())):
        first = draw(content, tmp_path / "first.png")
        second = draw(content, str(tmp_path / "second.png"))
        assert first.read_bytes() == second.read_bytes()
        assert set(chunks(first)) == {"IHDR", "pHYs", "IDAT", "IEND"}, "there is more than the picture"


def test_the_picture_shows_the_weights(tmp_path):
    even = head_weights()
    for weights in even.weights.values():
        weights.fill_(1 / 3)
    one = HeadWeights(even.layers, {task: w.clone() for task, w in even.weights.items()}, even.tokens)
    one.weights["task_0"][0] = torch.tensor([1.0, 0.0, 0.0])
    first, second = plot_routing(even, tmp_path / "even.png"), plot_routing(one, tmp_path / "one.png")
    assert first.read_bytes() != second.read_bytes()


@pytest.fixture
def drawn(monkeypatch):
    """Have figures returned instead of written."""
    monkeypatch.setattr(figures, "_save", lambda figure, path: figure)


def with_strong_cells(count):
    content = head_weights(tasks=5, depth=10)
    for weights in content.weights.values():
        weights.copy_(1 / 3 + torch.tensor([0.06, -0.04, -0.02]))
    strong = torch.tensor([0.98, 0.01, 0.01])
    list(content.weights.values())[0][:count] = strong
    return content


def test_a_strong_cell_does_not_wash_out_the_rest(drawn):
    panel, *_, scale = plot_routing(with_strong_cells(1), "").axes
    low, high = scale.get_ylim()
    assert low == pytest.approx(1 / 3 - 0.06, abs=1e-4) and high == pytest.approx(1 / 3 + 0.06, abs=1e-4)
    assert [tick.get_text() for tick in scale.get_yticklabels()] == ["0.273", "0.333", "0.393"]
    assert panel.images[0].norm.vmax == pytest.approx(high) and color_bar(panel).extend == "both"
    # Many are no exception: the scale is theirs, and ends at 0 below.
    panel, *_, scale = plot_routing(with_strong_cells(30), "").axes
    assert scale.get_ylim() == pytest.approx((0.0, 0.98))
    assert [tick.get_text() for tick in scale.get_yticklabels()] == ["0", "0.333", "0.98"]
    assert color_bar(panel).extend == "neither"


def color_bar(panel):
    """The color bar that all panels share belongs to the image of the last."""
    return next(axes.images[0].colorbar for axes in panel.figure.axes if axes.images and axes.images[0].colorbar)


def test_many_tasks_are_a_selection_that_says_so(drawn):
    *panels, _ = plot_routing(head_weights(tasks=1000), "").axes
    for panel in panels:
        labels = [tick.get_text() for tick in panel.get_yticklabels()]
        assert len(labels) == 60 and labels[0] == "task_0" and labels[-1] == "task_999"
        assert panel.images[0].get_array().shape[0] == 60
    # Each row is that of its label.
    weights = head_weights(tasks=1000).weights["task_16"][[0, 3]].flatten()  # of the kind of the first panel
    kind = [panel for panel in panels if panel.get_title(loc="left") == "mlp.gate_proj"][0]
    assert labels[1] == "task_16" and kind.images[0].get_array()[1].tolist() == pytest.approx(weights.tolist())
    assert "60 of 1,000 tasks, evenly spaced in their order" in panels[-1].get_xlabel()
    assert "60 of" not in plot_routing(head_weights(tasks=60), "").axes[-2].get_xlabel()


def test_time_and_size_do_not_grow_with_tasks(tmp_path):
    start = time.process_time()
    path = plot_routing(head_weights(tasks=5000, depth=24), tmp_path / "routing.png")
    assert time.process_time() - start < 15, "takes about 1 s"
    assert struct.unpack(">II", chunks(path)["IHDR"][0][:8])[1] < 6000


def test_many_kinds_of_layers_are_a_selection_that_says_so(drawn):
    kinds = [f"part_{i:03}.proj" for i in range(300)]
    *panels, _ = plot_routing(head_weights(kinds=kinds), "").axes
    assert len(panels) == 12 and "12 of 300 kinds of layers" in panels[-1].get_xlabel()
    _, by_depth = plot_head_similarity(similarities(kinds=kinds), "").axes
    labels = [text.get_text() for text in by_depth.get_legend().get_texts()]
    assert len(labels) == 12 and labels[-1] == "part_011.proj\n(12 of 300 kinds)"


def test_many_layers_of_one_kind(tmp_path):
    start = time.process_time()
    plot_routing(head_weights(tasks=5, depth=20_000, kinds=MLP[:1]), tmp_path / "routing.png")
    plot_head_similarity(similarities(depth=20_000, kinds=MLP[:1]), tmp_path / "similarity.png")
    assert time.process_time() - start < 20, "takes about 2 s"


def test_names_show_only_printable_characters(drawn):
    content = head_weights(names=["a\x1b[2Jb", "\u202eevil", "x" * 600])
    labels = [tick.get_text() for tick in plot_routing(content, "").axes[0].get_yticklabels()]
    assert labels[:2] == ["a\\x1b[2Jb", "\\u202eevil"] and len(labels[2]) <= 26


@pytest.mark.parametrize("level", [0.0, 0.94])
def test_the_axis_of_cosines_fits_them(drawn, level):
    matrices = {name: matrix * 0.02 + level for name, matrix in similarities(depth=8).items()}
    matrix, by_depth = plot_head_similarity(matrices, "").axes
    low, high = by_depth.get_ylim()
    values = [float(value) for line in by_depth.lines for value in line.get_ydata() if len(line.get_ydata()) == 8]
    assert low < min(values) and max(values) < high and high - low == pytest.approx(0.1)
    assert matrix.get_position().width < 0.6 * by_depth.get_position().width


def test_names_that_mean_something_to_matplotlib(tmp_path):
    names = ["$a$", "$\\frac{1}{$", "_hidden", "two\nlines", "x" * 200, "a|b<c>&", ""]
    content = head_weights(names=names[:-1])
    assert plot_routing(content, tmp_path / "routing.png").is_file()
    matrices = {f"blocks.{i}.$x$": matrix for i, matrix in enumerate(similarities().values())}
    assert plot_head_similarity(matrices, tmp_path / "similarity.png").is_file()


def test_layers_without_a_depth_and_experts(tmp_path):
    layers = ("lm_head", "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj")
    weights = torch.full((3, 2), 0.5)
    assert plot_routing(HeadWeights(layers, {"a": weights}, {"a": 1}), tmp_path / "routing.png").is_file()
    matrices = dict(zip(layers, similarities(heads=2).values(), strict=False))
    assert plot_head_similarity(matrices, tmp_path / "similarity.png").is_file()


def test_the_users_settings_stay_and_do_not_matter(tmp_path):
    plain = plot_routing(head_weights(), tmp_path / "plain.png").read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "green", "savefig.dpi": 30}):
        before = dict(matplotlib.rcParams)
        styled = plot_routing(head_weights(), tmp_path / "styled.png").read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert styled == plain


def test_no_back_end_is_chosen_and_matplotlib_is_imported_late(tmp_path):
    source = (
        "import sys, torch\n"
        "import rlora_trl.analysis as analysis\n"
        "assert not any(name.startswith('matplotlib') for name in sys.modules), 'imported with the package'\n"
        "eye = torch.eye(2)\n"
        f"analysis.plot_head_similarity({{'model.layers.0.up': eye}}, {str(tmp_path / 'x.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "import matplotlib\n"
        "assert dict.__getitem__(matplotlib.rcParams, 'backend') is matplotlib.rcsetup._auto_backend_sentinel\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install rlora-trl\[analysis\]"):
        plot_routing(head_weights(), tmp_path / "routing.png")
    with pytest.raises(ImportError, match=r"pip install rlora-trl\[analysis\]"):
        plot_head_similarity(similarities(), tmp_path / "similarity.png")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no head weights to draw"):
        plot_routing(HeadWeights(("a",), {}, {}), tmp_path / "routing.png")
    with pytest.raises(ValueError, match="one head has none"):
        plot_head_similarity({"a": torch.ones(1, 1)}, tmp_path / "similarity.png")
    assert not list(tmp_path.iterdir())
