"""`rlora push`: publish an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from .loading import find_adapter, load_adapter, refuse_missing_folder, refuse_unknown_task
from .options import Command, JsonOption, help_of
from .output import print_facts, print_json, results_only


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("push", cls=Command, help=help_of(push))(push)


def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of an adapter.", show_default=False)],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="user/name or organization/name; made if not there.", show_default=False),
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; made if not there.", show_default="main")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    exports: Annotated[
        list[str] | None,
        typer.Option(
            "--exports",
            metavar="TASK",
            help="Add a plain-LoRA export of this task; may be repeated.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", help="Hub name of the base model, if trained on a local folder.", show_default=False
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="License of the adapter, e.g. apache-2.0.", show_default=False)
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="Hub name of a data set; may be repeated.", show_default=False),
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="Tag for the card; may be repeated.", show_default=False)
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Title of the commit.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish an adapter on the Hub: weights, configuration, card and figures in one commit.

    Nothing else in the folder is uploaded. After an interruption run it again: what has arrived is not sent twice.
    """
    with results_only():
        from rlora_trl.publish import push_adapter

        refuse_missing_folder(folder if "/" in folder else f"./{folder}")
        head = None if create_pr else head_of(repo, revision)
        checked = find_adapter(folder) if exports else None
        if checked is not None:
            for task in exports or ():
                refuse_unknown_task(checked, task)
        # Made on the base model that the folder names, which need not be on the Hub.
        source = load_adapter(checked).model if checked is not None else None
        commit = push_adapter(
            checked or folder,
            repo,
            private=private or None,  # None leaves a repository that is there as it is
            revision=revision,
            create_pr=create_pr,
            exports=exports or None,
            base_model=base_model,
            license=license,
            datasets=dataset or None,
            tags=tag or None,
            commit_message=message,
            export_from=source,
        )
    repo_id = commit.repo_url.repo_id  # with the user's name, which may be left out
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
    """The commit that a repository is at; `None` if there is no such repository or branch yet."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().model_info(repo, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
