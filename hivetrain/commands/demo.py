"""``hivetrain demo``: a whole economy on one machine."""

import argparse
from pathlib import Path

HELP = "run a bootstrap server, a ledger, miners and validators on this machine: one small model, trained and paid for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--miners", type=int, default=3, help="number of miners (default: %(default)s)")
    parser.add_argument("--validators", type=int, default=2, help="number of validators (default: %(default)s)")
    parser.add_argument(
        "--cheats",
        default="free-rider",
        help="kinds of dishonest miners, separated by commas, one miner each: free-rider, lazy, stale, copied, "
        "over-claim; or none (default: %(default)s)",
    )
    parser.add_argument(
        "--audit-probability", type=float, default=0.25, help="share of contributions audited (default: %(default)s)"
    )
    parser.add_argument("--swarm-epochs", type=int, default=60, help="global updates to make (default: %(default)s)")
    parser.add_argument("--no-dashboard", action="store_true", help="do not serve a dashboard of the run")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="directory for summary.json, loss.png, reports and logs"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the model and of the data assignment")
    parser.add_argument(
        "--timeout-s", type=float, default=900.0, help="give up after this many seconds (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from hivetrain.demo import Options, run_demo
    from hivetrain.demo.cheats import CHEATS
    from hivetrain.errors import UserError

    cheats = () if args.cheats in ("", "none") else tuple(args.cheats.split(","))
    for cheat in cheats:
        if cheat not in CHEATS:
            raise UserError(f"--cheats: {cheat!r} is unknown; choose from {', '.join(CHEATS)}, or none")
    if not 0 <= args.audit_probability <= 1:
        raise UserError("--audit-probability must lie between 0 and 1")
    options = Options(
        args.miners, args.validators, cheats, args.audit_probability, args.swarm_epochs, not args.no_dashboard,
        args.out, args.seed, args.timeout_s,
    )  # fmt: skip
    return run_demo(options, Console())
