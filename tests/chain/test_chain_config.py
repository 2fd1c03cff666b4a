"""A YAML file may choose the chain."""

import pytest
from jsonargparse import ArgumentParser

from hivetrain.chain.base import Chain

CHOICES = {
    "LocalChain": {"path": "ledger.db", "hotkey": {"name": "cold", "hotkey": "hot"}},
    "RemoteChain": {"url": "http://127.0.0.1:9944", "hotkey": {"name": "cold"}},
    "BittensorChain": {"network": "test", "netuid": 42, "wallet": {"name": "cold", "hotkey": "hot"}},
}
MODULES = {"LocalChain": "local", "RemoteChain": "remote", "BittensorChain": "bittensor"}


@pytest.mark.parametrize("name", list(CHOICES))
def test_yaml_chooses_the_chain(name, tmp_path):
    if name == "BittensorChain":
        pytest.importorskip("bittensor")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Chain, "chain")
    init = "".join(f"    {key}: {value}\n" for key, value in CHOICES[name].items()).replace("'", "")
    config = tmp_path / "chain.yaml"
    config.write_text(f"chain:\n  class_path: hivetrain.chain.{MODULES[name]}.{name}\n  init_args:\n{init}")
    chain = parser.instantiate_classes(parser.parse_args(["--config", str(config)])).chain
    assert type(chain).__name__ == name
    chain.close()
