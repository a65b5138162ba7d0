import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from harness.errors import UsageError
from harness.night.webhook import post, webhook_url


@pytest.fixture
def server():
    """A web server that answers with `status` and keeps what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            web.received.append((self.path, self.headers["Content-Type"], json.loads(body)))
            web.release.wait(30)
            self.send_response(web.status)
            if web.status == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()

        def log_message(self, *args) -> None: ...

    web = HTTPServer(("127.0.0.1", 0), Handler)
    web.received, web.status, web.release = [], 200, threading.Event()
    web.release.set()
    web.url = f"http://127.0.0.1:{web.server_port}/hook/SECRET"
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield web
    web.release.set()
    web.shutdown()
    thread.join()
    web.server_close()


def test_the_payload_arrives(server) -> None:
    assert post(server.url, {"text": "é"}, deadline_s=30) is None
    assert server.received == [("/hook/SECRET", "application/json", {"text": "é"})]


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (302, 1), (503, 2)])
def test_a_refusal_is_told_without_the_url(server, status, attempts) -> None:
    server.status = status
    assert post(server.url, {}, deadline_s=30) == f"it answered {status}"
    assert len(server.received) == attempts


def test_silence_ends(server) -> None:
    server.release.clear()
    failure = post(server.url, {}, deadline_s=0.2)
    assert failure
    assert "SECRET" not in failure


def test_nobody_listens() -> None:
    failure = post("http://127.0.0.1:1/SECRET", {}, deadline_s=30)
    assert failure == "Connection refused"


@pytest.mark.parametrize("url", ["file:///etc/passwd", "SECRET", "http://", "http://h:port/SECRET", "http://h/a b"])
def test_only_urls_of_the_web_and_their_value_is_not_repeated(monkeypatch, url) -> None:
    monkeypatch.setenv("HOOK", url)
    with pytest.raises(UsageError, match="HOOK is not an http or https URL") as error:
        webhook_url("HOOK")
    assert "SECRET" not in str(error.value)


def test_a_variable_that_is_not_set(monkeypatch) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    with pytest.raises(UsageError, match="HOOK is not set"):
        webhook_url("HOOK")
