"""``hivetrain doctor``: what is wrong here, and what to do about it."""

import argparse

HELP = "check this machine, its network and a configuration, and say what to do for each failure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Checks Python, torch, clock, ports, reachability, swarm, chain, keys, data, disk and memory. Changes nothing. "
        "Exit status: 0 all is well (warnings included), 1 something fails, 2 the configuration cannot be read."
    )
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="FILE", help="of a miner or a validator; several merge"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        help="seconds for all checks together, which begin once the libraries are loaded (default: %(default)s)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="as in trainer.strategy.initial_peers=http://HOST:PORT"
    )


def run(args: argparse.Namespace) -> int:
    import logging

    from hivetrain.doctor.plan import read_plan
    from hivetrain.errors import UserError

    if args.timeout <= 0:
        raise UserError("--timeout must be positive")
    plan = read_plan(args.config, args.overrides)
    logging.getLogger("hivetrain").setLevel(logging.ERROR)  # what is wrong is in the findings
    logging.getLogger("hivemind").setLevel(logging.CRITICAL)
    from hivetrain.doctor.checks import checks_of, load_libraries
    from hivetrain.doctor.report import run_checks

    load_libraries()
    findings = run_checks(checks_of(plan), args.timeout)
    failed = [finding for finding in findings if finding.status == "fail"]
    if args.json:
        import json
        from dataclasses import asdict

        print(json.dumps({"ok": not failed, "checks": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            mark = finding.status.upper() if finding.status in ("fail", "warn") else finding.status
            print(f"{mark:8}{finding.check:14}{finding.detail}")
            if finding.advice:
                print(f"{'':22}-> {finding.advice}")
        print(f"{len(failed)} of {len(findings)} checks failed" if failed else "nothing that fails was found")
    return 1 if failed else 0
