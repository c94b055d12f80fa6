"""What a push and a pull rely on in `huggingface_hub`, and what the Hub refuses."""

import pytest
from processes import WorkerError
from samples import BASE, save_adapter, save_base


REPO = "user/words"
PUSH = """
from rlora_trl import push_adapter
push_adapter(folder, repo, **options)
"""


@pytest.fixture
def push(hub, worker, tmp_path):
    hub.commit(BASE, save_base(tmp_path / "base"))
    folder = save_adapter(tmp_path / "adapter")

    def run(**options):
        return worker.run(PUSH, folder=str(folder), repo=REPO, options=options)

    return run


def test_the_token_stays_with_the_hub(hub, push, worker):
    """Large files go to the storage of another host, and come from there, without it."""
    push()
    worker.run("from rlora_trl import pull_adapter; pull_adapter(repo)", repo=REPO)
    requests = {storage: [r for r in hub.requests if r.storage is storage] for storage in (False, True)}
    assert {r.authorization for r in requests[False]} == {f"Bearer {hub.token}"}
    assert {r.method for r in requests[True]} == {"PUT", "GET"}
    assert {r.authorization for r in requests[True]} == {None}


def test_an_upload_that_fails_once_is_tried_again(hub, push):
    hub.fail("PUT", "/upload/", status=503)
    push()
    assert "adapter_model.safetensors" in hub.files(REPO)


def test_a_card_that_the_hub_refuses_publishes_nothing(hub, push):
    with pytest.raises(WorkerError, match='"license" must be one of'):
        push(license="mine")
    assert REPO not in hub.repos or set(hub.files(REPO)) == {".gitattributes"}
