"""`rlora push`: publish an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .loading import find_adapter, load_adapter, refuse_missing_folder, refuse_unknown_task
from .output import print_facts, print_json, results_only


def push(
    folder: options.AdapterFolder,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name or organization/name; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; created if missing.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    exports: Annotated[
        list[str] | None,
        typer.Option("--exports", metavar="TASK", help="Add a plain-LoRA export for this task; may be repeated."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Hub name of the base model, if the adapter was trained on a local folder."),
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="License of the adapter, e.g. apache-2.0.")] = None,
    datasets: Annotated[
        list[str] | None, typer.Option("--dataset", metavar="NAME", help="Hub name of a dataset; may be repeated.")
    ] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TAG", help="Tag for the card; may be repeated.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option("--message", "-m", help="Title of the commit.")] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign with this private key (PEM, elliptic curve).")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Publish an adapter on the Hub: weights, configuration, card and figures in one commit.

    Other files in the folder are not uploaded. After an interruption, run the command again: files that were uploaded
    are not transferred a second time.
    """
    with results_only():
        from rlora_trl.publish import push_adapter

        refuse_missing_folder(folder, local=True)
        head = None if create_pr else head_of(repo, revision)

        # Exports use the base model that the folder names, which may be local.
        checked = source = None
        if exports:
            checked = find_adapter(folder)
            for task in exports:
                refuse_unknown_task(checked, task)
            source = load_adapter(checked).model

        commit = push_adapter(
            checked or folder,
            repo,
            private=private or None,  # None keeps the visibility of an existing repository
            revision=revision,
            create_pr=create_pr,
            exports=exports or None,
            base_model=base_model,
            license=license,
            datasets=datasets or None,
            tags=tags or None,
            commit_message=commit_message,
            export_from=source,
            sign=sign,
        )
    repo_id = commit.repo_url.repo_id  # includes the user's name, even if the argument did not
    unchanged = commit.oid == head
    facts = {"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url, "unchanged": unchanged}
    if as_json:
        print_json({"repo_id": repo_id, **facts})
    elif unchanged:
        print_facts({"Unchanged": f"{repo_id}, already at {commit.oid}", "URL": commit.commit_url})
    else:
        print_facts(
            {"Published": repo_id, "Commit": commit.oid, "URL": commit.commit_url, "Pull request": commit.pr_url}
        )


def head_of(repo: str, revision: str | None) -> str | None:
    """The latest commit of a repository; `None` if the repository or the branch does not exist."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(repo, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
