"""A laptop needs no network beyond itself and no Bittensor client."""

import subprocess
import sys
import textwrap

PRELUDE = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        host = args[1][0] if isinstance(args[1], tuple) else args[1]
        if host not in ("127.0.0.1", "::1"):
            raise SystemExit(f"{event} to {host}")
    if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "::1", "localhost", None):
        raise SystemExit(f"look-up of {args[0]}")

sys.addaudithook(refuse)
"""
EPILOGUE = """
loaded = [name for name in sys.modules if name.split(".")[0] == "bittensor"]
assert not loaded, loaded
print("fine")
"""


def run(program, *args):
    program = PRELUDE + textwrap.dedent(program) + EPILOGUE
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


def test_the_guard_of_these_tests_catches_a_way_out():
    program = PRELUDE + "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)\nprint('fine')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "192.0.2.1" in done.stderr


def test_the_package_imports_quickly_and_without_any_client():
    run("""
    import time
    start = time.perf_counter()
    import hivetrain.chain
    assert time.perf_counter() - start < 0.5
    from hivetrain.chain import Chain, LocalChain, RemoteChain, Rules, Snapshot, open_chain
    assert not {"aiohttp", "fastapi", "uvicorn", "torch", "hivemind"} & set(sys.modules)
    """)


def test_an_economy_of_one_machine_stays_on_it(tmp_path):
    run(
        """
        from hivetrain.chain import LocalChain, RemoteChain, Rules
        from hivetrain.chain.ledger import Ledger
        from hivetrain.chain.server import LedgerServer
        from hivetrain.chain.base import Deadline
        from hivetrain.keys import Hotkey
        import time

        path, T = sys.argv[1] + "/ledger.db", 20.0
        Ledger.create(path, Rules(tempo=5, rate_limit=1, block_time_s=0.05, allow_loopback=True))
        operator = Ledger(path)
        validator, miner = Hotkey.throwaway(), Hotkey.throwaway()
        operator.set_stake(validator.address, 10.0, Deadline(T, time.monotonic))
        local = LocalChain(path, validator)
        with LedgerServer(operator, Hotkey.throwaway()) as server, RemoteChain(server.url, miner) as remote:
            local.register(T)
            remote.register(T)
            remote.publish("127.0.0.1", 4000, T)
            local.wait_block(local.snapshot(T).next_epoch, T)
            local.submit_weights({miner.address: 1.0}, 0, T)
            remote.wait_block(remote.snapshot(T).next_epoch, T)
            assert remote.snapshot(T).neuron(miner.address).incentive == 1.0
        local.close()
        """,
        str(tmp_path),
    )


def test_the_commands_of_a_laptop_network_stay_on_it(tmp_path):
    run(
        """
        from hivetrain.cli import main
        file, wallets = sys.argv[1] + "/ledger.db", sys.argv[1] + "/wallets"
        key = ["--wallet", "m", "--wallet-path", wallets]
        assert main(["keys", "new", *key]) == 0
        assert main(["ledger", "create", file, "--rule", "allow_loopback=true"]) == 0
        assert main(["chain", "register", "--chain", file, *key]) == 0
        assert main(["chain", "axons", "--chain", file, *key, "--publish", "127.0.0.1:4000"]) == 0
        for action in ("status", "weights", "axons"):
            assert main(["chain", action, "--chain", file]) == 0
        """,
        str(tmp_path),
    )
