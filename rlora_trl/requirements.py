"""What a run needs and may be missing, looked for before a model and data are loaded: packages of extras, folders."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path


def require_bitsandbytes(setting: str) -> None:
    """
    Refuse a setting that needs bitsandbytes where it is missing.

    transformers notices it after the data and the configuration of the model have been loaded.

    Args:
        setting (`str`): The setting in words, such as `` `load_in_4bit=True` ``.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ImportError(
            f"{setting} needs bitsandbytes, which is not installed. Run `pip install rlora-trl[quant]`, or "
            "`pip install '.[quant]'` in a checkout."
        )


def require_liger(setting: str) -> None:
    """
    Refuse a setting that needs Liger's kernels where they are missing.

    Args:
        setting (`str`): The setting in words, such as `` `use_liger_kernel=True` ``.

    Raises:
        ImportError: If Liger is not installed.
    """
    if find_spec("liger_kernel") is None:
        raise ImportError(f"{setting} needs Liger's kernels, which are not installed. Run `pip install liger-kernel`.")


# Values of `report_to`: the modules of which one is needed, and what to install. Others are left to transformers.
_TRACKERS = {
    "wandb": (("wandb",), "wandb"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "mlflow": (("mlflow",), "mlflow"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "swanlab": (("swanlab",), "swanlab"),
    "clearml": (("clearml",), "clearml"),
}


def require_trackers(names: Iterable[str]) -> None:
    """
    Refuse trackers that are missing.

    transformers notices it after the data have been prepared and the model has been loaded.

    Args:
        names (`Iterable[str]`): Values of `report_to`.

    Raises:
        ImportError: If the package of one is not installed.
    """
    for name in names:
        modules, package = _TRACKERS.get(name, ((), ""))
        if modules and all(find_spec(module) is None for module in modules):
            raise ImportError(
                f"`report_to={name!r}` needs {package}, which is not installed. Run `pip install {package}`, or set "
                "`report_to='none'`."
            )


def require_model_folder(name: str, remedy: str) -> None:
    """
    Refuse a path to a model where nothing is, which `huggingface_hub` takes for an invalid name.

    Args:
        name (`str`): A folder, or a name on the Hub: `name` or `user/name`.
        remedy (`str`): Last sentence of the message.

    Raises:
        FileNotFoundError: If the name can only be a path, and nothing is there.
    """
    is_path = name.startswith((".", "~", os.sep)) or name.rstrip("/").count("/") > 1
    if is_path and not Path(name).exists():
        raise FileNotFoundError(f"There is no model in {name}. {remedy}")
