"""The chain, the keys and the data, as the configuration names them.

Surprising fact: a hotkey that is not registered can do everything but be paid, so nothing on the machine would show it.
"""

import stat
from importlib import import_module
from typing import Any

from hivetrain.doctor.plan import Plan, get
from hivetrain.doctor.report import Finding, fail, ok, skipped, warn
from hivetrain.errors import UserError
from hivetrain.keys import Wallet

CHAIN_TIMEOUT_S = 8.0
UNIT_TIMEOUT_S = 10.0


def check_keys(plan: Plan) -> Finding:
    """Whether the hotkey can be read, by its owner alone."""
    if plan.chain is None:
        return skipped("no chain is configured")
    wallet = plan.wallet
    advice = f"hivetrain keys new {_options(wallet)}"
    if not wallet.hotkey_file.exists():
        return fail(f"there is no key file {wallet.hotkey_file}", advice)
    address = wallet.load().address
    mode = stat.S_IMODE(wallet.hotkey_file.stat().st_mode)
    if mode & 0o077:
        return warn(f"{wallet.hotkey_file} can be read by others (mode {mode:o})", f"chmod 600 {wallet.hotkey_file}")
    return ok(f"hotkey {address}")


def check_chain(plan: Plan) -> Finding:
    """Whether the chain answers, and knows this hotkey."""
    from hivetrain.chain.address import open_chain
    from hivetrain.chain.base import LedgerError

    if plan.chain is None:
        return skipped("no chain is configured: nobody is paid")
    try:
        address: str | None = plan.wallet.address()
    except UserError:
        address = None  # said by the check of the keys
    try:
        with open_chain(plan.chain) as chain:
            view = chain.snapshot(CHAIN_TIMEOUT_S)
    except LedgerError as error:
        return fail(f"{plan.chain}: {error}", "check the chain's address and that its server or node runs")
    told = f"{plan.chain} is at block {view.block}, tempo {view.tempo}, {len(view.neurons)} neurons"
    neuron = view.neuron(address) if address else None
    if neuron is None:
        advice = f"hivetrain chain register --chain {plan.chain} {_options(plan.wallet)}"
        return fail(f"{told}; hotkey {address or plan.wallet.hotkey_file} is not registered", advice)
    told = f"{told}; this hotkey is uid {neuron.uid}, stake {neuron.stake:g}"
    if plan.is_validator and not neuron.permit:
        advice = "add stake until it is among the subnet's validators; permits are given at the next epoch"
        return fail(f"{told}, without a validator's permit", advice)
    return ok(told)


def check_data(plan: Plan) -> Finding:
    """Reads the manifest and one unit of the corpus."""
    if plan.data is None:
        return skipped("no configuration with data")
    corpus = _corpus(plan.data)
    if corpus is None:
        return skipped(f"{plan.data.get('class_path')} has no corpus to ask")
    manifest = corpus.manifest
    documents = corpus.read_documents(0)
    slots = get(plan.data, "n_slots")
    if slots is not None and slots > manifest.n_train_units:
        return fail(f"{manifest.n_train_units} units for {slots} slots", "lower data.n_slots, or take a larger corpus")
    return ok(f"{manifest.n_train_units} units to train on; the first holds {len(documents)} documents")


def _options(wallet: Wallet) -> str:
    return f"--wallet {wallet.name} --hotkey {wallet.hotkey} --wallet-path {wallet.path}"


def _corpus(data: dict[str, Any]) -> Any:
    if data.get("class_path", "RefinedWebDataModule").rpartition(".")[2] != "RefinedWebDataModule":
        return None
    spec = get(data, "corpus")
    if spec is None:
        from hivetrain.data import EmbeddedCorpus

        return EmbeddedCorpus()
    module, _, name = str(spec["class_path"]).rpartition(".")
    options = dict(spec.get("init_args") or {})
    if name == "HubCorpus":
        options["deadline_s"] = UNIT_TIMEOUT_S - 1
    return getattr(import_module(module or "hivetrain.data"), name)(**options)
