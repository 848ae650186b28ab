"""The set-ups of docs/behind-a-proxy.md, with its proxies and servers, against forged headers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trustme

from tests.logins import ROOT
from tests.postgres import free_port, until
from tests.requirements import missing

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "behind-a-proxy.md").read_text()
OFFICE, ELSEWHERE = "127.0.0.9", "127.0.0.8"  # Linux has all of 127.0.0.0/8
Headers = list[tuple[str, str]]
LANGUAGES = {"nginx": "nginx", "haproxy": "text"}  # of the page's blocks

FORGED: dict[str, Headers] = {
    "none": [],
    "one": [("X-Forwarded-For", OFFICE)],
    "repeated": [("X-Forwarded-For", OFFICE), ("X-Forwarded-For", f"{OFFICE}, {OFFICE}")],
    "as if a proxy had written it": [("X-Forwarded-For", f"{OFFICE}, 127.0.0.1")],
    "with a port": [("X-Forwarded-For", f"{OFFICE}:443,127.0.0.1:443,unix:")],
    "long": [("X-Forwarded-For", ", ".join([OFFICE] * 300))],
    "empty": [("X-Forwarded-For", "")],
    "only commas": [("X-Forwarded-For", f"{OFFICE},,")],
    "an open quote": [("X-Forwarded-For", f'{OFFICE}, "'), ("Forwarded", f'for={OFFICE}, for="')],
    "underscores": [("X_Forwarded_For", OFFICE), ("X_REAL-IP", OFFICE), ("X_Real_IP", OFFICE)],
    "another header": [
        ("X-Real-IP", OFFICE),
        ("Forwarded", f"for={OFFICE}"),
        ("Client-IP", OFFICE),
    ],
    "the peer": [("Remote-Addr", OFFICE), ("Remote_Addr", OFFICE)],
    "to be removed on the way": [
        ("Connection", "close, X-Forwarded-For, X-Real-IP"),
        ("X-Forwarded-For", OFFICE),
    ],
    "the scheme": [("X-Forwarded-Proto", "http"), ("X-Forwarded-Proto", "ftp")],
}


def section(heading: str, language: str) -> list[str]:
    """Return the code blocks of a section of the page."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@attrs.frozen
class Setup:
    """The sections of the page that make a set-up, and what the page says about it.

    Attributes:
        front: The section of the proxy, and the number of its block.
        server: The section of the server.
        inner: Whether the section's nginx is between the proxy and the server.
        django: Whether the server runs the Django application.
        others: Further ways to construct `ClientAddress` that fit.
    """

    front: tuple[str, int]
    server: str
    inner: bool = False
    django: bool = False
    others: tuple[str, ...] = ()

    @property
    def unix(self) -> bool:
        return self.server.endswith("Unix socket")


def setups() -> dict[str, Setup]:
    servers = {
        f"{server}-{short}": f"{server} over {transport}"
        for server in ("gunicorn", "uvicorn")
        for short, transport in (("tcp", "TCP"), ("unix", "a Unix socket"))
    }
    found = {}
    for name, server in servers.items():
        trust = "unix_socket=True" if name.endswith("unix") else "unix_socket=False"
        counted = f"ipguard.ClientAddress(hops=1, {trust})"
        proxies = "[]" if name.endswith("unix") else "['127.0.0.1']"
        single = f"ipguard.ClientAddress(header='X-Real-IP', proxies={proxies}, {trust})"
        found[f"nginx-{name}"] = Setup(("nginx", 0), server, others=(counted, single))
        found[f"nginx-{name}-django"] = Setup(("nginx", 0), server, django=True, others=(counted,))
        found[f"haproxy-{name}"] = Setup(("haproxy", 0), server, others=(counted,))
    with_address = "haproxy with the PROXY protocol"
    found["haproxy-PROXY-gunicorn"] = Setup((with_address, 0), with_address)
    found["haproxy-PROXY-nginx-gunicorn-tcp"] = Setup(
        (with_address, 1),
        servers["gunicorn-tcp"],
        inner=True,
        others=("ipguard.ClientAddress(hops=1)",),
    )
    return found


SETUPS = setups()


@attrs.frozen
class Running:
    """A running set-up: the ports of the proxy, of the inner nginx and of the server."""

    setup: Setup
    web: int
    inner: int
    server: int

    def ask(self, source: str, headers: Headers, *, direct: bool = False) -> dict[str, Any]:
        """Send a request from an address, to the proxy or directly to the server."""
        connection: http.client.HTTPConnection
        if direct:
            connection = http.client.HTTPConnection(
                "127.0.0.1", self.server, timeout=30, source_address=(source, 0)
            )
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.web, timeout=30, source_address=(source, 0), context=insecure()
            )
        with contextlib.closing(connection):
            connection.putrequest("GET", "/")
            for name, value in headers:
                connection.putheader(name, value)
            connection.endheaders()
            return answer(connection.getresponse())

    def claim(self, source: str, port: int, *, tls: bool) -> dict[str, Any]:
        """Send a request that begins with the PROXY protocol's line about the office."""
        with ExitStack() as stack:
            connection = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), 30, (source, 0))
            )
            connection.sendall(f"PROXY TCP4 {OFFICE} 127.0.0.1 4711 443\r\n".encode())
            if tls:
                connection = stack.enter_context(insecure().wrap_socket(connection))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: bank.example\r\nConnection: close\r\n\r\n")
            response = stack.enter_context(http.client.HTTPResponse(connection))
            response.begin()
            return answer(response)


def insecure() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def answer(response: http.client.HTTPResponse) -> dict[str, Any]:
    if response.status != 200:
        return {"status": response.status}
    found: dict[str, Any] = json.load(response)
    return found


def program(name: str, package: str) -> str:
    path = "/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin"
    return shutil.which(name, path=path) or missing(name, package)


@contextmanager
def process(command: list[str], **env: str) -> Iterator[None]:
    started = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | env
    )
    try:
        yield
    finally:
        started.terminate()
        started.wait(30)


def nginx(block: str, folder: Path) -> list[str]:
    """Write the configuration around the page's block; return the command."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""  # to enter the folder
    main = f"daemon off;\npid {folder}/nginx.pid;\nerror_log stderr;\n{user}events {{}}\n"
    file = folder / "nginx.conf"
    file.write_text(f"{main}http {{\naccess_log off;\n{temporary}{block}}}\n")
    return [program("nginx", "nginx-light"), "-p", str(folder), "-c", str(file), "-e", "stderr"]


def haproxy(block: str, folder: Path) -> list[str]:
    file = folder / "haproxy.cfg"
    limits = "".join(f"    timeout {each} 30s\n" for each in ("connect", "client", "server"))
    file.write_text(f"defaults\n{limits}{block}")
    return [program("haproxy", "haproxy"), "-db", "-q", "-f", str(file)]


@contextmanager
def running(setup: Setup, changes: dict[str, str] | None = None) -> Iterator[Running]:
    """Start the proxies and the server as the page says, with the addresses of this machine."""
    web, inner, port = free_port(), free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="ipguard-"))  # short: the path of a socket is limited

    def local(text: str) -> str:
        if setup.unix:
            text = re.sub(r"server .*# or, on the same host: ", "", text)
        for old, new in {
            "10.0.0.9:8000": f"127.0.0.1:{port}",
            "10.0.0.9 --port 8000": f"127.0.0.1 --port {port}",
            "/run/login": str(folder),
            "/etc/ssl": str(folder),
            "listen 443": f"listen 127.0.0.1:{web}",
            "bind :443": f"bind 127.0.0.1:{web}",
            "listen 8443": f"listen 127.0.0.1:{inner}",
            "10.0.0.5:8443": f"127.0.0.1:{inner}",
            "10.0.0.5": "127.0.0.1",
            "10.0.0.4": "127.0.0.1",
            "login:": f"tests.proxied_{'django' if setup.django else 'app'}:",
            **(changes or {}),
        }.items():
            text = text.replace(old, new)
        assert "10.0.0." not in text, text
        return text

    heading, number = setup.front
    kind = heading.partition(" ")[0]
    front = local(section(heading, LANGUAGES[kind])[number])
    commands = [nginx(front, folder) if kind == "nginx" else haproxy(front, folder)]
    if setup.inner:
        commands.append(nginx(local(section(heading, "nginx")[0]), folder))
    (line,) = section(setup.server, "sh")
    tool, *options = shlex.split(local(line))
    extra = ["--no-control-socket"] if tool == "gunicorn" else []
    code = ["import ipguard", *section(setup.server, "python")]
    code += section("Django", "python") if setup.django else []
    env = {
        "IPGUARD_TEST_SETUP": local("\n".join(code)),
        "IPGUARD_TEST_OTHERS": json.dumps(setup.others),
    }
    authority = trustme.CA()
    certificate = authority.issue_cert("bank.example")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "bank.pem")
    commands.append([sys.executable, "-m", tool, *extra, *options])
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for command in commands:
            stack.enter_context(process(command, **env))
        found = Running(setup, web, inner, port)

        def answers() -> bool:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return "address" in found.ask(OFFICE, [])
            return False

        until(answers, "the server answers through the proxy")
        yield found


@pytest.mark.parametrize("name", SETUPS)
def test_forged_headers_are_refused(name: str) -> None:
    """In each set-up of the page the client's address is found, whatever headers it sends."""
    setup = SETUPS[name]
    with running(setup) as server:
        for source, allowed in ((OFFICE, True), (ELSEWHERE, False)):
            for kind, headers in FORGED.items():
                found = server.ask(source, headers)
                assert found.get("address") == source, (kind, found)
                assert found["allowed"] is allowed, (kind, found)
                assert set(found["others"]) <= {source}, (kind, found)
                assert found["scheme"] == "https", (kind, found)
        if setup.unix:
            # gunicorn reports empty text, uvicorn None.
            assert not server.ask(OFFICE, [])["peer"]
        else:  # clients that connect to the server itself
            for kind, headers in FORGED.items():
                found = server.ask(ELSEWHERE, headers, direct=True)
                assert found.get("address") == ELSEWHERE, (kind, found)
                assert not found["allowed"], (kind, found)
        if setup.front[0].endswith("PROXY protocol"):
            port = server.inner if setup.inner else server.server
            found = server.claim(ELSEWHERE, port, tls=setup.inner)
            if setup.inner:  # nginx ignores the line, gunicorn refuses the connection
                assert found["address"] == ELSEWHERE
            else:
                assert found == {"status": 403}


def test_every_section_has_a_set_up() -> None:
    """No configuration of the page is left out."""
    used = {each.front[0] for each in SETUPS.values()} | {each.server for each in SETUPS.values()}
    configured = {
        heading
        for heading in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
        if heading != "Check it" and any(section(heading, each) for each in ("nginx", "text", "sh"))
    }
    assert configured == used
    for language, count in (("text", 3), ("nginx", 2)):
        assert sum(len(section(heading, language)) for heading in configured) == count


def test_what_the_page_warns_of() -> None:
    """uvicorn with `--forwarded-allow-ips '*'` lets every client forge an address."""
    careless = {"--no-proxy-headers": "--forwarded-allow-ips '*'"}
    with running(SETUPS["haproxy-uvicorn-unix"], careless) as server:
        assert server.ask(ELSEWHERE, FORGED["one"])["address"] == OFFICE
