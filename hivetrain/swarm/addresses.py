"""From what a user wrote to the multiaddrs of peers to join through.

Accepts multiaddrs, bootstrap URLs and mixtures of them. The surprising fact: a bootstrap's answer decides whom a
machine connects to, so it is treated as hostile: bounded before it is parsed, and every address checked, because one
that p2pd cannot parse would keep the whole peer from starting.
"""

import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import requests
import urllib3
from hivemind.p2p import PeerID
from hivemind.utils.multiaddr import Multiaddr

from hivetrain.errors import UserError

logger = logging.getLogger(__name__)

INITIAL_PEERS_ENV = "HIVETRAIN_INITIAL_PEERS"
ADDRESS_PATH = "/return_dht_address"
MAX_ANSWER_BYTES = 64 * 1024
MAX_ANSWER_PEERS = 64
MAX_MADDR_CHARS = 512
REQUEST_TIMEOUT_S = 5.0
STRAGGLER_WAIT_S = 2.0
MAX_BACKOFF_S = 5.0
HOST_PROTOCOLS = {"ip4", "ip6", "dns", "dns4", "dns6", "dnsaddr"}
KNOWN_PROTOCOLS = HOST_PROTOCOLS | {"tcp", "udp", "quic", "quic-v1", "ws", "wss", "p2p", "p2p-circuit"}


class SwarmJoinError(UserError):
    """The swarm cannot be joined; the message names every address that failed, and why."""


def resolve_initial_peers(initial_peers: Sequence[str] | str | None, *, timeout_s: float = 60.0) -> list[str]:
    """Multiaddrs of the peers to join through; an empty list means: start a new swarm.

    Bootstrap URLs are asked in parallel, again and again with growing pauses while the failure may pass (no
    connection, time-out, status 429 or 5xx), until one has answered. Addresses given directly do not depend on
    them: with at least one of those, each URL is asked once.

    Args:
        initial_peers: multiaddrs, and ``http://`` or ``https://`` URLs of bootstrap servers, as a list or separated by
            commas; None reads the same syntax from the environment variable ``HIVETRAIN_INITIAL_PEERS``.
        timeout_s: limit for all of it.

    Raises:
        SwarmJoinError: a multiaddr is malformed, or no URL gave a usable answer in time.
    """
    source = os.environ.get(INITIAL_PEERS_ENV, "") if initial_peers is None else initial_peers
    entries = list(dict.fromkeys(_split(source)))
    urls = [entry for entry in entries if entry.lower().startswith(("http://", "https://"))]
    peers = []
    for entry in entries:
        if entry not in urls:
            try:
                peers.append(parse_maddr(entry, with_peer_id=True))
            except ValueError as error:
                origin = f" (from {INITIAL_PEERS_ENV})" if initial_peers is None else ""
                raise SwarmJoinError(f"initial peer {entry[:MAX_MADDR_CHARS]!r}{origin}: {error}") from error
    if urls:
        answers, failures = _ask_bootstraps(urls, timeout_s, persist=not peers)
        reasons = "; ".join(f"{_shown(url)}: {failure.reason}" for url, failure in failures.items())
        if not answers and not peers:
            raise SwarmJoinError(f"no bootstrap server gave the swarm's address: {reasons}")
        if failures:
            logger.warning("going on without these bootstrap servers: %s", reasons)
        peers += [peer for url in urls for peer in answers.get(url, [])]
    return list(dict.fromkeys(peers))


def parse_maddr(text: str, *, with_peer_id: bool) -> str:
    """Check one multiaddr and return it in its normal form.

    Args:
        text: for example ``/ip4/192.0.2.7/tcp/31337/p2p/12D3Koo...``; untrusted.
        with_peer_id: whether it has to end in ``/p2p/`` and a peer id.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if len(text) > MAX_MADDR_CHARS:
        raise ValueError(f"longer than {MAX_MADDR_CHARS} characters")
    try:
        maddr = Multiaddr(text)
        names = [protocol.name for protocol in maddr.protocols()]
        if with_peer_id and "p2p" in names:
            PeerID.from_base58(maddr["p2p"])
    except Exception as error:  # the parser lets its codecs' exceptions through
        raise ValueError("not a multiaddr; expected something like /ip4/192.0.2.7/tcp/31337/p2p/PEER_ID") from error
    if not names or names[0] not in HOST_PROTOCOLS or not KNOWN_PROTOCOLS.issuperset(names):
        raise ValueError("not an internet address of a peer")
    if with_peer_id and names[-1] != "p2p":
        raise ValueError("the peer id is missing (/p2p/PEER_ID at the end)")
    return str(maddr)


def parse_answer(body: bytes) -> list[str]:
    """Multiaddrs in a bootstrap server's answer, ``{"initial_peers": [...]}``; unusable ones are left out.

    Raises:
        ValueError: saying why there are none.
    """
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError(f"answer larger than {MAX_ANSWER_BYTES} bytes")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("answer is not JSON") from error
    peers = answer.get("initial_peers") if isinstance(answer, dict) else None
    if not isinstance(peers, list) or not all(isinstance(peer, str) for peer in peers):
        raise ValueError('answer is not {"initial_peers": [multiaddr, ...]}')
    if not 0 < len(peers) <= MAX_ANSWER_PEERS:
        raise ValueError(f"answer has {len(peers)} peers, not 1 to {MAX_ANSWER_PEERS}")
    usable = []
    for peer in peers:
        try:
            usable.append(parse_maddr(peer, with_peer_id=True))
        except ValueError as error:
            logger.warning("left out an address from a bootstrap server: %.80r: %s", peer, error)
    if not usable:
        raise ValueError(f"none of the {len(peers)} addresses in the answer is usable")
    return usable


@dataclass(frozen=True)
class _Failure:
    reason: str
    final: bool


def _split(source: Sequence[str] | str) -> list[str]:
    parts = [source] if isinstance(source, str) else source
    return [entry.strip() for part in parts for entry in part.split(",") if entry.strip()]


def _ask_bootstraps(
    urls: Sequence[str], timeout_s: float, *, persist: bool
) -> tuple[dict[str, list[str]], dict[str, _Failure]]:
    """Ask all URLs in rounds until one has answered, all have failed for good, or time is up."""
    deadline = time.monotonic() + timeout_s
    answers: dict[str, list[str]] = {}
    failures: dict[str, _Failure] = {}
    pending: set[str] = set()
    outbox: queue.SimpleQueue[tuple[str, list[str] | _Failure]] = queue.SimpleQueue()
    backoff_s = 0.5
    while True:
        for url in urls:
            if url not in pending and not (url in failures and failures[url].final):
                pending.add(url)
                # Not a pool: requests has no total time limit, and a pool would wait at exit for one that drips.
                threading.Thread(target=lambda url=url: outbox.put((url, _ask(url))), daemon=True).start()
        round_end = min(deadline, time.monotonic() + REQUEST_TIMEOUT_S)
        while pending and (left_s := round_end - time.monotonic()) > 0:
            try:
                url, outcome = outbox.get(timeout=left_s)
            except queue.Empty:
                break
            pending.discard(url)
            if isinstance(outcome, _Failure):
                failures[url] = outcome
            else:
                answers[url] = outcome
                failures.pop(url, None)
                round_end = min(round_end, time.monotonic() + STRAGGLER_WAIT_S)
        for url in pending:
            failures[url] = _Failure("no complete answer in time", final=False)
        pause_s = backoff_s * random.uniform(0.5, 1.0)
        backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
        hopeless = all(url in failures and failures[url].final for url in urls)
        if answers or hopeless or not persist or time.monotonic() + pause_s >= deadline:
            return answers, failures
        for url, failure in failures.items():
            logger.warning("bootstrap server %s: %s; asking again", _shown(url), failure.reason)
        time.sleep(pause_s)


def _ask(url: str) -> list[str] | _Failure:
    """One request. Its memory is bounded by what is read here, its time only by whoever waits for it."""
    address = url.rstrip("/").removesuffix(ADDRESS_PATH) + ADDRESS_PATH
    try:
        with requests.get(
            address,
            headers={"Accept-Encoding": "identity"},
            timeout=REQUEST_TIMEOUT_S,
            stream=True,
            allow_redirects=False,
        ) as response:
            if response.status_code != requests.codes.ok:
                passing = response.status_code == requests.codes.too_many or response.status_code >= 500
                return _Failure(f"HTTP status {response.status_code}", final=not passing)
            return parse_answer(response.raw.read(MAX_ANSWER_BYTES + 1, decode_content=False))
    except requests.Timeout:
        return _Failure(f"no answer within {REQUEST_TIMEOUT_S:g} s", final=False)
    except (requests.ConnectionError, urllib3.exceptions.HTTPError, OSError) as error:
        invalid = isinstance(error, ValueError)  # how requests marks a malformed URL
        return _Failure(_root_cause(error), final=invalid)
    except ValueError as error:
        return _Failure(str(error), final=True)
    except Exception as error:  # whatever else a hostile server can make the HTTP stack raise ends here
        logger.debug("unexpected failure of %s", _shown(url), exc_info=True)
        return _Failure(f"{type(error).__name__}", final=True)


def _root_cause(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _shown(url: str) -> str:
    """The URL without user name and password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "malformed URL"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
