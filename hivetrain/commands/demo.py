"""``hivetrain demo``: the main job on one machine."""

import argparse
from pathlib import Path

HELP = "run a bootstrap server and miners on this machine that train one small model together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--miners", type=int, default=2, help="number of miners (default: %(default)s)")
    parser.add_argument("--swarm-epochs", type=int, default=60, help="global updates to make (default: %(default)s)")
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

    options = Options(args.miners, args.swarm_epochs, args.out, args.seed, args.timeout_s)
    return run_demo(options, Console())
