"""Google Compute Engine's preemption notice: the metadata server knows about 30 seconds before the VM is stopped.

https://cloud.google.com/compute/docs/instances/create-use-preemptible: `instance/preempted` turns from FALSE to TRUE.
"""

import http.client
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

NOTICE = "GCE preemption notice"
HOST = "GCE_METADATA_HOST"  # Google's own variable for another address of the server
PRODUCT = Path("/sys/class/dmi/id/product_name")
WAIT_S = 60  # for how long the server holds a request for a change
LONGEST_PAUSE_S = 60.0


def metadata_host() -> str | None:
    """Where the metadata server is; None off GCE, and on Colab, whose VMs are Google's but never so announced."""
    if os.environ.get(HOST):
        return os.environ[HOST]
    if os.environ.get("COLAB_RELEASE_TAG"):
        return None
    try:
        return "metadata.google.internal" if "Google Compute Engine" in PRODUCT.read_text() else None
    except OSError:
        return None


def watch(tell: Callable[[str], None]) -> None:
    """Call `tell` from a thread once this VM is to be preempted; where there is no server, do nothing."""
    host = metadata_host()
    if host:
        threading.Thread(target=_watch, args=(host, tell), daemon=True, name="gce").start()


def _watch(host: str, tell: Callable[[str], None]) -> None:
    etag, pause_s = "0", 1.0
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # link-local: no proxy reaches it
    url = f"http://{host}/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec={WAIT_S}&last_etag="
    while True:
        try:
            # "0" is nobody's etag: the first answer comes at once, later ones when it changes
            request = urllib.request.Request(url + etag, headers={"Metadata-Flavor": "Google"})
            with opener.open(request, timeout=WAIT_S + 10) as answer:
                value, new = answer.read(16).strip(), answer.headers.get("ETag", "")
            if value == b"TRUE":
                return tell(NOTICE)
            if value == b"FALSE" and new.isalnum():
                etag, pause_s = new, 1.0
        except urllib.error.HTTPError as e:
            if e.code == 404:  # a server that only hands out credentials: it will never know
                return None
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except (OSError, http.client.HTTPException, ValueError):
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)  # not reachable now: training does not depend on it
        time.sleep(pause_s)  # also where the server does not wait, but answers at once
