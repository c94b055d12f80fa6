"""Names of files: what belongs to an adapter, what is ignored, what is hostile; folders of tasks; links."""

import os

import pytest

from rlora_trl.files.checks import AdapterCheckError
from rlora_trl.files.layout import FileKind, classify, published_files, task_slug


KINDS = {
    "adapter_config.json": FileKind.CONFIG,
    "adapter_model.safetensors": FileKind.WEIGHTS,
    "README.md": FileKind.CARD,
    "rlora_record.json": FileKind.RECORD,
    "LICENSE": FileKind.LICENSE,
    "model.sig": FileKind.SIGNATURE,
    "tokenizer.json": FileKind.TOKENIZER,
    "tokenizer.model": FileKind.TOKENIZER,
    "chat_template.jinja": FileKind.TOKENIZER,
    "additional_chat_templates/tools.jinja": FileKind.TOKENIZER,
    "figures/routing.png": FileKind.FIGURE,
    "exports/sst2/adapter_config.json": FileKind.EXPORT,
    "exports/a-b_c.d/adapter_model.safetensors": FileKind.EXPORT,
    "exports/sst2/README.md": FileKind.EXPORT,
    ".gitattributes": FileKind.OTHER,
    "trainer_state.json": FileKind.OTHER,
    "notes/README.md": FileKind.OTHER,
    "checkpoint-5/adapter_config.json": FileKind.OTHER,
    "figures/routing.svg": FileKind.OTHER,
    "figures/deeper/routing.png": FileKind.OTHER,
    "exports/sst2/notes.txt": FileKind.OTHER,
    "exports/SST 2/README.md": FileKind.OTHER,
    "exports/adapter_config.json": FileKind.OTHER,
    "model-00001-of-00002.safetensors": FileKind.OTHER,
    "événement.txt": FileKind.OTHER,
    "\uff32EADME.md": FileKind.OTHER,  # another name on every system
}
HOSTILE = [
    # What would be unpickled or run.
    *("adapter_model.bin", "training_args.bin", "a.pt", "deep/er/a.PTH", "x.pkl", "x.pickle", "x.ckpt", "x.joblib"),
    *("x.npy", "x.npz", "modeling.py", "x.pyc", "x.so", "x.sh", "x.dll", "x.EXE", "x.js", "x.ipynb", "figures/x.py"),
    # What leads elsewhere, or is not portable.
    *("", "/etc/passwd", "../x.txt", "figures/../../x", "./README.md", "a//b", "figures/", "..", "C:/x.txt"),
    *(
        "figures\\routing.png",
        "README.md:stream",
        "a\0b",
        "a\nb",
        "a\x7fb",
        "a\u202egnp.txt",
        "a" * 256,
        "a/" * 600 + "b",
    ),
    *("README.md.", "README.md ", "con", "con.x", "lpt1.a.b", "NUL.txt", ".git/config", "a/.GIT/hooks/x"),
    # What differs from a name of an adapter only in case.
    *("Adapter_config.json", "readme.md", "ADAPTER_MODEL.SAFETENSORS", "Figures/routing.png", "EXPORTS/a/README.md"),
    *("exports/sst2/Readme.md", "adapter_conﬁg.json", "Tokenizer.json"),
]


@pytest.mark.parametrize(("path", "kind"), KINDS.items())
def test_kind(path, kind):
    assert classify(path) is kind


@pytest.mark.parametrize("path", HOSTILE, ids=[f"{path[:40]!a}" for path in HOSTILE])
def test_hostile_name(path):
    assert classify(path) is FileKind.HOSTILE


TASKS = [
    "sst2",
    "SST2",
    "sst 2",
    "sst-2",
    "sst/2",
    "../x",
    "..",
    ".",
    "con",
    "été",
    "日本",
    "日本語",
    "a" * 64,
    "a" * 65,
]


def test_slugs_are_distinct_and_safe():
    slugs = {task: task_slug(task) for task in TASKS}
    # What a task is turned into is itself a possible name of a task.
    slugs |= {slug: task_slug(slug) for slug in slugs.values() if slug not in slugs}
    assert len(set(slugs.values())) == len(slugs)
    for slug in slugs.values():
        assert classify(f"exports/{slug}/adapter_config.json") is FileKind.EXPORT
    assert slugs["sst2"] == "sst2"
    assert slugs["sst 2"].startswith("sst-2-")


def test_slug_of_nothing():
    with pytest.raises(ValueError, match="must have a name"):
        task_slug("")


@pytest.fixture
def folder(tmp_path):
    """An output folder of a trainer, with all that lies around there."""
    root = tmp_path / "out"
    for path in (
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "rlora_record.json", "tokenizer.json"),
        *("figures/routing.png", "figures/raw.json", "exports/sst2/adapter_config.json", "exports/sst2/notes.txt"),
        *("training_args.bin", "trainer_state.json", "optimizer.pt", "checkpoint-5/adapter_config.json", ".env"),
        *("checkpoint-5/optimizer.pt", "runs/events.out"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return root


def test_published_files(folder):
    assert published_files(folder) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "exports/sst2/adapter_config.json"),
        *("figures/routing.png", "rlora_record.json", "tokenizer.json"),
    ]


@pytest.mark.parametrize("name", ["README.md", "figures/routing.png"])
def test_link_to_a_secret(folder, tmp_path, name):
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink()
    os.symlink(tmp_path / "secret", folder / name)
    with pytest.raises(AdapterCheckError, match=rf"{name}.*is a link to .*secret"):
        published_files(folder)


@pytest.mark.parametrize("target", ["README.md", "missing", "/dev/zero"])
def test_link_that_leads_nowhere(folder, target):
    (folder / "README.md").unlink()
    os.symlink(target, folder / "README.md")
    with pytest.raises(AdapterCheckError, match=r"README\.md.*is a link to"):
        published_files(folder)


def test_link_of_a_folder(folder, tmp_path):
    (folder / "figures").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "figures")
    with pytest.raises(AdapterCheckError, match="figures.*is a link to"):
        published_files(folder)


def test_link_of_a_file_that_is_ignored(folder, tmp_path):
    os.symlink(tmp_path, folder / "latest")
    os.symlink(folder / "README.md", folder / "notes.txt")
    assert "notes.txt" not in published_files(folder)


@pytest.mark.parametrize(("blobs", "accepted"), [("models--a--b/blobs", True), ("models--c--d/blobs", False)])
def test_links_of_the_cache(tmp_path, blobs, accepted):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / blobs).mkdir(parents=True)
    (tmp_path / blobs / "123").write_text("{}")
    os.symlink(os.path.relpath(tmp_path / blobs / "123", snapshot), snapshot / "adapter_config.json")
    if accepted:
        assert published_files(snapshot) == ["adapter_config.json"]
    else:
        with pytest.raises(AdapterCheckError, match="is a link to"):
            published_files(snapshot)
