"""The process that starts all runs, and what they begin with."""

import pytest
from runs import ForkServer


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Imports everything once; runs begin in milliseconds."""
    server = ForkServer(tmp_path_factory.mktemp("server"))
    yield server
    server.close()
