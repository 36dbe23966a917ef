"""Fixtures that several test files share."""

import os

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
    "false"  # read when gcsfs is imported: else it first asks a gRPC service
)

import pytest

from tests.fake_gcs import FakeGCS


@pytest.fixture
def gcs(monkeypatch):
    """An empty object store on loopback that answers gs:// URLs of this process; `gcs.env` makes others use it."""
    with FakeGCS() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.attach(monkeypatch)
        yield server
