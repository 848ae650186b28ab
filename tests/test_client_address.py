"""Which address of a proxy's header is the client's."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipguard import AddressError, ClientAddress, InvalidValue
from ipguard.addresses import parse_address

CLIENT, PROXY, OUTER = "203.0.113.9", "10.0.0.5", "10.0.0.6"
PROXIES = (PROXY, "10.0.0.6/31", "2001:db8:5::/64")
HEADERS = ("X-Forwarded-For", "Forwarded", "X-Real-IP")


def behind(header: str = "X-Forwarded-For", **given: object) -> ClientAddress:
    return ClientAddress(header=header, **({"proxies": PROXIES} | given))


def counted(hops: int, header: str = "X-Forwarded-For", **given: object) -> ClientAddress:
    return ClientAddress(header=header, hops=hops, **given)


# ---- X-Forwarded-For ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "values", "client"),
    [
        (PROXY, [CLIENT], CLIENT),
        (PROXY, [f"8.8.8.8, {CLIENT}"], CLIENT),
        (PROXY, ["8.8.8.8", CLIENT], CLIENT),  # the header occurs twice
        (PROXY, [f"8.8.8.8,{CLIENT} ,\t{OUTER}"], CLIENT),
        (PROXY, [CLIENT, f"{OUTER}, 2001:db8:5::1"], CLIENT),
        (PROXY, f"8.8.8.8, {CLIENT}", CLIENT),  # one text is one value
        (PROXY, [f"{CLIENT}:4711"], CLIENT),
        (PROXY, [f"{CLIENT}:_hidden"], CLIENT),
        (PROXY, ["2001:DB8::0:7"], "2001:db8::7"),
        (PROXY, ["[2001:db8::7]"], "2001:db8::7"),
        (PROXY, ["[2001:db8::7]:4711"], "2001:db8::7"),
        (PROXY, [f"::ffff:{CLIENT}"], CLIENT),
        (PROXY, [f"[::ffff:{CLIENT}]:4711"], CLIENT),
        (f"::ffff:{PROXY}", [CLIENT], CLIENT),
        (f"{PROXY}:4711", [CLIENT], CLIENT),
        (PROXY, [f"{CLIENT}, ::ffff:{OUTER}"], CLIENT),
        # the peer is not a proxy: its header is ignored
        (CLIENT, ["8.8.8.8"], CLIENT),
        (CLIENT, [PROXY], CLIENT),
        (f"::ffff:{CLIENT}", [], CLIENT),
        ("2001:DB8::1", ["garbage"], "2001:db8::1"),
        # unknown
        (PROXY, [], ""),
        (PROXY, [""], ""),
        (PROXY, [OUTER], ""),
        (PROXY, [f"{CLIENT},"], ""),
        (PROXY, [f"{CLIENT}, unknown, {OUTER}"], ""),
        (PROXY, [f"{CLIENT}, {OUTER}x"], ""),
        (PROXY, ["fe80::1%eth0"], ""),
        (PROXY, [f'"{CLIENT}"'], ""),
        (PROXY, [f"[{CLIENT}]"], ""),
        (PROXY, ["2001:db8::7]"], ""),
        (PROXY, [f"{CLIENT}:"], ""),
        (PROXY, [f"{CLIENT}:471100"], ""),
        (PROXY, [f"{CLIENT}:٨٠"], ""),
        (PROXY, [f"{CLIENT}/32"], ""),
        (PROXY, [f"{CLIENT}-{CLIENT}"], ""),
        (PROXY, ["203.0.113.009"], ""),
        (PROXY, ["0.0.0.0"], ""),
        (PROXY, ["::"], ""),
        (PROXY, ["255.255.255.255"], ""),
        (PROXY, ["ff02::1"], ""),
        (PROXY, [f"{CLIENT}\x00"], ""),
        (PROXY, [f"{CLIENT}\x0b"], ""),
        (PROXY, [f"{CLIENT}\xa0"], ""),
        (PROXY, [f"X{CLIENT}"], ""),
        (PROXY, [f'{CLIENT}, "{OUTER}, {OUTER}"'], ""),
        (PROXY, ["unix:"], ""),
        ("testclient", [CLIENT], ""),
        ("fe80::1%eth0", [CLIENT], ""),
        (b"10.0.0.5", [CLIENT], ""),
        (0, [CLIENT], ""),
    ],
)
def test_trusted_proxies(peer, values, client):
    """The search stops at the first address from the right that is not a trusted proxy."""
    assert behind().of(peer, values) == client
    assert behind("x-FORWARDED-for").of(peer, values) == client


@pytest.mark.parametrize(
    ("hops", "peer", "values", "client"),
    [
        (0, CLIENT, ["8.8.8.8"], CLIENT),
        (0, "testclient", ["8.8.8.8"], ""),
        (1, PROXY, [f"8.8.8.8, {CLIENT}"], CLIENT),
        (1, "8.8.8.8", [CLIENT], CLIENT),
        (2, PROXY, [f"8.8.8.8, {CLIENT}, {OUTER}"], CLIENT),
        (3, PROXY, [f"8.8.8.8, {CLIENT}, 192.0.2.1, {OUTER}"], CLIENT),
        (1, PROXY, [], ""),
        (2, PROXY, [CLIENT], ""),
        (2, PROXY, [f"{CLIENT}, unknown"], ""),
        (2, PROXY, [f"unknown, {CLIENT}"], ""),
        (2, PROXY, [f"unix:, {CLIENT}"], ""),
        (1, "unknown", [CLIENT], ""),
    ],
)
def test_a_number_of_proxies(hops, peer, values, client):
    """With a count, the peer is the first proxy and each proxy has written one entry."""
    assert counted(hops).of(peer, values) == client


@pytest.mark.parametrize("peer", [None, "", "unix:"])
def test_unix_sockets(peer):
    """A Unix socket is a proxy only with `unix_socket`, as the peer and in the header."""
    for client in (behind(), counted(1), counted(0), counted(0, unix_socket=True)):
        assert client.of(peer, [CLIENT]) == ""
    for client in (behind(unix_socket=True), counted(1, unix_socket=True)):
        assert client.of(peer, [f"8.8.8.8, {CLIENT}"]) == CLIENT
        assert client.of(peer, []) == ""
    for client in (behind(unix_socket=True), counted(2, unix_socket=True)):
        assert client.of(peer, [f"8.8.8.8, {CLIENT}, unix:"]) == CLIENT
        assert client.of(peer, [f"8.8.8.8, {CLIENT}, "]) == ""
    assert counted(2).of(PROXY, [f"{CLIENT}, unix:"]) == ""
    assert counted(1, unix_socket=True).of(peer, ["unix:"]) == ""


def test_no_proxy_at_all():
    """Without any proxy the peer is the client, and the header is ignored."""
    assert ClientAddress(proxies=()).of(CLIENT, ["8.8.8.8"]) == CLIENT
    assert ClientAddress(proxies=(), unix_socket=True).of("", [f"8.8.8.8, {CLIENT}"]) == CLIENT


# ---- Forwarded ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "client"),
    [
        ([f"for={CLIENT}"], CLIENT),
        ([f"For={CLIENT}; proto=https ;by=10.0.0.5"], CLIENT),
        ([f'for="{CLIENT}:4711"'], CLIENT),
        ([f"for=8.8.8.8, for={CLIENT}"], CLIENT),
        (["for=8.8.8.8", f"for={CLIENT}"], CLIENT),
        ([f'for={CLIENT}, for="[2001:db8:5::1]:47"'], CLIENT),
        (['for="[2001:db8::7]"'], "2001:db8::7"),
        (['for="2001:db8::7"'], "2001:db8::7"),
        (["for=[2001:db8::7]"], "2001:db8::7"),
        (['for="[::ffff:203.0.113.9]:_p1"'], CLIENT),
        ([f'host="a,for=8.8.8.8;b";for={CLIENT}'], CLIENT),
        ([f'for={CLIENT};host="a\\",for=8.8.8.8,\\"b"'], CLIENT),
        ([f'for={CLIENT};host="a\\\\", for={OUTER}'], CLIENT),
        ([f'for=", for={CLIENT}'], CLIENT),  # a quote that the client left open
        ([f'for="\\", for={CLIENT}'], CLIENT),
        ([f'for=8.8.8.8;x="y, for={CLIENT}, for={OUTER}'], CLIENT),
        (["\\" * 4000 + f", for={CLIENT}"], CLIENT),
        ([f'host="a;for=8.8.8.8";for={CLIENT}'], CLIENT),
        (["for=unknown"], ""),
        ([f"for={CLIENT};for=8=8"], ""),
        ([f"\x0bfor={CLIENT}"], ""),
        ([f"Xfor={CLIENT}"], ""),
        (["for=_hidden"], ""),
        (['for="_hidden:_port"'], ""),
        ([f"for={CLIENT}, for=unknown"], ""),
        ([f"for={CLIENT}, for=_hidden, for={OUTER}"], ""),
        ([f"for={CLIENT};for=8.8.8.8"], ""),
        ([f"for = {CLIENT}"], ""),
        (["proto=https"], ""),
        (["for="], ""),
        (['for=""'], ""),
        (['for="'], ""),
        ([f'for="{CLIENT}'], ""),
        ([f'for="\\{CLIENT}"'], ""),
        ([CLIENT], ""),
        ([""], ""),
        ([], ""),
    ],
)
def test_forwarded(values, client):
    """RFC 7239: several elements, parameters, quoted text, brackets, ports, hidden names."""
    assert behind("forwarded").of(PROXY, values) == client


# ---- headers with one value ---------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"proxies": None, "hops": 1}, {"proxies": None, "hops": 3}])
def test_one_value(given):
    """Of a header with a single value the last one counts; none to the left of it is read."""
    client = behind("X-Real-IP", **given)
    assert client.of(PROXY, [CLIENT]) == CLIENT
    assert client.of(PROXY, [f"[{CLIENT}]"]) == ""
    assert client.of(PROXY, ["8.8.8.8", f"8.8.8.8, {CLIENT}:80"]) == CLIENT
    assert client.of(PROXY, []) == ""


def test_one_value_that_is_a_proxy():
    """A single value that names a trusted proxy ends the search."""
    assert behind("X-Real-IP").of(PROXY, ["8.8.8.8", OUTER]) == ""


# ---- whatever is on the left --------------------------------------------------------------------

texts = st.text(st.characters(max_codepoint=0xFF)) | st.text(
    '",;\\= :[].0123456789abcdefor', max_size=30
)


@given(junk=st.lists(texts, max_size=3), glue=texts, header=st.sampled_from(HEADERS))
def test_nothing_that_a_client_appends_on_the_left_matters(junk, glue, header):
    """The client's text before the entries of the proxies changes no answer and never raises."""
    start, client = ("for=", behind(header)) if header == "Forwarded" else ("", behind(header))
    proxies = [CLIENT] if header == "X-Real-IP" else [CLIENT, OUTER]
    written = ", ".join(f"{start}{entry}" for entry in proxies)
    for told in ([*junk, written], [*junk, f"{glue}, {written}"], [*junk, glue, written]):
        assert client.of(PROXY, told) == CLIENT
        assert counted(len(proxies), header).of(PROXY, told) == CLIENT


@given(
    peer=st.none() | texts | st.sampled_from([PROXY, CLIENT, "unix:"]),
    values=st.lists(texts | st.from_regex(r'(for=)?"?[\[0-9.:\]]{1,20}"?', fullmatch=True)),
    header=st.sampled_from(HEADERS),
    hops=st.integers(0, 3) | st.none(),
)
def test_no_text_raises(peer, values, header, hops):
    """The answer is a canonical address or empty, and `explain` agrees with it."""
    which = {"hops": hops} if hops is not None else {"proxies": PROXIES}
    client = ClientAddress(header=header, unix_socket=True, **which)
    found = client.of(peer, values)
    assert found == "" or found == str(parse_address(found))
    *before, last = client.explain(peer, values)
    assert all(hop.trusted for hop in before)
    assert found == ("" if last.trusted else last.address)


@pytest.mark.parametrize("header", HEADERS[:2])
def test_enormous_headers(header):
    """Only the last 4,096 characters are read, and no entry that is cut off there."""
    start = "for=" if header == "Forwarded" else ""
    client, entry = behind(header), f"{start}{PROXY}"
    assert client.of(PROXY, [f"{'x' * 5_000_000}, {start}{CLIENT}"]) == CLIENT
    assert client.of(PROXY, ["x" * 5_000_000]) == ""
    assert client.of(PROXY, ['"' * 5_000_000]) == ""
    assert client.of(PROXY, ["\\" * 5_000_000]) == ""
    assert client.of(PROXY, [f"{start}{CLIENT}, " + ",".join([entry] * 1_000_000)]) == ""
    assert client.of(PROXY, [f"{start}{CLIENT}", *[entry] * 1_000_000]) == ""
    assert len(client.explain(PROXY, ",".join([entry] * 1_000_000))) < 600
    whole = f"{start}{CLIENT}"
    fill = ",".join([entry] * 200)
    trimmed = f"{whole},{fill},".ljust(4096 - len(entry)) + entry
    assert len(trimmed) == 4096
    assert client.of(PROXY, [trimmed]) == CLIENT
    assert client.of(PROXY, [f" {trimmed}"]) == ""  # one more: the leftmost entry may be cut
    # Each value but the last costs one more, for the comma between them.
    for length, found in ((4096 - len(whole) - 1, CLIENT), (4096 - len(whole), ""), (4095, "")):
        last = f"{fill},".ljust(length - len(entry)) + entry
        assert len(last) == length
        assert client.of(PROXY, [whole, last]) == found
        assert client.of(PROXY, [f"{start}8.8.8.8, {whole}", last]) == ""


# ---- requests -----------------------------------------------------------------------------------


def test_asgi():
    """The scope's client and headers; servers repeat a header as several pairs."""
    scope = {
        "client": (PROXY, 4711),
        "headers": [
            (b"host", b"bank.example"),
            (b"x-forwarded-for", b"8.8.8.8"),
            (b"X-Forwarded-For", CLIENT.encode()),
            (b"x_forwarded_for", b"8.8.4.4"),
        ],
    }
    assert behind().asgi(scope) == CLIENT
    assert behind("X-Real-IP").asgi(scope) == ""
    assert behind().asgi(scope | {"client": None}) == ""
    assert behind(unix_socket=True).asgi(scope | {"client": None}) == CLIENT
    assert behind().asgi({"client": [CLIENT, 4711]}) == CLIENT
    assert behind().asgi(scope | {"headers": [(b"x-forwarded-for", b"\xff")]}) == ""
    assert behind().asgi({"headers": []}) == ""


def test_wsgi():
    """REMOTE_ADDR and the header; servers join a repeated header by commas."""
    environ = {"REMOTE_ADDR": PROXY, "HTTP_X_FORWARDED_FOR": f"8.8.8.8,{CLIENT}"}
    assert behind().wsgi(environ) == CLIENT
    assert behind("X-Real-IP").wsgi(environ | {"HTTP_X_REAL_IP": "198.51.100.7"}) == "198.51.100.7"
    assert behind("X-Real-IP").wsgi(environ) == ""
    assert behind().wsgi(environ | {"REMOTE_ADDR": ""}) == ""
    assert behind(unix_socket=True).wsgi(environ | {"REMOTE_ADDR": ""}) == CLIENT
    assert behind(unix_socket=True).wsgi({"HTTP_X_FORWARDED_FOR": CLIENT}) == CLIENT
    assert behind().wsgi({"REMOTE_ADDR": CLIENT}) == CLIENT


# ---- the explanation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "peer", "values", "steps"),
    [
        (
            behind(),
            PROXY,
            [f"8.8.8.8, {CLIENT}:80, {OUTER}"],
            [
                (PROXY, PROXY, True, "a trusted proxy"),
                (OUTER, OUTER, True, "a trusted proxy"),
                (f"{CLIENT}:80", CLIENT, False, "the client, as it is not a trusted proxy"),
            ],
        ),
        (
            counted(2, unix_socket=True),
            None,
            [f"{CLIENT}, {OUTER}"],
            [
                ("unix:", "", True, "a trusted Unix socket"),
                (OUTER, OUTER, True, "proxy 2 of 2"),
                (CLIENT, CLIENT, False, "the client, by the count"),
            ],
        ),
        (
            behind(),
            "",
            [CLIENT],
            [("unix:", "", False, "an untrusted Unix socket")],
        ),
        (behind(), b"x", [CLIENT], [("bytes", "", False, "not an address")]),
        (
            behind("Forwarded"),
            PROXY,
            ["for=unknown"],
            [(PROXY, PROXY, True, "a trusted proxy"), ("unknown", "", False, "not an address")],
        ),
        (
            behind("Forwarded"),
            PROXY,
            ["proto=https"],
            [(PROXY, PROXY, True, "a trusted proxy"), ("", "", False, "not an address")],
        ),
    ],
)
def test_explanations(client, peer, values, steps):
    """Each step says what it read, whether it was trusted, and why."""
    found = client.explain(peer, values)
    assert [(hop.text, hop.address, hop.trusted, hop.reason) for hop in found] == steps


# ---- construction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "proxies"),
        ({"proxies": [PROXY], "hops": 1}, "proxies"),
        ({"proxies": PROXY}, "proxies"),
        ({"hops": -1}, "hops"),
        ({"hops": 51}, "hops"),
        ({"hops": True}, "hops"),
        ({"hops": "1"}, "hops"),
        ({"hops": 1, "header": ""}, "header"),
        ({"hops": 1, "header": "X-Forwarded-For:"}, "header"),
        ({"hops": 1, "header": "X_Forwarded_For"}, "header"),
        ({"hops": 1, "header": "X-Forwarded-For\n"}, "header"),
        ({"hops": 1, "header": b"X-Forwarded-For"}, "header"),
        ({"hops": 1, "unix_socket": "no"}, "unix_socket"),
    ],
)
def test_arguments_that_make_no_sense(arguments, name):
    """Construction names the argument that makes no sense."""
    with pytest.raises(InvalidValue) as caught:
        ClientAddress(**arguments)
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("proxies", "reason", "hint"),
    [
        (["10.0.0.5/8"], "it has host bits set", "10.0.0.0/8"),
        (["10.0.0.0/255.0.0.0"], "masks are not accepted; use a prefix length", "10.0.0.0/8"),
        (["fe80::1%eth0"], "a zone has a meaning on one machine only", "fe80::1"),
        (["0.0.0.0/0"], "every client would be a trusted proxy", None),
        (["::/0"], "every client would be a trusted proxy", None),
        (["0.0.0.0-255.255.255.255"], "every client would be a trusted proxy", None),
        (["128.0.0.0/1", PROXY, "0.0.0.0/1"], "every client would be a trusted proxy", None),
        (["::/1", "8000::/1"], "every client would be a trusted proxy", None),
        (["nginx"], "it is not an address, a network or a first-last range", None),
        ([7], "it is not text", None),
    ],
)
def test_proxies_that_are_refused(proxies, reason, hint):
    """Proxies are written as a restriction is, and may not be all addresses."""
    with pytest.raises(AddressError) as caught:
        ClientAddress(proxies=proxies)
    assert (caught.value.reason, caught.value.hint) == (reason, hint)
    assert reason != "every client would be a trusted proxy" or "/0" in caught.value.text


def test_a_value():
    """It is comparable and can be pickled; the limits of `hops` are accepted."""
    one = behind(unix_socket=True)
    assert one == behind(unix_socket=True) != behind()
    assert pickle.loads(pickle.dumps(one)).of("", [CLIENT]) == CLIENT
    assert counted(50).hops == 50
    assert counted(0).hops == 0
