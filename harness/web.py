"""Serves pages over HTTP, on a few threads, to those who may read them.

A browser on this machine is not to be trusted with what other sites ask of it: the name by which it came must be one of
ours (against DNS rebinding), and from other machines it must bring a token. Nothing is written, no file is named.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from harness.errors import UsageError
from reports.pages.site import Answer

THREADS = 8
MOST_WAITING = 64  # connections; more are closed unheard
IDLE_S = 10.0  # between two bytes of a request
REQUEST_S = 60.0  # for a request and its answer
POLL_S = 0.25  # between two looks at whether to stop, and at who takes too long
PIECE_BYTES = 64 << 10  # of an answer: each has IDLE_S to go
_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,256}")
_COOKIE = "edgemoe_farm"
_HEADERS = {
    # Pages bring a policy of their own, which is stricter still; this one is of the frame around them.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-cache",  # kept, and asked after each time by its tag
}

_NO_HEADERS: Mapping[str, str] = {}

Find = Callable[[str, bool], Answer]  # (path, still)


@dataclass(frozen=True)
class Access:
    """Decides who is let in: by the names of the server and, unless it is None, by a token."""

    names: frozenset[str]
    any_address: bool = False  # numbers are names of ours, too: nobody can make a foreign site resolve to them
    token: str | None = None

    @classmethod
    def at(cls, host: str, names: tuple[str, ...] = (), token: str | None = None) -> Access:
        """Returns the access to a server at `host`, with a token if it needs one. Raises UsageError for a weak one."""
        if token is not None and not _TOKEN.fullmatch(token):
            raise UsageError(
                "EDGEMOE_FARM_TOKEN must be 16 or more of letters, digits, dash and underscore: leave it out, and one "
                "is made"
            )
        own = frozenset(name.lower().rstrip(".") for name in (host, *names))
        if is_loopback(host):
            return cls(own | {"localhost", "127.0.0.1", "::1"}, token=token)
        known = {socket.gethostname().lower(), socket.getfqdn().lower(), "localhost"}
        return cls(own | known, any_address=True, token=token or secrets.token_urlsafe(24))

    def knows(self, host: str | None) -> bool:
        """Returns whether `host`, the header of that name, is one of the server's names."""
        try:
            name = urlsplit(f"//{host or ''}").hostname or ""
        except ValueError:
            return False
        name = name.rstrip(".")
        return name in self.names or (self.any_address and _address(name) is not None)

    def accepts(self, token: str | None) -> bool:
        if self.token is None:
            return True
        return hmac.compare_digest((token or "").encode("utf-8", "replace"), self.token.encode())


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = IDLE_S
    server_version, sys_version = "edgemoe-farm", ""

    def do_GET(self) -> None:
        access = self.server.access
        if not access.knows(self.headers.get("Host")):
            self._send(
                Answer.text(421, "this server does not go by that name: see `edgemoe-farm serve --help`, --name")
            )
            return
        try:
            target = urlsplit(self.path)
            query = parse_qs(target.query, keep_blank_values=True, max_num_fields=8)
        except ValueError:
            self._send(Answer.text(400, "this is no address of a page"))
            return
        if "token" in query and access.token is not None and access.accepts(query["token"][0]):
            # Out of the address, which is seen and stored in more places.
            cookie = f"{_COOKIE}={access.token}; HttpOnly; SameSite=Lax; Path=/"
            self._send(Answer.text(303, "welcome"), {"Location": _local(target.path), "Set-Cookie": cookie})
        elif not access.accepts(self._token()):
            challenge = {"WWW-Authenticate": 'Bearer realm="edgemoe-farm"'}
            refusal = Answer.text(401, "a token is needed: open the address that `edgemoe-farm serve` showed")
            self._send(refusal, challenge)
        else:
            answer = self.server.find(target.path, "still" in query)
            asked = [tag.strip().removeprefix("W/") for tag in self.headers.get("If-None-Match", "").split(",")]
            self._send(answer, is_known=answer.status == 200 and answer.tag in asked)

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._send(Answer.text(405, "this server is only read"), {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _token(self) -> str | None:
        kind, _, bearer = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return bearer.strip()
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            return None
        return None if found is None else found.value

    def _send(self, answer: Answer, headers: Mapping[str, str] = _NO_HEADERS, *, is_known: bool = False) -> None:
        self.send_response(304 if is_known else answer.status)
        for name, value in {**_HEADERS, **headers, "ETag": answer.tag}.items():
            self.send_header(name, value)
        if answer.refresh_s is not None:
            self.send_header("Refresh", str(answer.refresh_s))
        if not is_known:
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD" and not is_known:
            for start in range(0, len(answer.body), PIECE_BYTES):
                self.wfile.write(answer.body[start : start + PIECE_BYTES])

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what is no request that a method here could answer."""
        self._send(Answer.text(code, message or "this is no request that is answered"), {"Connection": "close"})

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 - named there
        """Logs nothing: a page that is looked at all night is no news."""


def _local(path: str) -> str:
    """Returns a path on this site; two slashes at its beginning would name another site."""
    return "/" + path.replace("\\", "/").lstrip("/")


class Server(socketserver.TCPServer):
    """Listens as soon as it is made; `serve` answers until `stop` is called; must be closed."""

    allow_reuse_address = True
    request_queue_size = MOST_WAITING
    timeout = POLL_S  # of handle_request

    def __init__(
        self, host: str, port: int, access: Access, find: Find, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Listens. Raises UsageError where that address cannot be listened at."""
        self.access, self.find, self._clock = access, find, clock
        self._open: dict[socket.socket, float] = {}  # and when they must have ended
        self._is_stopping = False
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="serve")
        self._lock = threading.Lock()
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            self.address_family = family
            super().__init__(address[:2], Handler)  # type: ignore[arg-type]
        except (OSError, OverflowError, UnicodeError) as error:
            self._pool.shutdown(wait=False)
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"cannot listen at {host}, port {port}: {reason}: name another with --host, --port"
            ) from None

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def serve(self) -> None:
        """Answers requests until `stop` is called, which it notices within POLL_S."""
        while not self._is_stopping:
            self.handle_request()
            self.service_actions()

    def stop(self) -> None:
        """Makes `serve` return. Signal handlers and other threads may call it at any time.

        A handler that raised KeyboardInterrupt instead could lose it: Python drops what is raised within a finalizer.
        """
        self._is_stopping = True

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            is_full = len(self._open) >= MOST_WAITING
            if not is_full:
                self._open[request] = self._clock() + REQUEST_S
        if is_full:
            self.shutdown_request(request)
        else:
            self._pool.submit(self._attend, request, client_address)

    def service_actions(self) -> None:
        """Closes connections that take too long, so that their threads are free again."""
        with self._lock:
            late = [request for request, end in self._open.items() if self._clock() > end]
        for request in late:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def _attend(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except (ConnectionError, TimeoutError):
            pass  # it has gone
        except Exception as error:  # noqa: BLE001 - a bug in one page must not end the server
            sys.stderr.write(f"serve: {type(error).__name__}: {str(error)[:200]!r}\n")
        finally:
            with self._lock:
                self._open.pop(request, None)
            self.shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            requests = list(self._open)
        for request in requests:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RD)  # what is being answered is answered
        self._pool.shutdown(wait=True, cancel_futures=True)
