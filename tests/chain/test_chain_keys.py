import os
import pickle
import stat
import time

import pytest

from hivetrain.errors import UserError
from hivetrain.keys import Hotkey, RequestRefused, Wallet, is_address, sign_request, verify, verify_request

SERVER = Hotkey.from_seed(b"\7" * 32)
NOW = 1_700_000_000_000_000_000


class Nonces:
    """A store in a set."""

    def __init__(self):
        self.seen = set()

    def accept(self, address, nonce_ns, now_ns):
        fresh = (address, nonce_ns) not in self.seen
        self.seen.add((address, nonce_ns))
        return fresh


def request(hotkey, **changes):
    facts = {"method": "POST", "path": "/v1/weights", "body": b"{}", "receiver": SERVER.address, "nonce_ns": NOW}
    return sign_request(hotkey, **(facts | changes))


def check(headers, nonces=None, **changes):
    facts = {"method": "POST", "path": "/v1/weights", "receiver": SERVER.address, "now_ns": NOW}
    body = changes.pop("body", b"{}")
    return verify_request(headers, body, nonces=nonces or Nonces(), **(facts | changes))


def test_a_signature_holds_for_its_key_and_message_only():
    hotkey, other = Hotkey.throwaway(), Hotkey.throwaway()
    signature = hotkey.sign(b"message")
    assert verify(hotkey.address, b"message", signature)
    assert not verify(hotkey.address, b"massage", signature)
    assert not verify(other.address, b"message", signature)
    assert not verify(hotkey.address, b"message", signature[:-1])
    assert not verify("not an address", b"message", signature)


def test_a_signature_takes_under_a_millisecond():
    hotkey = Hotkey.throwaway()
    start = time.perf_counter()
    for _ in range(100):
        hotkey.sign(b"message")
    assert (time.perf_counter() - start) / 100 < 0.001


def test_wallet_files_are_private_and_never_overwritten(tmp_path):
    wallet = Wallet("cold", "hot", str(tmp_path))
    hotkey = wallet.create_hotkey()
    wallet.create_coldkey(None)
    for file in (wallet.hotkey_file, wallet.coldkey_file):
        assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert wallet.load().address == wallet.address() == hotkey.address
    with pytest.raises(UserError, match="exists"):
        wallet.create_hotkey()
    assert wallet.load().address == hotkey.address


def locked_wallet(tmp_path):
    """A wallet whose hotkey file is encrypted. Deriving a key from a password takes seconds by design."""
    wallet = Wallet("cold", "coldkey", str(tmp_path))
    address = wallet.create_coldkey("secret")
    locked = Wallet("x", "locked", str(tmp_path))
    locked.hotkey_file.parent.mkdir(parents=True)
    locked.hotkey_file.write_bytes(wallet.coldkey_file.read_bytes())
    return locked, address


def test_an_encrypted_hotkey_opens_with_its_password(tmp_path, monkeypatch):
    locked, address = locked_wallet(tmp_path)
    assert address.encode() not in locked.hotkey_file.read_bytes()
    with pytest.raises(UserError, match="BT_PW_") as caught:
        locked.load()
    monkeypatch.setenv(str(caught.value).rpartition(" ")[2], "secret")
    with pytest.raises(UserError, match="the form that btcli writes"):
        locked.load()
    assert locked.load("secret").address == address
    assert Wallet("cold", "x", str(tmp_path)).coldkey_is_locked()
    assert not Wallet("none", "x", str(tmp_path)).coldkey_is_locked()


@pytest.mark.slow
def test_an_encrypted_hotkey_stays_shut_for_another_password(tmp_path, monkeypatch):
    import bittensor_core

    locked, address = locked_wallet(tmp_path)
    with pytest.raises(UserError, match="password"):
        locked.load("wrong")
    with pytest.raises(UserError) as caught:
        locked.load()
    variable = str(caught.value).rpartition(" ")[2]
    monkeypatch.setenv(variable, "")
    bittensor_core.save_password_to_environment(variable, "secret")
    assert locked.load().address == address


def test_a_missing_key_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="hivetrain keys new"):
        Wallet("a", "b", str(tmp_path)).load()


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b"])
def test_wallet_names_cannot_leave_their_directory(name):
    with pytest.raises(UserError):
        Wallet(name)
    with pytest.raises(UserError):
        Wallet("a", name)


def test_wallet_files_are_those_of_the_sdk(tmp_path):
    sdk = pytest.importorskip("bittensor")
    ours = Wallet("cold", "hot", str(tmp_path))
    hotkey, coldkey = ours.create_hotkey(), ours.create_coldkey(None)
    theirs = sdk.Wallet("cold", "hot", path=str(tmp_path))
    assert theirs.hotkey.ss58_address == theirs.hotkeypub.ss58_address == hotkey.address
    assert theirs.coldkey.ss58_address == theirs.coldkeypub.ss58_address == coldkey
    made = sdk.Wallet("sdk", "hot", path=str(tmp_path))
    made.create_new_hotkey(use_password=False, suppress=True)
    assert Wallet("sdk", "hot", str(tmp_path)).load().address == made.hotkey.ss58_address


def test_a_key_shows_and_pickles_nothing_secret():
    hotkey = Hotkey.from_seed(b"\5" * 32)
    assert repr(hotkey) == f"Hotkey({hotkey.address})"
    with pytest.raises(TypeError):
        pickle.dumps(hotkey)


def test_addresses_have_one_spelling():
    assert is_address(SERVER.address)
    assert not any(map(is_address, ["", "5x", SERVER.address[:-1] + "x", SERVER.address.lower(), None, "5" * 10**6]))


def test_a_signed_request_names_its_sender():
    hotkey = Hotkey.throwaway()
    assert check(request(hotkey)) == hotkey.address


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("another server", {"receiver": Hotkey.from_seed(b"\6" * 32).address}),
        ("signature", {"body": b"{ }"}),
        ("signature", {"path": "/v1/weights?x=1"}),
        ("signature", {"method": "GET"}),
        ("stale", {"now_ns": NOW + 11 * 10**9}),
        ("stale", {"now_ns": NOW - 3 * 10**9}),
    ],
)
def test_misdirected_altered_and_stale_requests_are_refused(reason, changes):
    headers = request(Hotkey.throwaway())
    with pytest.raises(RequestRefused, match=reason):
        check(headers, **changes)


def test_a_replayed_request_is_refused_and_a_forged_one_does_not_burn_the_nonce():
    hotkey, nonces = Hotkey.throwaway(), Nonces()
    headers = request(hotkey)
    with pytest.raises(RequestRefused, match="signature"):
        check(headers | {"X-Bittensor-Signature": "0x" + "00" * 64}, nonces)
    check(headers, nonces)
    with pytest.raises(RequestRefused, match="already"):
        check(headers, nonces)


@pytest.mark.parametrize(
    "damage",
    [
        {"X-Bittensor-Version": "2"},
        {"X-Bittensor-Hotkey": "nobody"},
        {"X-Bittensor-Nonce": "9" * 10**6},
        {"X-Bittensor-Nonce": "-1"},
        {"X-Bittensor-Nonce": "١٢"},
        {"X-Bittensor-Signature": "0xzz"},
        {"X-Bittensor-Signature": "00" * 10**6},
        {"X-Bittensor-Crypto": "ed25519"},
    ],
)
def test_malformed_headers_are_refused(damage):
    with pytest.raises(RequestRefused):
        check(request(Hotkey.throwaway()) | damage)
    for missing in list(damage):
        if missing != "X-Bittensor-Crypto":
            with pytest.raises(RequestRefused):
                check({k: v for k, v in request(Hotkey.throwaway()).items() if k != missing})


def test_requests_are_those_of_the_sdk():
    http_auth = pytest.importorskip("bittensor.http_auth")
    hotkey = Hotkey.throwaway()
    facts = {"method": "POST", "path": "/v1/x?q=1"}
    caller = http_auth.verify(
        sign_request(hotkey, body=b"b", receiver=SERVER.address, **facts),
        b"b",
        self_hotkey_ss58=SERVER.address,
        **facts,
    )
    assert caller.hotkey_ss58 == hotkey.address
    theirs = http_auth.sign(hotkey.keypair, body=b"b", receiver_ss58=SERVER.address, **facts)
    assert verify_request(theirs, b"b", receiver=SERVER.address, nonces=Nonces(), **facts) == hotkey.address
