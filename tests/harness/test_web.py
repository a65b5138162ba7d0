"""The server: who is let in, and what a browser is told."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from harness import web
from harness.errors import UsageError
from harness.web import Access, Server
from reports.pages.site import Answer

TOKEN = "a-token-of-many-letters"


class Client:
    def __init__(self, access: Access, host: str = "127.0.0.1") -> None:
        self.asked: list[tuple[str, bool]] = []
        self.hold: threading.Event | None = None
        self.server = Server(host, 0, access, self.find)
        self.thread = threading.Thread(target=self.server.serve)
        self.thread.start()

    def find(self, path: str, still: bool) -> Answer:
        self.asked.append((path, still))
        if self.hold is not None:
            self.hold.wait(20)
        if path == "/bug":
            raise ZeroDivisionError("of the page")
        return Answer(200, b"<p>page</p>", refresh_s=None if still else 7)

    def __call__(self, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        connection.putrequest(method, path, skip_host=True)
        for name, value in {"Host": "localhost:8321", **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        return connection.getresponse()

    def close(self) -> None:
        self.server.stop()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(Access.at("127.0.0.1"))
    yield client
    client.close()


@pytest.fixture
def guarded() -> Iterator[Client]:
    client = Client(Access.at("0.0.0.0", ("farm.example.org",), TOKEN))
    yield client
    client.close()


def test_a_page_comes_with_its_tag_and_what_protects_it(client: Client) -> None:
    response = client("/sweep/x?still")
    assert (response.status, response.read()) == (200, b"<p>page</p>")
    assert client.asked == [("/sweep/x", True)]
    for name, value in web._HEADERS.items():
        assert response.headers[name] == value
    assert "Python" not in response.headers["Server"]
    assert response.headers["Refresh"] is None
    again = client("/", If_None_Match=f'"other", {response.headers["ETag"]}')
    assert (again.status, again.read(), again.headers["Refresh"]) == (304, b"", "7")
    assert client("/", If_None_Match='"other"').status == 200
    head = client("/", "HEAD")
    assert (head.status, head.read(), head.headers["Content-Length"]) == (200, b"", "11")


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.5", "", "[::1"]
)
def test_a_name_that_is_not_ours_is_rebinding(client: Client, host: str) -> None:
    assert client("/", Host=host).status == 421
    assert client.asked == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9000", "127.0.0.1:8321", "[::1]:8321", "localhost."])
def test_our_names(client: Client, host: str) -> None:
    assert client("/", Host=host).status == 200


def test_only_reading_is_answered(client: Client) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert (client("/", method).status, client.asked) == (405, [])
    odd = client("/", "BREW")
    assert odd.status == 501 and odd.headers["X-Content-Type-Options"] == "nosniff"
    assert client("http://[/").status == 400


def test_without_the_token_nothing_is_shown(guarded: Client) -> None:
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {TOKEN}"}, {"Cookie": "edgemoe_farm=x"},
                    {"Cookie": "a=\x01;;="}, {"Authorization": f"Bearer {TOKEN}x"}):  # fmt: skip
        assert guarded("/", **headers).status == 401
    assert guarded("/?token=wrong").status == 401
    assert guarded.asked == []


def test_the_token_opens_by_address_cookie_and_header(guarded: Client) -> None:
    welcome = guarded(f"//evil.example/sweep?token={TOKEN}")
    assert welcome.status == 303
    assert welcome.headers["Location"].startswith("/") and not welcome.headers["Location"].startswith("//")
    cookie = welcome.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite" in cookie
    assert guarded("/", Cookie=cookie.split(";")[0]).status == 200
    assert guarded("/", Authorization=f"Bearer {TOKEN}").status == 200


def test_names_of_a_server_in_a_network() -> None:
    access = Access.at("0.0.0.0", ("Farm.Example.org",), TOKEN)
    assert all(
        access.knows(host) for host in ("farm.example.org:80", "10.0.0.5:8321", "[fe80::1]", socket.gethostname())
    )
    assert not access.knows("evil.example")
    assert Access.at("::1").token is None and Access.at("127.0.0.2").token is None
    made = Access.at("192.0.2.1").token
    assert made is not None and len(made) >= 32 and made != Access.at("192.0.2.1").token
    for weak in ("short", "x" * 16 + ";", "é" * 20):
        with pytest.raises(UsageError, match="EDGEMOE_FARM_TOKEN"):
            Access.at("127.0.0.1", token=weak)


def test_a_bug_in_a_page_ends_no_server(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(http.client.RemoteDisconnected):
        client("/bug")
    assert client("/").status == 200
    assert capsys.readouterr().err == "serve: ZeroDivisionError: 'of the page'\n"


def test_threads_are_few_and_who_waits_too_many_is_closed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MOST_WAITING", 3)
    client.hold = threading.Event()
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", client.server.port)) for _ in range(8)]
    closed = [s for s in silent[3:] if _is_closed(s)]
    assert len(closed) == 5
    assert threading.active_count() <= before + 3
    client.hold.set()
    for each in silent:
        each.close()


def test_a_client_that_dribbles_gives_its_thread_back() -> None:
    now = [0.0]
    server = Server("127.0.0.1", 0, Access.at("127.0.0.1"), lambda path, still: Answer(200, b""), clock=lambda: now[0])
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        slow = socket.create_connection(("127.0.0.1", server.port))
        slow.sendall(b"GET / HT")
        while not server._open:
            threading.Event().wait(0.005)
        now[0] = web.REQUEST_S + 1
        assert _is_closed(slow)
        slow.close()
    finally:
        server.stop()
        thread.join()
        server.server_close()


def test_a_port_that_is_taken_is_one_line(client: Client) -> None:
    with pytest.raises(UsageError, match=r"cannot listen at 127\.0\.0\.1, port \d+: .*: name another"):
        Server("127.0.0.1", client.server.port, Access.at("127.0.0.1"), client.find)
    with pytest.raises(UsageError, match=r"cannot listen at no\.such\.host\.invalid"):
        Server("no.such.host.invalid", 0, Access.at("127.0.0.1"), client.find)


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(8)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
