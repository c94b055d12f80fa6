"""`rlora push`: publish an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from .loading import find_adapter, load_adapter, refuse_missing_folder
from .options import JsonOption, help_of
from .output import print_facts, print_json, results_only


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("push", help=help_of(push))(push)


def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of an adapter.", show_default=False)],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="user/name or organisation/name; made if not there.", show_default=False),
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
        str | None, typer.Option("--license", help="Licence of the adapter, e.g. apache-2.0.", show_default=False)
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
        from ..hub.push import push_adapter

        refuse_missing_folder(folder if "/" in folder else f"./{folder}")
        # Made on the base model that the folder names, which need not be on the Hub.
        source = load_adapter(find_adapter(folder)).model if exports else None
        commit = push_adapter(
            folder,
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
    facts = {"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url}
    if as_json:
        print_json({"repo_id": repo, **facts})
    else:
        print_facts(
            {"Published": repo, "Commit": facts["commit"], "URL": facts["url"], "Pull request": facts["pull_request"]}
        )
