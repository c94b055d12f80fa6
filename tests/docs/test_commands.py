"""Commands, YAML and JSON of the documentation, through the parsers of the programs that read them."""

import json
import re
import runpy
import tomllib

import pytest
import typer
import yaml
from accelerate.commands.launch import launch_command_parser
from blocks import BLOCKS, commands
from datasets import Dataset
from processes import ROOT
from torch.distributed.run import get_args_parser

from rlora_cli.app import app
from rlora_cli.train import split_arguments, training_parser
from rlora_trl import RLoraConfig
from rlora_trl.evaluation.formats import check_rows


LANGUAGES = ("bash", "console", "python", "yaml", "json", "text", "diff", "{eval-rst}")
# Programs that are not part of the project, or not installed by it: only their own versions can parse their arguments.
OTHER_PROGRAMS = {
    "axolotl": "tests/integrations/test_axolotl.py has what its plugin gets",
    "convert_lora_to_gguf.py": "of llama.cpp",
    "curl": "of the system",
    "hf": "its words behind the script are parsed as those of the script",
    "jq": "of the system",
    "llama-server": "of llama.cpp",
    "model_signing": "tests/hub/test_signed_push.py runs it",
    "openssl": "tests/hub/test_signed_push.py runs it",
    "swift": "tests/integrations/test_ms_swift.py has what its plugin gets",
    "vllm": "tests/hub/test_vllm_server.py runs it where it is installed",
}
# A file for commands on pages that show none of that name.
RUN = {"model_name_or_path": "base", "dataset_name": "data", "output_dir": "out"}
SHELL = [block for block in BLOCKS if block.language in ("bash", "console")]


def of(*languages):
    return [pytest.param(block, id=block.name) for block in BLOCKS if block.language in languages]


@pytest.fixture(scope="module")
def parsers():
    """The parsers of training programs, by the program."""
    example = runpy.run_path(str(ROOT / "examples" / "sft_flan.py"), run_name="example")
    return {
        "rlora": training_parser,
        "examples/sft_flan.py": lambda: example["script"].make_parser(example["FlanArguments"]),
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the YAML files that pages show, and the repository's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    for block in BLOCKS:
        name = re.match(r"# (\w+\.yaml)\n", block.text)
        if block.language == "yaml" and name and "adapter: rlora" not in block.text:
            (tmp_path / name[1]).write_text(block.text)
    for name in ("deepspeed_configs", "examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def parse_rlora(words, parsers):
    """A command line of `rlora`, up to the call of the command."""
    command = typer.main.get_command(app)
    context = command.make_context("rlora", list(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    if name == "train" and context.args:
        split_arguments(parsers["rlora"](), context.args)


def parse_script(words, parsers):
    """A training script and its arguments; values must have the types of the fields."""
    script, *arguments = words
    script = script if "/" in script else f"examples/{script}"
    if script == "examples/script.py":
        return  # a script of the reader
    parser = parsers[script]()
    if "--config" in arguments:
        index = arguments.index("--config")
        with open(arguments[index + 1], encoding="utf-8") as file:
            assert not parser.set_defaults_with_config(**yaml.safe_load(file))
        del arguments[index : index + 2]
    _, unknown = parser.parse_known_args(arguments)
    assert not unknown


def parse_module(module, words, parsers):
    if module == "rlora_cli":
        parse_rlora(words, parsers)
    elif module == "rlora_trl.run":
        parse_module(words[1], words[2:], parsers) if words[0] == "-m" else parse_script(words, parsers)
    elif module == "pytest":
        for word in words:
            assert not word.startswith("tests/") or (ROOT / word.split("::")[0]).exists(), word
    else:
        assert module in ("trl.scripts.sft", "venv"), module


def parse_launcher(parsed, parsers):
    for name in ("config_file",):
        value = getattr(parsed, name, None)
        assert value is None or (ROOT / value).exists(), value
    words = [parsed.training_script, *parsed.training_script_args]
    parse_module(words[0], words[1:], parsers) if parsed.module else parse_script(words, parsers)


def parse_python(words, parsers):
    if words[0] == "-m":
        return parse_module(words[1], words[2:], parsers)
    if words[0] in OTHER_PROGRAMS:
        return None
    # A program of the repository: it exists and names each option.
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, word
    return None


def check_requirement(word):
    """A requirement of `pip install` on this package names its extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    found = re.fullmatch(r"(?:rlora-trl|\.)\[([\w,-]+)\]", word)
    assert found is None or set(found[1].split(",")) <= set(extras), word


def check(command, parsers):
    words = [word.replace("$rate", "1e-3") for word in command]
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    program, *words = words
    program = program.removeprefix(".venv/bin/")
    if program == "rlora":
        parse_rlora(words, parsers)
    elif program == "accelerate":
        assert words[0] == "launch"
        parse_launcher(launch_command_parser().parse_args(words[1:]), parsers)
    elif program == "torchrun":
        parse_launcher(get_args_parser().parse_args(words), parsers)
    elif program in ("python", "python3"):
        parse_python(words, parsers)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[0] in targets
    elif program == "pip":
        for word in words:
            check_requirement(word)
    elif program == "uv" or words[:3] == ["jobs", "uv", "run"]:
        start = next(index for index, word in enumerate(words) if word.endswith("sft_flan.py"))
        parse_script(words[start:], parsers)
    else:
        assert program in OTHER_PROGRAMS, program


@pytest.mark.parametrize("block", of("bash", "console"))
def test_commands(block, parsers, folder, capsys):
    found = commands(block)
    assert found
    for command in found:
        try:
            check(command, parsers)
        except SystemExit as ended:  # of argparse
            pytest.fail(f"{' '.join(command)}: exit code {ended.code}, {capsys.readouterr().err[-500:]}")


@pytest.mark.parametrize("block", of("yaml"))
def test_yaml(block, folder):
    values = yaml.safe_load(block.text)
    if "rlora" in values:  # of axolotl, whose plugin takes the fields of the configuration
        assert RLoraConfig(**values["rlora"])
        return
    (folder / "this.yaml").write_text(yaml.safe_dump({**RUN, **values}))
    launcher, _ = split_arguments(training_parser(), ["--config", "this.yaml"])
    assert not launcher, "fields that the training program does not know"


@pytest.mark.parametrize("block", of("json"))
def test_json_rows(block):
    for line in block.text.splitlines():
        check_rows(Dataset.from_list([json.loads(line)]), "row")


@pytest.mark.parametrize("block", of("diff"))
def test_diff(block):
    """Both sides are Python."""
    lines = block.text.splitlines()
    for side in "-+":
        assert compile("\n".join(line[1:] for line in lines if line[:1] in (side, " ", "")), block.name, "exec")


def test_every_block_has_a_language():
    assert {block.name: block.language for block in BLOCKS if block.language not in LANGUAGES} == {}


def test_other_programs_are_used():
    used = {word for block in SHELL for command in commands(block) for word in command}
    assert set(OTHER_PROGRAMS) - {"model_signing"} <= used


@pytest.mark.parametrize(
    "line",
    [
        "rlora train --config run.yaml --no_such_argument 1",
        "rlora eval adapter --dta rows",
        "rlora zoo no-such-command",
        "accelerate launch --no_such 1 examples/sft_flan.py",
        "accelerate launch examples/sft_flan.py --max_steps many",
        "python benchmarks/quality.py --no-such-option",
        "make no-such-target",
        "pip install rlora-trl[no-such-extra]",
        "no-such-program",
    ],
)
def test_wrong_commands_fail(line, parsers, folder):
    with pytest.raises((AssertionError, SystemExit, typer.TyperException)):
        check(line.split(), parsers)
