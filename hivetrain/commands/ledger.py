"""``hivetrain ledger``: what the operator of a laptop network does: create it, give stake, change rules, serve it."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hivetrain.chain.base import Rules

HELP = "create, fund and serve a ledger: a whole incentive network in one file"

TIMEOUT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--serve", metavar="FILE", help="serve a ledger to other machines until SIGTERM")
    parser.add_argument("--host", default="127.0.0.1", help="where --serve listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=9944, help="where --serve listens (default: %(default)s)")
    parser.add_argument("--address-file", metavar="FILE", help="where --serve writes its address, for other programs")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    rule: dict[str, Any] = {
        "action": "append",
        "default": [],
        "metavar": "NAME=VALUE",
        "help": "a rule of the subnet, repeatable",
    }
    create = actions.add_parser("create", help="write a new ledger", description="Write a new ledger at block 1.")
    create.add_argument("file")
    create.add_argument("--rule", **rule)
    change = actions.add_parser("rules", help="show the rules, or change some")
    change.add_argument("file")
    change.add_argument("--rule", **rule)
    for name, text in (("stake", "set what backs a hotkey"), ("fund", "set what a hotkey can spend on registration")):
        account = actions.add_parser(name, help=text)
        account.add_argument("file")
        account.add_argument("hotkey", help="an address")
        account.add_argument("amount", type=float)
    advance = actions.add_parser("advance", help="make blocks now, whatever the clock says")
    advance.add_argument("file")
    advance.add_argument("blocks", type=int)
    earnings = actions.add_parser("earnings", help="all that each hotkey ever earned")
    earnings.add_argument("file")


def run(args: argparse.Namespace) -> int:
    from hivetrain.chain.base import LedgerError
    from hivetrain.errors import UserError

    try:
        if args.serve:
            return _serve(args)
        if args.action is None:
            raise UserError("say what to do: --serve FILE, or an action; see hivetrain ledger --help")
        return _ACTIONS[args.action](args)
    except (LedgerError, ValueError, OSError) as error:
        raise UserError(str(error)) from error


def _serve(args: argparse.Namespace) -> int:
    import logging
    from pathlib import Path

    from hivetrain.chain.ledger import Ledger
    from hivetrain.chain.server import LedgerServer
    from hivetrain.errors import UserError
    from hivetrain.keys import Wallet
    from hivetrain.serving import address_file, until_signal

    file = Path(args.serve).expanduser()
    ledger = Ledger(file)
    ledger.snapshot(_deadline())
    wallet = Wallet(f"{file.name}.wallet", "server", str(file.absolute().parent))
    if not wallet.hotkey_file.exists():
        try:
            wallet.create_hotkey()
        except UserError:
            logging.getLogger(__name__).info("another process has just written %s", wallet.hotkey_file)
    key = wallet.load()
    server = LedgerServer(ledger, key, args.host, args.port)
    address = f"{server.url}#{key.address}"
    print(f"serving {file} at {address}", flush=True)
    with until_signal() as opened:
        opened.callback(ledger.close)
        opened.enter_context(address_file(args.address_file, address))
        server.run()
    return 0


def _create(args: argparse.Namespace) -> int:
    from hivetrain.chain.base import Rules
    from hivetrain.chain.ledger import Ledger
    from hivetrain.errors import UserError

    try:
        Ledger.create(args.file, Rules(**_parse_rules(args.rule)))
    except FileExistsError:
        raise UserError(f"{args.file} exists and is left as it is: choose another name") from None
    print(f"created {args.file}")
    return 0


def _rules(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    ledger = _open(args.file)
    changes = _parse_rules(args.rule)
    rules: Rules = ledger.change_rules(_deadline(), **changes) if changes else ledger.snapshot(_deadline()).rules
    for name, value in asdict(rules).items():
        print(f"{name}={value}")
    return 0


def _stake(args: argparse.Namespace) -> int:
    _open(args.file).set_stake(args.hotkey, args.amount, _deadline())
    return 0


def _fund(args: argparse.Namespace) -> int:
    _open(args.file).set_funds(args.hotkey, args.amount, _deadline())
    return 0


def _advance(args: argparse.Namespace) -> int:
    print(f"block {_open(args.file).advance(args.blocks, _deadline())}")
    return 0


def _earnings(args: argparse.Namespace) -> int:
    earned = _open(args.file).earnings(_deadline())
    for hotkey, amount in sorted(earned.items(), key=lambda item: -item[1]):
        print(f"{hotkey}  {amount:.6f}")
    return 0


_ACTIONS = {
    "create": _create,
    "rules": _rules,
    "stake": _stake,
    "fund": _fund,
    "advance": _advance,
    "earnings": _earnings,
}


def _open(file: str) -> Any:
    from hivetrain.chain.ledger import Ledger

    return Ledger(file)


def _deadline() -> Any:
    import time

    from hivetrain.chain.base import Deadline

    return Deadline(TIMEOUT_S, time.monotonic)


def _parse_rules(texts: list[str]) -> dict[str, Any]:
    """``name=value`` pairs with each value as the rule's own type."""
    from dataclasses import fields

    from hivetrain.chain.base import Rules
    from hivetrain.errors import UserError

    kinds = {item.name: item.type for item in fields(Rules)}
    truth = {"true": True, "false": False}
    parsed: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds:
            raise UserError(f"{name!r} is no rule; there are {', '.join(sorted(kinds))}")
        kind = kinds[name]
        try:
            if kind is bool:
                parsed[name] = truth[value.lower()]
            elif kind in (int, float):
                parsed[name] = kind(value)
            else:
                parsed[name] = value or None
        except (KeyError, ValueError):
            raise UserError(f"{value!r} is no value for {name}") from None
    return parsed
