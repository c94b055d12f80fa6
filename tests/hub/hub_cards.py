"""What the Hub makes of a model card: the metadata of README.md, its validation, and the tags that it computes."""

import fnmatch
import re
from collections.abc import Collection
from typing import Any

import yaml


FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.\-]*/)?[A-Za-z0-9][\w.\-]{0,95}")
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})")
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0
    cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
    """.split()
)
RELATIONS = ("adapter", "finetune", "merge", "quantized")


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card, empty where there is none or it is not a mapping."""
    match = FRONT_MATTER.match(text)
    try:
        data = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        data = None
    return data if isinstance(data, dict) else {}


def validate_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of the Hub for a card."""
    match = FRONT_MATTER.match(text)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [f"YAML metadata is not valid: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML metadata must be a mapping"], []
    errors = [*_check_strings(data), *_check_ids(data), *_check_model_index(data.get("model-index"))]
    return errors, []


def _check_strings(data: dict) -> list[str]:
    errors = []
    licenses = _as_list(data.get("license"))
    if any(license not in LICENSES for license in licenses):
        errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    for key in ("tags", "language", "datasets", "base_model", "library_name", "pipeline_tag", "license"):
        if any(not isinstance(item, str) for item in _as_list(data.get(key))):
            errors.append(f'"{key}" must be a string or a list of strings')
    if data.get("base_model_relation") not in (None, *RELATIONS):
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    return errors


def _check_ids(data: dict) -> list[str]:
    errors = []
    for key, kind in (("base_model", "model"), ("datasets", "dataset")):
        for value in _as_list(data.get(key)):
            if isinstance(value, str) and not REPO_ID.fullmatch(value):
                errors.append(
                    f'"{key}" with value "{value}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
                )
    return errors


def _check_model_index(index: Any) -> list[str]:
    """Each result needs `task.type`, `dataset.name`, `dataset.type` and metrics that have a type and a value."""
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"{where}.name" is required')
            continue
        if not isinstance(model.get("results"), list):
            errors.append(f'"{where}.results" is required')
            continue
        for j, result in enumerate(model["results"]):
            errors += _check_result(result, f"{where}.results[{j}]")
    return errors


def _check_result(result: Any, where: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{where}" must be of type object']
    errors = []
    for path in ("task.type", "dataset.name", "dataset.type"):
        outer, inner = path.split(".")
        if not isinstance((result.get(outer) or {}).get(inner), str):
            errors.append(f'"{where}.{path}" is required')
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not all(
        isinstance(m, dict) and {"type", "value"} <= m.keys() for m in metrics
    ):
        errors.append(f'"{where}.metrics" must be a list of objects with "type" and "value"')
    return errors


def base_models(card: dict[str, Any], files: Collection[str]) -> tuple[str | None, list[str]]:
    """Relation to the base models, guessed from the files unless the card states it, and the base models."""
    models = [model for model in _as_list(card.get("base_model")) if isinstance(model, str)]
    if not models:
        return None, []
    if card.get("base_model_relation") in RELATIONS:
        return card["base_model_relation"], models
    if "adapter_config.json" in files or card.get("library_name") == "peft":
        return "adapter", models
    if any(fnmatch.fnmatch(path, "*.gguf") for path in files):
        return "quantized", models
    return ("merge" if len(models) > 1 else "finetune"), models


def computed_tags(card: dict[str, Any], files: Collection[str], text: str) -> list[str]:
    """Tags of a model as the Hub lists them: by these, and only these, `/api/models?filter=` finds it."""
    tags = [card["library_name"]] if isinstance(card.get("library_name"), str) else []
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in files) else []
    tags += ["model-index"] if card.get("model-index") else []
    tags += [tag for tag in _as_list(card.get("tags")) if isinstance(tag, str)]
    tags += [card["pipeline_tag"]] if isinstance(card.get("pipeline_tag"), str) else []
    tags += [language for language in _as_list(card.get("language")) if isinstance(language, str)]
    tags += [f"dataset:{name}" for name in _as_list(card.get("datasets"))]
    tags += [f"arxiv:{number}" for number in ARXIV.findall(text)]
    relation, models = base_models(card, files)
    tags += [f"base_model:{model}" for model in models]
    tags += [f"base_model:{relation}:{model}" for model in models]
    tags += [f"license:{name}" for name in _as_list(card.get("license"))]
    return [*dict.fromkeys(tags), "region:us"]


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
