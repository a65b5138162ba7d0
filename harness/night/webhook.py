"""Tells a webhook by one POST of JSON, within a deadline. Its URL is a secret of the environment, never told."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from harness.errors import UsageError

ATTEMPTS = 2
_ANSWER_BYTES = 4096


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the secret goes only to the host that it was given to."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def webhook_url(variable: str) -> str:
    """Returns the URL that the environment has. Raises UsageError, without the value."""
    url = os.environ.get(variable, "")
    if not url:
        raise UsageError(f"webhook: {variable} is not set: set it to the webhook's URL, or remove url_env")
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"[\s\x00-\x1f]", url)
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"webhook: {variable} is not an http or https URL: correct it")
    return url


def post(url: str, payload: Any, *, deadline_s: float) -> str | None:
    """Posts within `deadline_s` in all; returns why that failed, without the URL, or None."""
    outcome: list[str | None] = []
    sender = threading.Thread(target=lambda: outcome.append(_post(url, payload, deadline_s)), daemon=True)
    sender.start()
    sender.join(deadline_s)  # a server that answers a byte now and then keeps no socket's deadline
    return outcome[0] if outcome else f"no answer within {deadline_s:g} s"


def _post(url: str, payload: Any, deadline_s: float) -> str | None:
    body = json.dumps(payload, allow_nan=False).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "edgemoe-farm"}
    opener = urllib.request.build_opener(_NoRedirects)
    failure: str | None = None
    for _ in range(ATTEMPTS):
        request = urllib.request.Request(url, body, headers, method="POST")  # noqa: S310 - http and https only
        try:
            with opener.open(request, timeout=deadline_s) as answer:
                answer.read(_ANSWER_BYTES)
            return None
        except urllib.error.HTTPError as error:
            error.close()
            failure = f"it answered {error.code}"
            if error.code < 500:
                return failure
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            failure = type(reason).__name__ if not isinstance(reason, OSError) else reason.strerror or "no answer"
    return failure
