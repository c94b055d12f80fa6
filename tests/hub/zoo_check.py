"""What the worker runs for `test_zoo`: several adapters on one model."""

import logging
import time

import torch
from testing_utils import random_ids
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlora_cli.app import app
from rlora_trl import zoo
from rlora_trl.tuner import RLoraLayer


def base_model(name):
    return AutoModelForCausalLM.from_pretrained(name)


def rlora(words):
    """Exit code, results and remarks of the command line."""
    result = CliRunner().invoke(app, words, prog_name="rlora")
    return result.exit_code, result.stdout, result.stderr


@torch.no_grad()
def check(repos):
    model = zoo.load(repos)
    names = list(model.peft_config)
    ids = random_ids()

    def logits():
        return model(input_ids=ids).logits

    first = logits()
    active = model.active_adapter
    model.set_adapter(names[1])
    second = logits()
    model.set_adapter(names[0])
    zoo.mix(model, {names[0]: 1.0})
    single = logits()
    zoo.mix(model, dict.fromkeys(names, 0.0))
    zero = logits()
    with model.disable_adapter():
        base = logits()
    zoo.mix(model, {names[0]: 0.7, names[1]: -0.2})
    layer = next(module for module in model.modules() if isinstance(module, RLoraLayer))
    x = torch.randn(5, layer.in_features)
    deltas = {name: layer.rlora_adapters[name](x) / layer.rlora_adapters[name].scaling for name in names}
    expected = layer.base_layer(x) + sum(
        weight * layer.scaling[name] * deltas[name] for name, weight in zip(names, (0.7, -0.2), strict=True)
    )
    mixed = layer(x)
    model.set_adapter(names[0])
    back = logits()
    zoo.mix(model, {names[0]: 0.3})
    model.set_adapter(names[1])
    other = logits()
    return {
        "names": names,
        "active": active,
        "switched": (first - second).abs().max().item(),
        "single": (first - single).abs().max().item(),
        "back": (first - back).abs().max().item(),
        "other": (second - other).abs().max().item(),
        "zero": (zero - base).abs().max().item(),
        "sum": (mixed - expected).abs().max().item(),
    }


def search(**arguments):
    """Names that a search finds, what it warns of, and the seconds that it takes."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("rlora_trl").addHandler(handler)
    start = time.perf_counter()
    found = [info.repo_id for info in zoo.search(**arguments)]
    seconds = time.perf_counter() - start
    return {"found": found, "messages": [record.getMessage() for record in records], "seconds": seconds}
