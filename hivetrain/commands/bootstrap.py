"""``hivetrain bootstrap``: run a bootstrap server."""

import argparse
from collections.abc import Sequence

HELP = "run a bootstrap server: a DHT peer that answers GET /return_dht_address and GET /health"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Holds a DHT peer and answers GET /return_dht_address with its addresses. Everything stays on this machine by "
        "default: for a swarm of several machines pass --host 0.0.0.0 --host-maddrs /ip4/0.0.0.0/tcp/PORT."
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen for HTTP (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="HTTP port; 0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--identity-path",
        default="bootstrap.id",
        metavar="FILE",
        help="private key that keeps the peer id over restarts, created when missing (default: %(default)s)",
    )
    parser.add_argument(
        "--host-maddrs",
        nargs="+",
        default=["/ip4/127.0.0.1/tcp/0"],
        metavar="MADDR",
        help="where the DHT peer listens; a fixed port keeps the address over restarts (default: /ip4/127.0.0.1/tcp/0)",
    )
    parser.add_argument(
        "--announce-maddrs",
        nargs="+",
        metavar="MADDR",
        help="external addresses to announce and to answer with, behind a port forwarding",
    )
    parser.add_argument(
        "--initial-peers",
        nargs="+",
        default=[],
        metavar="PEER",
        help="URLs of the other bootstrap servers, or multiaddrs of peers; none needs to be up, they are looked for "
        "again and again (default: none)",
    )
    parser.add_argument(
        "--relay", action="store_true", help="carry traffic for peers behind NAT; this machine must be reachable"
    )
    parser.add_argument(
        "--address-file",
        metavar="FILE",
        help="write JSON with url, peer_id and initial_peers here once the server listens",
    )
    parser.add_argument(
        "--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics here (default: not at all)"
    )
    parser.add_argument("--metrics-host", default="127.0.0.1", help="where to serve them (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from hivetrain.bootstrap import serve

    return serve(
        host=args.host,
        port=args.port,
        identity_path=args.identity_path,
        host_maddrs=_split(args.host_maddrs),
        announce_maddrs=_split(args.announce_maddrs or ()) or None,
        initial_peers=args.initial_peers,
        relay=args.relay,
        address_file=args.address_file,
        metrics_port=args.metrics_port,
        metrics_host=args.metrics_host,
    )


def _split(values: Sequence[str]) -> list[str]:
    return [entry.strip() for value in values for entry in value.split(",") if entry.strip()]
