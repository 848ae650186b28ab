"""An outside oracle: what some twenty public test suites expect of addresses and networks.

The corpora stay outside the project; `IPGUARD_CORPORA` names their folder. Where ipguard differs
from what all others agree on, it is stricter, and each class of that has a name here.
"""

import ipaddress
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipguard import ClientAddress
from ipguard.addresses import AddressRange, AddressSet, login_address, parse_address
from ipguard.errors import AddressError

Row = dict[str, Any]

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "corpora"
NAMES = ("parse_address", "parse_network", "match", "client_ip")


def folder() -> Path:
    """The corpora's folder; in CI they may not go missing unnoticed."""
    named = os.environ.get("IPGUARD_CORPORA")
    in_ci = os.environ.get("CI") == "true"
    if not named:
        if in_ci and BESIDE.is_dir():
            pytest.fail("the corpora lie beside the checkout, but IPGUARD_CORPORA is not set")
        pytest.skip("IPGUARD_CORPORA names no folder with the corpora")
    missing = [name for name in NAMES if not (Path(named) / f"{name}.jsonl").is_file()]
    if missing:
        (pytest.fail if in_ci else pytest.skip)(f"IPGUARD_CORPORA lacks {', '.join(missing)}")
    return Path(named)


def rows(name: str) -> list[Row]:
    text = (folder() / f"{name}.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.split("\n") if line]
    assert found
    return found


def attempt(read: Callable[[str], AddressRange], text: str) -> AddressRange | AddressError:
    try:
        return read(text)
    except AddressError as error:
        return error


def classified(found: list[tuple[str, Row]], classes: dict[str, str]) -> None:
    """Each difference belongs to a named class, and no class is a dead excuse."""
    counts = Counter(kind for kind, _ in found)
    unnamed = [row for kind, row in found if kind not in classes]
    assert not unnamed, unnamed
    assert all(counts[kind] >= 1 for kind in classes), counts


def standard_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The network in the standard library's terms, host bits cleared."""
    return ipaddress.ip_network(text, strict=False)


def is_mapped(text: str) -> bool:
    """Whether a canonical address or network lies within the IPv4-mapped block."""
    network = ipaddress.ip_network(text)
    return network.version == 6 and network.subnet_of(ipaddress.ip_network("::ffff:0:0/96"))  # type: ignore[arg-type]


def unmapped(text: str) -> str:
    """The IPv4 network that an IPv4-mapped one stands for; others unchanged."""
    if not is_mapped(text):
        return text
    network = ipaddress.ip_network(text)
    value = int(network.network_address) & 0xFFFFFFFF
    return str(ipaddress.IPv4Network((value, network.prefixlen - 96)))


# ---- one address --------------------------------------------------------------------------------

ACCEPTED_ADDRESSES = {
    "dotted-quad-in-v6": "RFC 4291 2.2 has this form; only PostgreSQL and one suite refuse it",
}


def test_addresses_that_all_agree_on():
    """Undisputed addresses: the same are valid, with the same value and the same text."""
    mapped = 0
    for row in rows("parse_address"):
        if row.get("disputed"):
            continue
        text = row["input"]
        found, client = login_address(text), attempt(parse_address, text)
        assert (found is not None) == row["valid"], row
        assert isinstance(client, AddressRange) == row["valid"], row
        if found is None or not isinstance(client, AddressRange):
            continue
        assert (client.version, client.first, client.last) == (*found, found[1])
        if is_mapped(row["canonical"]):
            mapped += 1
            assert client.packed[0] == bytes.fromhex(row["packed"])[-4:], row
            assert str(client) == unmapped(row["canonical"]).removesuffix("/32"), row
        else:
            assert client.packed[0] == bytes.fromhex(row["packed"]), row
            assert str(client) == row["canonical"], row
    assert mapped >= 1


def test_disputed_addresses():
    """Disputed addresses are refused, or accepted for a reason that is named."""
    accepted = []
    for row in rows("parse_address"):
        if row.get("disputed") and login_address(row["input"]) is not None:
            assert row["valid"], row
            (why,) = row["why"]
            accepted.append((why, row))
            assert "." in row["input"], row
            assert row["input"].count(":") >= 2, row
    classified(accepted, ACCEPTED_ADDRESSES)


# ---- networks -----------------------------------------------------------------------------------

MAPPED_PREFIX = "the prefix length of an IPv4-mapped network is 96 or more"
STRICTER_NETWORKS = {
    "host bits": "the network that was meant is not certain; a hint names it",
    "multicast": "no login comes from there",
    "unspecified": "no login comes from there",
    "broadcast": "no login comes from there",
}
ACCEPTED_NETWORKS = {
    "no-prefix-length": "one address is a restriction too; some suites want a network's prefix",
}


def stricter(text: str, error: AddressError) -> str:
    """Name the class for which a network that others accept is refused, by its own evidence."""
    network = standard_network(text)
    head = ipaddress.ip_address(text.partition("/")[0])
    if head != network.network_address:
        assert error.reason in ("it has host bits set", MAPPED_PREFIX)
        return "host bits"
    network = standard_network(unmapped(str(network)))
    if network.is_multicast:
        assert error.reason.startswith("it is multicast")
        return "multicast"
    if network.num_addresses == 1 and network.network_address.is_unspecified:
        assert error.reason.startswith("it is the unspecified address")
        return "unspecified"
    if network == ipaddress.ip_network("255.255.255.255"):
        assert error.reason.startswith("it is the broadcast address")
        return "broadcast"
    return "none"


def test_networks_that_all_agree_on():
    """Undisputed networks: the same are valid, but for a stricter policy, with the same text."""
    refused = []
    mapped = 0
    for row in rows("parse_network"):
        if row.get("disputed"):
            continue
        found = attempt(AddressRange.parse, row["input"])
        if isinstance(found, AddressError):
            if row["valid"]:
                kind = stricter(row["input"], found)
                assert (kind == "host bits") == row["host_bits_set"], row
                refused.append((kind, row))
            continue
        assert row["valid"], row
        canonical = unmapped(row["canonical"])
        mapped += is_mapped(row["canonical"])
        single = "/32" if found.version == 4 else "/128"
        assert str(found) == canonical.removesuffix(single), row
        network = standard_network(canonical)
        assert found.first == int(network.network_address)
        assert found.last == int(network.broadcast_address)
    classified(refused, STRICTER_NETWORKS)
    assert mapped >= 1


def test_hints_for_host_bits():
    """Where host bits are set, the hint is the network that the others understand."""
    hinted = 0
    for row in rows("parse_network"):
        if row["valid"] and row.get("host_bits_set") and not row.get("disputed"):
            error = attempt(AddressRange.parse, row["input"])
            assert isinstance(error, AddressError)
            canonical = unmapped(row["canonical"])
            if error.hint is not None:
                hinted += 1
                assert error.hint == canonical.removesuffix("/32"), row
            else:
                network = ipaddress.ip_network(canonical)
                assert network.is_multicast or error.reason == MAPPED_PREFIX, row
    assert hinted >= 1


def test_disputed_networks():
    """Disputed networks are refused, or accepted for a reason that is named."""
    accepted = []
    for row in rows("parse_network"):
        if row.get("disputed"):
            found = attempt(AddressRange.parse, row["input"])
            if isinstance(found, AddressRange):
                assert row["valid"], row
                assert row["bare_address"], row
                assert found.size == 1
                (why,) = row["why"]
                accepted.append((why, row))
    classified(accepted, ACCEPTED_NETWORKS)


# ---- what is inside what -------------------------------------------------------------------------

STRICTER_MATCHES = {
    "host bits": "the restriction is refused; the network of the hint matches as expected",
    "mapped prefix": "an IPv4-mapped network with a prefix below 96 is refused: it is not IPv4",
    "unfit": "the restriction is refused: multicast, unspecified or broadcast",
    "zone in the restriction": "a zone has a meaning on one machine only",
    "zone in the address": "a login's address has no zone",
    "mapped": "an IPv4-mapped address is IPv4, and so in no IPv6 network",
}


def stricter_match(networks: list[str], address: str, contains: bool) -> str:
    """Name the class for which an address that others find inside is not."""
    errors = {text: attempt(AddressRange.parse, text) for text in networks}
    refused = {text: error for text, error in errors.items() if isinstance(error, AddressError)}
    if not refused:
        if "%" in address and login_address(address.partition("%")[0]) is not None:
            return "zone in the address"
        if is_mapped(address) and all(":" in text for text in networks):
            return "mapped"
        return "none"
    ((text, error),) = refused.items()
    if "%" in text:
        assert error.reason.startswith("a zone")
        return "zone in the restriction"
    kind = stricter(text, error)
    if kind != "host bits":
        return "unfit" if kind in STRICTER_NETWORKS else "none"
    if error.reason == MAPPED_PREFIX:
        return "mapped prefix"
    assert error.hint is not None
    assert (address in AddressRange.parse(error.hint)) == contains
    return "host bits"


def test_what_all_agree_is_inside():
    """Undisputed matches: the same addresses are inside, but for a stricter policy."""
    refused = []
    for row in rows("match"):
        if row.get("disputed"):
            continue
        networks = row["network"] if isinstance(row["network"], list) else [row["network"]]
        found = [attempt(AddressRange.parse, text) for text in networks]
        inside = row["ip"] in AddressSet(r for r in found if isinstance(r, AddressRange))
        if inside != row["contains"]:
            assert not inside, row
            refused.append((stricter_match(networks, row["ip"], row["contains"]), row))
    classified(refused, STRICTER_MATCHES)


def test_disputed_matches():
    """Disputed matches match nothing here: their networks are refused."""
    disputed = [row for row in rows("match") if row.get("disputed")]
    assert disputed
    for row in disputed:
        assert isinstance(attempt(AddressRange.parse, row["network"]), AddressError), row


# ---- behind proxies -----------------------------------------------------------------------------


def test_headers_behind_trusted_proxies():
    """The header that the rows read gives the same client, by a count and by ranges.

    Other strategies trust private addresses or the leftmost entry, which ipguard does not offer.
    """
    held, corrected = 0, []
    for row in rows("client_ip"):
        if row["strategy"] == "rightmost_trusted_count":
            how = {"hops": row["trusted_count"]}
        elif row["strategy"] == "rightmost_trusted_range":
            # The row without ranges has those of Cloudflare.
            written = row.get("trusted_ranges", ["2400:cb00::/32"])
            read = {text: attempt(AddressRange.parse, text) for text in written}
            if errors := [each for each in read.values() if isinstance(each, AddressError)]:
                with pytest.raises(AddressError, match="host bits"):
                    ClientAddress(header=row["header"], proxies=written)
                corrected += [error.hint for error in errors]
            hints = [r.hint if isinstance(r, AddressError) else str(r) for r in read.values()]
            how = {"proxies": hints}
        else:
            assert row["strategy"].startswith(("rightmost_non_private", "leftmost_non_private"))
            continue
        client = ClientAddress(header=row["header"], unix_socket=True, **how)
        assert client.of(None, row["headers"].get(row["header"], [])) == row["want"], row
        held += 1
    assert held == 14
    assert corrected == ["4.4.4.0/28", "64:ff9b::bc00:0/112"]


# ---- the corpora are really read -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "ci", "beside", "outcome"),
    [
        (None, None, True, pytest.skip.Exception),
        (None, "true", True, pytest.fail.Exception),
        (None, "true", False, pytest.skip.Exception),
        ("empty", None, True, pytest.skip.Exception),
        ("empty", "true", True, pytest.fail.Exception),
        ("empty", "true", False, pytest.fail.Exception),
    ],
)
def test_corpora_do_not_go_missing_in_ci(variable, ci, beside, outcome, monkeypatch, tmp_path):
    """Without the corpora these tests are skipped, and fail in CI where the corpora should be."""
    monkeypatch.delenv("IPGUARD_CORPORA", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(f"{__name__}.BESIDE", tmp_path if beside else tmp_path / "nothing")
    if variable:
        monkeypatch.setenv("IPGUARD_CORPORA", str(tmp_path))
    if ci:
        monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome):
        folder()
