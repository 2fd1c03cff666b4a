"""``hivetrain dashboard``: show a run in a browser."""

import argparse

HELP = "show a run in a browser: losses, peers, exchanges, miners, validators, chain; reads only"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Follows a run as an outsider and serves a page about it. It needs no key and writes nothing but its own "
        "history. The page can be seen from this machine only, unless --host says otherwise."
    )
    parser.add_argument("--run-id", required=True, metavar="NAME", help="the run, as its miners' run_id has it")
    parser.add_argument(
        "--initial-peers",
        nargs="+",
        metavar="PEER",
        help="multiaddrs of peers, or URLs of bootstrap servers (default: HIVETRAIN_INITIAL_PEERS)",
    )
    parser.add_argument(
        "--chain",
        metavar="ADDRESS",
        help="a ledger file, http://HOST:PORT[#SERVER_HOTKEY], or bittensor:NETWORK/NETUID (default: none is shown)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen for HTTP (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="HTTP port; 0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--db",
        metavar="FILE",
        help="file that keeps the history over restarts; :memory: keeps none "
        "(default: ~/.local/state/hivetrain/dashboard-NAME.sqlite3)",
    )
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between two readings (default: %(default)s)"
    )
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics here (default: not)")
    parser.add_argument(
        "--metrics-host", default="127.0.0.1", metavar="HOST", help="interface for them (default: %(default)s)"
    )
    parser.add_argument("--address-file", metavar="FILE", help="write the page's URL here once the server listens")


def run(args: argparse.Namespace) -> int:
    from hivetrain.dashboard.server import Options, serve
    from hivetrain.errors import UserError

    if not 0.2 <= args.interval <= 3600:
        raise UserError("--interval must be between 0.2 and 3600 seconds")
    return serve(
        Options(
            run_id=args.run_id,
            initial_peers=args.initial_peers,
            chain=args.chain,
            host=args.host,
            port=args.port,
            db=args.db,
            address_file=args.address_file,
            interval_s=args.interval,
            metrics_port=args.metrics_port,
            metrics_host=args.metrics_host,
        )
    )
