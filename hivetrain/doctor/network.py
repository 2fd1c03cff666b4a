"""Clock, ports, reachability and the swarm, as seen from this machine.

Surprising fact: a peer that has already connected to a bootstrap can be "reached" by it over that same connection, NAT
or not. So reachability is tried with a peer of its own that listens, and talks to nobody first.
"""

import email.utils
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from hivetrain.doctor.plan import Plan
from hivetrain.doctor.report import Finding, fail, ok, skipped, warn
from hivetrain.logs import one_line

T = TypeVar("T")

MAX_SKEW_S = 3.0  # hivemind refuses peers whose clock is further off
HTTP_TIMEOUT_S = 4.0
DIAL_TIMEOUT_S = 8.0
STRAGGLER_WAIT_S = 2.0  # for the other servers, once one has answered
MAX_TOLD_CHARS = 200  # of what is told of one server
MAX_ANSWER_BYTES = 64 * 1024
LOOPBACK_PREFIXES = ("/ip4/127.", "/ip6/::1/")


def check_bootstrap(plan: Plan) -> Finding:
    """Whether every bootstrap server named answers, and is well."""
    urls = bootstrap_urls(plan)
    if not urls:
        return skipped("no bootstrap URL is configured")
    well: list[str] = []
    ill: list[str] = []
    for url, health in _ask_all(urls, _health, HTTP_TIMEOUT_S).items():
        if isinstance(health, Exception):
            ill.append(_failed(url, health))
        else:
            status = str(health.get("status"))
            told = one_line(f"{shown(url)} is {status}, {health.get('dht_peers')} peers", MAX_TOLD_CHARS)
            (well if status == "ok" else ill).append(told)
    if not well:
        return fail("; ".join(ill), "check the URL and the network, or start one: hivetrain bootstrap")
    if ill:
        return warn("; ".join(ill + well), "one is enough to join; tell its operator")
    return ok("; ".join(well))


def check_clock(plan: Plan) -> Finding:
    """This clock against the Date of every server that answers, the chain's included."""
    servers = [*bootstrap_urls(plan)]
    if plan.chain and plan.chain.startswith(("http://", "https://")):
        servers.append(plan.chain.partition("#")[0].rstrip("/"))
    answers = _ask_all(servers, _skew_s, HTTP_TIMEOUT_S).items()
    # One that does not answer is reported by its own check.
    skews = {shown(url): skew_s for url, skew_s in answers if not isinstance(skew_s, Exception)}
    if not skews:
        return skipped("no server to compare with")
    worst = max(skews, key=lambda name: abs(skews[name]))
    told = f"{abs(skews[worst]):.1f} s {'ahead of' if skews[worst] > 0 else 'behind'} {worst}"
    if abs(skews[worst]) > MAX_SKEW_S:
        return fail(f"this clock is {told}", "set it by NTP: timedatectl set-ntp true (peers refuse more than 3 s)")
    return ok(f"within a second or {told}")


def check_ports(plan: Plan) -> Finding:
    """Whether the addresses to listen on are free, and of use to other machines."""
    if plan.client_mode:
        return skipped("client mode: this peer listens nowhere")
    for maddr in plan.host_maddrs:
        parts = maddr.split("/")
        if len(parts) < 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
            return fail(f"{maddr} is no address to listen on", "write it like /ip4/0.0.0.0/tcp/31337")
        family = socket.AF_INET6 if parts[1] == "ip6" else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((parts[2], int(parts[4])))
            except (OSError, OverflowError, ValueError) as error:
                advice = "choose another port in host_maddrs, or end the program that has it (ss -ltnp)"
                return fail(f"{maddr}: {_reason(error)}", advice)
    loopback = all(maddr.startswith(LOOPBACK_PREFIXES) for maddr in plan.host_maddrs)
    remote = [peer for peer in _entries(plan) if "127.0.0.1" not in peer and "localhost" not in peer]
    if loopback and remote and not plan.announce_maddrs:
        advice = 'set host_maddrs: ["/ip4/0.0.0.0/tcp/31337"], or client_mode: true if nobody can dial this machine'
        return warn(f"{', '.join(plan.host_maddrs)} is out of reach for other machines", advice)
    return ok(f"{', '.join(plan.host_maddrs)} can be listened on")


def check_reach(plan: Plan) -> Finding:
    """Has bootstraps dial back to a peer that listens where the configuration says."""
    from hivetrain.swarm import start_dht, visible_maddrs

    urls = bootstrap_urls(plan)
    if plan.client_mode or not urls:
        return skipped("client mode" if plan.client_mode else "no bootstrap URL to ask for a dial")
    answers = _ask_all(urls, _health, HTTP_TIMEOUT_S)
    alive = [url for url, answer in answers.items() if not isinstance(answer, Exception)]
    if not alive:
        return _nobody_dialled(answers)
    listener = start_dht([], host_maddrs=plan.host_maddrs, startup_timeout_s=8)
    try:
        visible = visible_maddrs(listener, timeout_s=4)[0]
        port = _tcp_port(plan.announce_maddrs[0]) if plan.announce_maddrs else _tcp_port(visible)
        return _ask_to_dial(alive, port, visible.rpartition("/")[2], plan.use_auto_relay)
    finally:
        listener.shutdown()


def check_swarm(plan: Plan) -> Finding:
    """Joins the DHT as a reader and counts the peers of the run."""
    from hivetrain.swarm import count_known_peers, resolve_initial_peers, start_dht

    peers = resolve_initial_peers(plan.initial_peers, timeout_s=6)
    if not peers:
        return warn("no initial_peers: this peer would start a swarm of its own", "name a bootstrap's URL to join one")
    dht = start_dht(peers, client_mode=True, startup_timeout_s=10)
    try:
        known = count_known_peers(dht, timeout_s=4)
        if plan.run_id is None:
            return ok(f"joined; {known} peers in the DHT")
        found: Any = dht.get(f"{plan.run_id}_progress", latest=True, return_future=True).result(timeout=6)
        training = len(found.value) if found is not None and isinstance(found.value, dict) else 0
    finally:
        dht.shutdown()
    if not training:
        advice = "check run_id; if you are the first miner of the run, all is well"
        return warn(f"joined; {known} peers in the DHT, none of them trains run {plan.run_id!r}", advice)
    return ok(f"joined; {known} peers in the DHT, {training} train run {plan.run_id!r}")


def bootstrap_urls(plan: Plan) -> list[str]:
    """The bootstrap URLs among the initial peers."""
    urls = [
        entry.rstrip("/").removesuffix("/return_dht_address")
        for entry in _entries(plan)
        if entry.lower().startswith(("http://", "https://"))
    ]
    return list(dict.fromkeys(urls))


def shown(url: str) -> str:
    """The URL without user name and password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _ask_all(urls: Sequence[str], ask: Callable[[str], T], timeout_s: float) -> dict[str, T | Exception]:
    """What asking each server came to. All are asked at once, and none is waited for long once another has answered."""
    outbox: queue.SimpleQueue[tuple[str, T | Exception]] = queue.SimpleQueue()

    def work(url: str) -> None:
        try:
            outbox.put((url, ask(url)))
        except Exception as error:  # whatever a server makes of the request
            outbox.put((url, error))

    for url in urls:  # not a pool, which would wait at exit for a server that drips
        threading.Thread(target=work, args=(url,), daemon=True).start()
    answers: dict[str, T | Exception] = {url: TimeoutError("no answer in time") for url in urls}
    deadline, waiting = time.monotonic() + timeout_s, len(urls)
    while waiting and (left_s := deadline - time.monotonic()) > 0:
        try:
            url, answer = outbox.get(timeout=left_s)
        except queue.Empty:
            break
        answers[url], waiting = answer, waiting - 1
        if not isinstance(answer, Exception):
            deadline = min(deadline, time.monotonic() + STRAGGLER_WAIT_S)
    return answers


def _ask_to_dial(urls: list[str], port: int, peer_id: str, use_auto_relay: bool) -> Finding:
    query = urlencode({"port": port, "peer_id": peer_id})

    def dial(url: str) -> tuple[bool, str]:
        with urlopen(Request(f"{url}/dial_back?{query}", method="POST"), timeout=DIAL_TIMEOUT_S) as response:
            answer = json.loads(response.read(MAX_ANSWER_BYTES))
        return answer["reachable"] is True, str(answer.get("address"))

    answers = _ask_all(urls, dial, DIAL_TIMEOUT_S)
    tried = {url: answer for url, answer in answers.items() if not isinstance(answer, Exception)}
    for url, (reached, address) in tried.items():
        if reached:
            return ok(one_line(f"{shown(url)} reached this machine at {address}", MAX_TOLD_CHARS))
    if not tried:
        return _nobody_dialled(answers)
    told = f"{', '.join(map(shown, tried))} cannot reach this machine on port {port}"
    if use_auto_relay:
        advice = "see that a bootstrap runs with --relay; client_mode: true works without one"
        return warn(f"{told}: only a relay can connect others to it (use_auto_relay)", advice)
    advice = (
        f"open TCP port {port} in firewall and router and forward it here, or, behind a NAT that you do not rule, "
        "set use_auto_relay: true or client_mode: true"
    )
    return fail(told, advice)


def _nobody_dialled(answers: dict[str, T | Exception]) -> Finding:
    reasons = [_failed(url, error) for url, error in answers.items() if isinstance(error, Exception)]
    return warn(f"nobody could be asked to dial back: {'; '.join(reasons)}", "ask again later, or another bootstrap")


def _failed(url: str, error: Exception) -> str:
    return one_line(f"{shown(url)}: {_reason(error)}", MAX_TOLD_CHARS)


def _health(url: str) -> dict[str, Any]:
    health = json.loads(_get(f"{url}/health")[0])
    if not isinstance(health, dict):
        raise ValueError("its answer says nothing of its health")
    return health


def _skew_s(url: str) -> float:
    """Seconds by which this clock is ahead of the server's."""
    asked_at = time.time()
    date = email.utils.parsedate_to_datetime(_get(f"{url}/health")[1])
    # Date has whole seconds: on average it is half a second behind.
    return (asked_at + time.time()) / 2 - date.timestamp() - 0.5


def _get(url: str) -> tuple[bytes, str]:
    """Body, bounded, and Date of an answer, whatever its status."""
    from urllib.error import HTTPError

    try:
        response = urlopen(Request(url), timeout=HTTP_TIMEOUT_S)
    except HTTPError as error:
        response = error
    with response:
        return response.read(MAX_ANSWER_BYTES), response.headers.get("Date", "")


def _entries(plan: Plan) -> list[str]:
    source = plan.initial_peers
    if source is None:
        source = os.environ.get("HIVETRAIN_INITIAL_PEERS", "")
    parts = [part.strip() for entry in ([source] if isinstance(source, str) else source) for part in entry.split(",")]
    return [part for part in parts if part]


def _tcp_port(maddr: str) -> int:
    parts = maddr.split("/")
    return int(parts[parts.index("tcp") + 1])


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", error)
    return str(getattr(inner, "strerror", None) or inner or type(inner).__name__)[:200]
