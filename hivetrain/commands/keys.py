"""``hivetrain keys``: create and show hotkeys, in the files btcli uses."""

import argparse

HELP = "create and show hotkeys"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = actions.add_parser("new", help="write a new hotkey, and a coldkey on request")
    show = actions.add_parser("show", help="print addresses; never prints a secret")
    for action in (new, show):
        action.add_argument("--wallet", default="default", help="name of the wallet (default: %(default)s)")
        action.add_argument("--hotkey", default="default", help="name of the hotkey (default: %(default)s)")
        action.add_argument("--wallet-path", default="~/.bittensor/wallets", help="all wallets (default: %(default)s)")
    new.add_argument("--coldkey", action="store_true", help="also write a coldkey, encrypted with a password")
    new.add_argument("--no-password", action="store_true", help="do not encrypt the coldkey: for throw-away networks")


def run(args: argparse.Namespace) -> int:
    from hivetrain.keys import Wallet

    wallet = Wallet(args.wallet, args.hotkey, args.wallet_path)
    if args.action == "new":
        if args.coldkey:
            print(f"coldkey {wallet.create_coldkey(None if args.no_password else _new_password())}")
            print(f"        {wallet.coldkey_file}  (back this file up: it is the only copy)")
        wallet.create_hotkey()
    print(f"hotkey  {wallet.address()}")
    print(f"        {wallet.hotkey_file}")
    return 0


def _new_password() -> str:
    import getpass

    from hivetrain.errors import UserError

    try:
        password = getpass.getpass("Password of the new coldkey: ")
        again = getpass.getpass("Again: ")
    except EOFError:
        raise UserError("no password given: type one, or pass --no-password") from None
    if not password or password != again:
        raise UserError("the passwords are empty or differ; nothing was written")
    return password
