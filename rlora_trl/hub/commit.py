"""The commit of a push: compares the repository with the push, and retries the commit.

One push is one commit. The card and the record are rendered from the parent commit, so that text added on the Hub in
the meantime is never overwritten.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from transformers.utils import logging

from ..files.card_text import CARD_LIMIT, check_card, check_card_text
from ..files.checks import RECORD_LIMIT, AdapterCheckError, CheckedAdapter
from ..files.download import Listing, fetch, is_same_file, list_files
from ..files.layout import (
    CARD_NAME,
    FIGURES,
    PICKLED_WEIGHTS_NAME,
    RECORD_NAME,
    SIGNATURE_NAME,
    WEIGHTS_NAME,
    FileKind,
    classify,
    is_training_leftover,
    published_files,
)
from ..files.record import AdapterRecord
from ..files.signatures import SIGNATURE_LIMIT, is_signed_by, sign_folder
from ..reading import first_few
from .card import render_card
from .card_reading import hand_written, read_card, read_card_info


logger = logging.get_logger(__name__)

# Figures that a push draws. Other figures in the repository stay.
HEAD_SIMILARITY_FIGURE = f"{FIGURES}/head_similarity.png"
ROUTING_FIGURE = f"{FIGURES}/routing.png"

# Status codes of transient errors of the Hub, after which `create_commit` does not retry (no upstream issue as of
# huggingface_hub 2.4).
_TRANSIENT = (500, 502, 503, 504)
_CONFLICT = (409, 412)
_ATTEMPTS = 4


@dataclass(frozen=True)
class Publication:
    """
    What a push publishes.

    Args:
        checked ([`CheckedAdapter`]): The adapter, in a folder that belongs to the push: all files that
            [`published_files`] lists are uploaded. Record and card are written into it.
        record ([`AdapterRecord`]): Its record, with the exports in the folder.
        card (`str`, *optional*): The local card. Its text is used if the repository has no card.
        license (`str`, *optional*), datasets (`Sequence[str]`, *optional*), tags (`Sequence[str]`, *optional*): See
            [`render_card`].
        sign (`str`, *optional*): File with the private key to sign with.
    """

    checked: CheckedAdapter
    record: AdapterRecord
    card: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    tags: Sequence[str] = ()
    sign: str | os.PathLike | None = None


def commit_adapter(
    api: HfApi,
    repo_id: str,
    publication: Publication,
    *,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """
    Publish an adapter in one commit, and compare the Hub's listing with the files that were checked and uploaded.

    Args:
        api (`HfApi`): The client.
        repo_id (`str`): An existing repository.
        publication ([`Publication`]): What to publish.
        message (`str`): Title of the commit.
        revision (`str`, *optional*): An existing branch. Defaults to the main one.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request with the commit instead.

    Returns:
        `CommitInfo`: The commit; the head if nothing has changed.

    Raises:
        AdapterCheckError: If the repository has files that `pull_adapter` refuses or a card that can't be read, the
            weights have changed since they were checked, or the Hub lists contents that differ from the push.
        ConnectionError: If the commit was made, but its files could not be listed.
        HfHubHTTPError: If the Hub refuses the commit, or transient errors persist after a few attempts.
    """
    transaction = _Transaction(api, repo_id, publication, revision, create_pr)
    commit = transaction.run(message)
    transaction.verify(commit.oid)
    return commit


@dataclass(frozen=True)
class _Repository:
    """The contents of a repository at one commit."""

    files: frozenset[str]
    card: str | None = None
    digest: str | None = None  # of its tensors, according to the card
    record: AdapterRecord | None = None


class _Transaction:
    def __init__(
        self, api: HfApi, repo_id: str, publication: Publication, revision: str | None, create_pr: bool
    ) -> None:
        self.api, self.repo_id, self.revision, self.create_pr = api, repo_id, revision, create_pr
        self.publication, self.folder = publication, publication.checked.folder
        self.head: str | None = None  # the commit that the operations are for
        self.additions: list[CommitOperationAdd] = []
        self.deletions: list[CommitOperationDelete] = []

    def run(self, message: str) -> CommitInfo:
        """Commit; retry after a transient error, or if the branch has moved."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._commit(message)
            except HTTPError as error:
                # No response: the connection broke.
                status = getattr(getattr(error, "response", None), "status_code", None)
                transient = status is None or status in _TRANSIENT

                # The commit may have landed although the response was lost. On a branch the next attempt finds
                # nothing left to commit; for a pull request it would open a second one.
                if transient and self.create_pr and self.additions:
                    landed = self._find_pull_request(message)
                    if landed is not None:
                        return landed

                if attempt == _ATTEMPTS or not (transient or status in _CONFLICT):
                    _explain_failure(error, refused=status is not None and not transient)
                    raise
                logger.warning(f"Attempt {attempt} of {_ATTEMPTS} to commit to {self.repo_id} failed: {error}")
                if transient:
                    time.sleep(0.25 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def verify(self, commit: str) -> None:
        """Compare the files that a commit lists with those of this push."""
        try:
            differing = self._differing(commit)
        except (HTTPError, OSError) as error:
            raise ConnectionError(
                f"{self.repo_id} was published as commit {commit}, but its files could not be listed for comparison: "
                f"{error}. Check it with `pull_adapter({self.repo_id!r}, revision={commit!r})`."
            ) from error
        if differing:
            raise AdapterCheckError(
                f"{self.repo_id} at {commit} lists contents that differ from those of this push: "
                f"{', '.join(differing)}. Push again; if the error persists, report it to the operators of the Hub."
            )

    def _commit(self, message: str) -> CommitInfo:
        listing = list_files(self.repo_id, self.revision, token=self.api.token)
        if listing.commit != self.head:
            self._prepare(listing)
        return self.api.create_commit(
            self.repo_id,
            [*self.additions, *self.deletions],
            commit_message=message,
            revision=self.revision,
            create_pr=self.create_pr,
            # The card was rendered from this head. On another head the commit could revert an edit made on the Hub.
            parent_commit=listing.commit,
        )

    def _prepare(self, listing: Listing) -> None:
        """Write record and card for a commit onto the listed one, and list its operations."""
        repository = self._read_repository(listing)

        # Exports of the same weights stay, unless this push replaces them.
        remaining = self._remaining_exports(repository)
        record = replace(self.publication.record, exports=[*self.publication.record.exports, *remaining])
        record.save(self.folder)
        self._write_card(repository, record)
        self._sign(listing)

        files = published_files(self.folder)
        outdated = self._outdated(repository, [export["path"] for export in remaining]) - set(files)
        self.additions = [CommitOperationAdd(path, str(self.folder / path)) for path in files]
        self.deletions = [CommitOperationDelete(path) for path in sorted(outdated)]
        self._check_weights()
        self.head = listing.commit

    def _check_weights(self) -> None:
        """Compare the weights that are about to be uploaded with those that were checked."""
        for addition in self.additions:
            if addition.path_in_repo == WEIGHTS_NAME:
                if addition.upload_info.sha256.hex() != self.publication.checked.sha256:
                    raise AdapterCheckError(
                        f"{WEIGHTS_NAME} has changed since it was checked. Nothing was published. Push again when "
                        "nothing writes into the folder."
                    )

    def _read_repository(self, listing: Listing) -> _Repository:
        """Card and record of the repository. Others may have written them: sizes come first."""
        files = frozenset(listing.files)
        if CARD_NAME not in files:
            return _Repository(files)
        sizes = {path: listing.files[path].size or 0 for path in files & {CARD_NAME, RECORD_NAME}}
        if sizes[CARD_NAME] > CARD_LIMIT:
            raise AdapterCheckError(
                f"{CARD_NAME} of {self.repo_id} has {sizes[CARD_NAME]} bytes, and at most {CARD_LIMIT} are read. "
                "Nothing was published. Shorten or remove it."
            )

        with TemporaryDirectory(prefix="rlora-push-") as scratch:
            fetch(listing, CARD_NAME, Path(scratch, CARD_NAME), token=self.api.token)
            # Before it is read as text, which it may not be.
            check_card(Path(scratch, CARD_NAME))
            card = read_card(Path(scratch, CARD_NAME)) or ""
            try:
                if sizes.get(RECORD_NAME, 0) > RECORD_LIMIT:
                    raise ValueError(f"it has {sizes[RECORD_NAME]} bytes, and at most {RECORD_LIMIT} are read")
                if RECORD_NAME in files:
                    fetch(listing, RECORD_NAME, Path(scratch, RECORD_NAME), token=self.api.token)
                record = AdapterRecord.load(scratch)
            except ValueError as error:
                logger.warning(f"The record in {self.repo_id} is replaced, as it can't be read: {error}")
                record = None

        info = read_card_info(check_card_text(card, f"The card of {self.repo_id}"))
        return _Repository(files, card, info.get("digest"), record)

    def _sign(self, listing: Listing) -> None:
        """
        Sign the files of this push, which have their final contents now.

        A signature in the repository that holds for them stays: a new one would differ, as it has a random part, and
        an unchanged adapter would get a new commit with each push.
        """
        key = self.publication.sign
        if key is None:
            return
        path = self.folder / SIGNATURE_NAME
        path.unlink(missing_ok=True)
        file = listing.files.get(SIGNATURE_NAME)
        if file is not None and 0 < (file.size or 0) <= SIGNATURE_LIMIT:
            fetch(listing, SIGNATURE_NAME, path, token=self.api.token)
            if is_signed_by(self.folder, key):
                return
        sign_folder(self.folder, key)

    def _remaining_exports(self, repository: _Repository) -> list[dict[str, Any]]:
        """Exports in the repository that were made from the same weights, and that this push does not replace."""
        if repository.record is None or repository.digest != self.publication.checked.digest:
            return []
        made = {export["path"] for export in self.publication.record.exports}
        return [
            export
            for export in repository.record.exports
            if export["path"] not in made and _is_export(export["path"], repository.files)
        ]

    def _outdated(self, repository: _Repository, remaining: Sequence[str]) -> set[str]:
        """
        Files to delete: figures, exports and the signature of other pushes, and a stock trainer's pickles.

        Raises:
            AdapterCheckError: If the repository has other files that `pull_adapter` refuses.
        """
        hostile = {path for path in repository.files if classify(path) is FileKind.HOSTILE}
        pickles = {path for path in hostile if is_training_leftover(path) or path == PICKLED_WEIGHTS_NAME}
        if hostile - pickles:
            raise AdapterCheckError(
                f"{self.repo_id} has {first_few(hostile - pickles, 5)}, which a loader might execute: "
                "`pull_adapter` would refuse the repository. Remove them, or push to another repository."
            )
        if pickles:
            logger.warning(f"This push removes the pickles in {self.repo_id}: {first_few(pickles, 10)}")

        outdated = set(pickles)
        if SIGNATURE_NAME in repository.files and self.publication.sign is None:
            logger.warning(f"This push is not signed, and removes the signature of the earlier one in {self.repo_id}.")
            outdated.add(SIGNATURE_NAME)
        if repository.digest != self.publication.checked.digest:
            outdated |= repository.files & {HEAD_SIMILARITY_FIGURE, ROUTING_FIGURE}
        recorded = {export["path"] for export in (repository.record.exports if repository.record else ())}
        folders = recorded - {*remaining}
        exports = {path for path in repository.files if classify(path) is FileKind.EXPORT}
        return outdated | {path for path in exports if path.rpartition("/")[0] in folders}

    def _write_card(self, repository: _Repository, record: AdapterRecord) -> None:
        """Render the card. Text around the generated part comes from the repository, or first from the local card."""
        local = self.publication.card
        if repository.card is not None and local is not None:
            local_text = hand_written(local)
            if local_text and local_text != hand_written(repository.card):
                logger.warning(
                    f"{self.repo_id} keeps the text of its card; hand-written text in the local {CARD_NAME} is not "
                    "published. Edit the card on the Hub to change it."
                )

        checked = self.publication.checked
        card = render_card(
            checked.config,
            record,
            repo_id=self.repo_id,
            digest=checked.digest,
            num_parameters=checked.num_parameters,
            figures=[path for path in published_files(self.folder) if classify(path) is FileKind.FIGURE],
            license=self.publication.license,
            datasets=self.publication.datasets,
            tags=self.publication.tags,
            existing=local if repository.card is None else repository.card,
        )
        card.save(self.folder / CARD_NAME)
        check_card(self.folder / CARD_NAME)

    def _find_pull_request(self, message: str) -> CommitInfo | None:
        """The commit of the newest pull request, if it has the files of this push."""
        discussions = self.api.get_repo_discussions(self.repo_id)
        number = max((discussion.num for discussion in discussions if discussion.is_pull_request), default=None)
        if number is None or self._differing(f"refs/pr/{number}"):
            return None
        oid = list_files(self.repo_id, f"refs/pr/{number}", token=self.api.token).commit
        url = f"{self.api.endpoint}/{self.repo_id}"
        return CommitInfo(
            commit_url=f"{url}/commit/{oid}",
            commit_message=message,
            commit_description="",
            oid=oid,
            pr_url=f"{url}/discussions/{number}",
        )

    def _differing(self, revision: str) -> list[str]:
        """Files of this push that a revision lacks or lists with other contents. No file is downloaded."""
        paths = [addition.path_in_repo for addition in self.additions]
        entries = self.api.get_paths_info(self.repo_id, paths, revision=revision)
        files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
        return [
            addition.path_in_repo
            for addition in self.additions
            if addition.path_in_repo not in files or not self._is_same(addition, files[addition.path_in_repo])
        ]

    def _is_same(self, addition: CommitOperationAdd, file: RepoFile) -> bool:
        if file.lfs is None:
            return is_same_file(Path(str(addition.path_or_fileobj)), file)
        # The weights must be those that were checked; hashes of other files are known from the upload.
        if addition.path_in_repo == WEIGHTS_NAME:
            return file.lfs.sha256 == self.publication.checked.sha256
        return file.lfs.sha256 == addition.upload_info.sha256.hex()


def _is_export(folder: str, files: frozenset[str]) -> bool:
    """Whether a folder that a record names is that of an export, and is there."""
    weights = f"{folder}/{WEIGHTS_NAME}"
    return classify(weights) is FileKind.EXPORT and weights in files


def _explain_failure(error: HTTPError, refused: bool) -> None:
    """Add the remedy to an error. After a transient error the commit may have landed."""
    text = "\nRun the same push again: files that were uploaded are not transferred a second time."
    if not isinstance(error, HfHubHTTPError):
        error.args = (f"{error}. The connection to the Hub broke.{text}",)
    else:
        error.append_to_message(f"\nNothing was published.{text}" if refused else text)
