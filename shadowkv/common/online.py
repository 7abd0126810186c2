"""Whether anything may be fetched, and whether the Hub answers.

The environment is read here and nowhere else: the Hub's own client reads its variable once, when it is imported.
"""

from __future__ import annotations

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping

_FORBIDDING = ("SKV_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_YES = {"1", "TRUE", "YES", "ON"}
_REACH_SECONDS = 3.0


def forbidden_by(offline: bool = False, environ: Mapping[str, str] | None = None) -> str | None:
    """The setting that forbids fetching anything, as a user writes it; None where it is allowed.

    offline: whether `--offline` was given.
    """
    if offline:
        return "--offline"
    given = os.environ if environ is None else environ
    set_ones = [name for name in _FORBIDDING if given.get(name, "").strip().upper() in _YES]
    return f"{set_ones[0]}={given[set_ones[0]]}" if set_ones else None


def reachable(endpoint: str) -> bool:
    """One quick look: the Hub's client would retry for a long time before it gave up."""
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_REACH_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # an answer, if an unkind one
    except OSError as error:
        # An unknown certificate is an answer too: the Hub's client may know it, it brings its own list.
        return isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError)
    return True
