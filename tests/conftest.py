"""Fixtures that several test files share: an object store on loopback, and small real datasets made by the real prep."""

import os
import signal

# Read when the libraries are imported. gcsfs else first asks a gRPC service that no emulator has; two threads of torch
# on two busy cores wait for each other at every small operation: 500 steps took 90 s instead of 5.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest

from scripts import demo_corpus
from tests.fake_gcs import FakeGCS
from tests.fake_s3 import FakeS3
from tests.helpers import prepare, train

# The same examples every time: a build is red for what was changed in it. `--hypothesis-profile=default` looks further.
hypothesis.settings.register_profile("the same", derandomize=True)
hypothesis.settings.load_profile("the same")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Nothing in the tests reads or fills the user's cache, or is led by the user's settings."""
    # nohup leaves SIGHUP ignored to all that it starts, a shell's `&` SIGINT, and the programs respect that: the tests send
    # them both
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PERENNIAL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    for name in ("PERENNIAL_DATA", "PERENNIAL_OUT", "COLAB_RELEASE_TAG"):
        os.environ.pop(name, None)


@pytest.fixture
def gcs(monkeypatch):
    """An empty object store on loopback that answers gs:// URLs of this process; `gcs.env` makes others use it."""
    with FakeGCS() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.attach(monkeypatch)
        yield server


@pytest.fixture(scope="session")
def s3_server():
    """One for all tests: a client of botocore's takes 0.2 s to make, and is kept by the address of its server."""
    s3fs = pytest.importorskip("s3fs")
    with FakeS3() as server, pytest.MonkeyPatch.context() as m:
        m.setattr(s3fs.S3FileSystem, "retries", 1)  # its own five, with pauses, hide ours
        m.setattr(s3fs.S3FileSystem, "read_timeout", 0.5)  # of 15 s
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch):
    """An empty S3 on loopback that answers s3:// URLs of this process."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    s3_server.empty()
    return s3_server


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """600 kB of the demo's conversations."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    demo_corpus.main(["--output", str(path), "--megabytes", "0.6"])
    return path


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory):
    """That corpus as a compressed token dataset of several shards."""
    folder = tmp_path_factory.mktemp("data") / "tokens"
    flags = ["--vocab-size", 512, "--compress", "--shard-tokens", 40_000, "--val-fraction", 0.05]
    assert prepare("--input", corpus, "--output", folder, *flags) == 0
    return folder


@pytest.fixture(scope="session")
def run_folder(data, tmp_path_factory):
    """A finished run of 12 steps on it, with samples at steps 6 and 12: only read it."""
    out = tmp_path_factory.mktemp("run") / "out"
    small = ("--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--batch", 8, "--device", "cpu")
    every = ("--eval-every", 6, "--eval-tokens", 512, "--save-every", 6, "--sample-every", 6)
    assert train("--data", data, "--steps", 12, *every, *small, "--out", out) == 0
    return out


@pytest.fixture(scope="session")
def roomy_run(data, tmp_path_factory):
    """A finished run of 30 steps with room for a prompt and 64 tokens after it: only read it."""
    out = tmp_path_factory.mktemp("roomy") / "out"
    shape = ("--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", 128, "--batch", 8, "--device", "cpu")
    quiet = ("--eval-tokens", 512, "--sample-every", 0, "--lr", 1e-2)
    assert train("--data", data, "--steps", 30, *shape, *quiet, "--out", out) == 0
    return out
