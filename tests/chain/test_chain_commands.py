"""The commands chain, ledger and keys, as a person types them."""

import json

import pytest
from conftest import RULES, BittensorSubnet, T

from hivetrain.chain.base import Rules
from hivetrain.cli import main
from hivetrain.keys import Wallet


@pytest.fixture
def laptop(tmp_path, capsys):
    """Runs a command; returns its status, output and errors."""

    def run(*words):
        status = main([str(word) for word in words])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    run.file = tmp_path / "ledger.db"
    run.key = ("--wallet", "m", "--wallet-path", tmp_path / "wallets")
    run.wallet = Wallet("m", "default", str(tmp_path / "wallets"))
    return run


@pytest.fixture
def joined(laptop):
    assert laptop("keys", "new", *laptop.key)[0] == 0
    rules = ("tempo=5", "rate_limit=0", "block_time_s=0")
    words = [word for rule in rules for word in ("--rule", rule)]
    assert laptop("ledger", "create", laptop.file, *words) == (0, f"created {laptop.file}\n", "")
    assert laptop("ledger", "stake", laptop.file, laptop.wallet.address(), 100)[0] == 0
    status, out, _ = laptop("chain", "register", "--chain", laptop.file, *laptop.key)
    assert (status, out) == (0, "applied in block 1: registered, uid 0\n")
    assert laptop("ledger", "advance", laptop.file, 5) == (0, "block 6\n", "")
    return laptop


def test_status_shows_every_neuron_at_a_glance(joined):
    status, out, _ = joined("chain", "status", "--chain", joined.file)
    assert status == 0
    assert "block 6  next epoch 10  tempo 5  yuma, weights plain" in out
    (row,) = [line.split() for line in out.splitlines() if joined.wallet.address() in line]
    assert row[:6] == ["0", joined.wallet.address(), "100.00", "validator", "5", "ago"]


def test_status_as_json_holds_everything(joined):
    view = json.loads(joined("chain", "status", "--chain", joined.file, "--json")[1])
    assert view["rules"]["tempo"] == 5
    assert view["neurons"][0]["hotkey"] == joined.wallet.address()


def test_weights_and_earnings_are_shown(joined):
    from hivetrain.chain.local import LocalChain
    from hivetrain.keys import Hotkey

    miner = LocalChain(joined.file, Hotkey.throwaway())
    miner.register(T)
    joined("ledger", "advance", joined.file, 1)
    validator = LocalChain(joined.file, joined.wallet)
    validator.submit_weights({miner.hotkey: 1.0}, 0, T)
    joined("ledger", "advance", joined.file, 5)
    _, out, _ = joined("chain", "weights", "--chain", joined.file)
    assert [joined.wallet.address(), miner.hotkey, "1.0000"] in [line.split() for line in out.splitlines()]
    shares = json.loads(joined("chain", "weights", "--chain", joined.file, "--json")[1])
    assert shares == {joined.wallet.address(): {miner.hotkey: 1.0}}
    assert f"{miner.hotkey}  2.5000" in joined("ledger", "earnings", joined.file)[1]


def test_axons_are_published_and_listed(joined):
    words = ("chain", "axons", "--chain", joined.file)
    assert joined(*words, *joined.key, "--publish", "8.8.8.8:4000")[0] == 0
    assert "8.8.8.8:4000" in joined(*words)[1]
    assert joined(*words, *joined.key, "--publish", "[2001:db8::1]:4000")[0] == 0
    assert "[2001:db8::1]:4000" in joined(*words)[1]
    assert json.loads(joined(*words, "--json")[1]) == {joined.wallet.address(): "[2001:db8::1]:4000"}


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("chain", "status", "--chain", "/nowhere/x.db"), "hivetrain ledger create"),
        (("chain", "status", "--chain", "ftp://x"), "bittensor:NETWORK/NETUID"),
        (("chain", "status", "--chain", "http://127.0.0.1:1", "--timeout", "5"), "not reachable"),
        (("chain", "register", "--chain", "x.db"), "--wallet"),
        (("chain", "register", "--chain", "x.db", "--wallet", "none", "--wallet-path", "/nowhere"), "keys new"),
        (("chain", "axons", "--chain", "x.db", "--wallet", "m", "--publish", "here"), "IP:PORT"),
        (("ledger",), "--serve"),
        (("ledger", "stake", "/nowhere/x.db", "me", "1"), "address"),
        (("ledger", "create", "/dev/null"), "exists"),
        (("ledger", "create", "y.db", "--rule", "pace=3"), "tempo"),
        (("ledger", "create", "y.db", "--rule", "tempo=fast"), "tempo"),
        (("ledger", "create", "y.db", "--rule", "tempo=0"), "at least 1"),
        (("keys", "show", "--wallet", "none", "--wallet-path", "/nowhere"), "keys new"),
        (("keys", "new", "--wallet", "../x"), "plain file name"),
    ],
)
def test_mistakes_get_one_line_that_says_what_to_do(laptop, words, hint):
    status, out, err = laptop(*words)
    assert (status, out) == (2, "")
    assert hint in err
    assert err.count("\n") == 1


def test_keys_shows_no_secret(laptop):
    laptop("keys", "new", *laptop.key, "--coldkey", "--no-password")
    secrets = json.loads(laptop.wallet.hotkey_file.read_text()) | {}
    shown = "".join(laptop("keys", "show", *laptop.key)[1:])
    assert laptop.wallet.address() in shown
    for field in ("secretSeed", "privateKey", "secretPhrase"):
        assert secrets[field] not in shown


def test_rules_are_shown_and_changed(joined):
    assert "rate_limit=0\n" in joined("ledger", "rules", joined.file)[1]
    assert "rate_limit=9\n" in joined("ledger", "rules", joined.file, "--rule", "rate_limit=9")[1]
    assert "rate_limit=9\n" in joined("ledger", "rules", joined.file)[1]
    assert joined("ledger", "fund", joined.file, joined.wallet.address(), 3)[0] == 0


def test_the_same_commands_work_on_bittensor(tmp_path, laptop, monkeypatch):
    pytest.importorskip("bittensor")
    from fake_substrate import NETUID

    from hivetrain.chain import bittensor

    net = BittensorSubnet(tmp_path, Rules(**RULES, registration_cost=0.5))
    monkeypatch.setattr(bittensor, "connect_to", lambda network: net._make(net.wallet())._sessions._access())
    laptop("keys", "new", *laptop.key, "--coldkey", "--no-password")
    words = ("--chain", f"bittensor:local/{NETUID}", *laptop.key)
    status, _, err = laptop("chain", "register", *words)
    assert (status, "costs 0.5 TAO" in err) == (2, True)
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    assert "not confirmed" in laptop("chain", "register", *words, "--max-cost", 1)[2]
    assert "above the limit" in laptop("chain", "register", *words, "--max-cost", 0.1, "--yes")[2]
    assert laptop("chain", "register", *words, "--max-cost", 1, "--yes")[0] == 0
    assert laptop.wallet.address() in laptop("chain", "status", *words)[1]
    assert laptop("chain", "axons", *words, "--publish", "8.8.8.8:1")[0] == 0
    assert "8.8.8.8:1" in laptop("chain", "axons", *words)[1]
    assert laptop("chain", "weights", *words, "--json")[1] == "{}\n"
    net.close()
