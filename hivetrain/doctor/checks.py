"""All checks, in the order in which a person would make them."""

from contextlib import suppress
from functools import partial
from importlib import import_module

from hivetrain.doctor import machine, network, sources
from hivetrain.doctor.plan import Plan
from hivetrain.doctor.report import Check

DATA_ADVICE = "check the network, data.corpus and its manifest (hivetrain manifest makes one); a folder works offline"


def load_libraries() -> None:
    """Import what several checks need, before they run side by side: a DHT is forked, and a fork in the middle of
    another thread's import would wait for it for ever.
    """
    for name in ("torch", "hivetrain.swarm", "hivetrain.model", "hivetrain.data"):
        with suppress(ImportError):  # said by the check that needs it
            import_module(name)


def checks_of(plan: Plan) -> list[list[Check]]:
    """Two lanes that can run side by side: the network's, and the machine's with chain and data."""
    on_network = [
        Check("ports", partial(network.check_ports, plan), 3, "correct host_maddrs"),
        Check("bootstrap", partial(network.check_bootstrap, plan), 10, "check the URLs in initial_peers"),
        Check("clock", partial(network.check_clock, plan), 10, "set it by NTP: timedatectl set-ntp true"),
        Check("reachability", partial(network.check_reach, plan), 20, "mend the checks above, and ask again"),
        Check("swarm", partial(network.check_swarm, plan), 20, "check initial_peers, or start a bootstrap server"),
    ]
    on_machine = [
        Check("python", machine.check_python, 5, "install hivetrain again"),
        Check("keys", partial(sources.check_keys, plan), 5, "create one with: hivetrain keys new"),
        Check("chain", partial(sources.check_chain, plan), 12, "check the chain's address"),
        Check("torch", partial(machine.check_torch, plan), 20, "set trainer.accelerator=cpu, or mend the GPU's driver"),
        Check("memory", partial(machine.check_memory, plan), 15, "correct model.config: the model cannot be built"),
        Check("disk", partial(machine.check_disk, plan), 5, "correct checkpoint.dirpath"),
        Check("data", partial(sources.check_data, plan), 12, DATA_ADVICE),
    ]
    return [on_network, on_machine]
