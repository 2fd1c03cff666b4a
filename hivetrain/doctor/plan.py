"""What a configuration asks of a machine, read from the files that miners and validators start with.

Surprising fact: the files are read as they are, not through the programs' parsers, because a doctor must also answer
for a configuration that the program refuses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hivetrain.errors import UserError
from hivetrain.keys import DEFAULT_WALLET_PATH, Wallet

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@dataclass(frozen=True)
class Plan:
    """What is to run here.

    Args:
        is_validator: the configuration is a validator's.
        run_id: the run; None if no configuration names one.
        initial_peers: where to join.
        host_maddrs: where to listen.
        announce_maddrs: what to announce instead.
        client_mode: not to be dialled.
        use_auto_relay: to be reached through a relay where it cannot be dialled.
        identity_path: key file of the peer id.
        device: ``auto``, ``cpu``, ``gpu``, ``cuda:0``, ...
        precision: as Lightning names it.
        model: ``class_path`` and ``init_args``; None without a configuration.
        data: the same.
        chain: address of the chain; None if there is none.
        wallet: who acts on it.
        checkpoint_dir: where checkpoints go; None if none are kept.
        keep: how many of them.
    """

    is_validator: bool = False
    run_id: str | None = None
    initial_peers: list[str] | str | None = None
    host_maddrs: tuple[str, ...] = LOOPBACK
    announce_maddrs: tuple[str, ...] = ()
    client_mode: bool = False
    use_auto_relay: bool = False
    identity_path: str | None = None
    device: str = "auto"
    precision: str = "32-true"
    model: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    chain: str | None = None
    wallet: Wallet = Wallet()
    checkpoint_dir: str | None = None
    keep: int = 2


def read_plan(configs: Sequence[str], overrides: Sequence[str] = ()) -> Plan:
    """Merge configurations, the later one wins, and values such as ``trainer.strategy.run_id=mine``.

    Raises:
        UserError: a file cannot be read or makes no sense.
    """
    merged: dict[str, Any] = {}
    for path in configs:
        merged = _merge(merged, _load(path))
    for override in overrides:
        key, separator, value = override.removeprefix("--").partition("=")
        if not separator:
            raise UserError(f"{override!r} is no KEY=VALUE, such as trainer.strategy.run_id=mine")
        merged = _merge(merged, _nested(merged, key.split("."), _value(key, value)))
    try:
        settings = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return _plan(settings)


def get(settings: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key, whether or not an ``init_args`` stands on the way."""
    for part in key.split("."):
        if isinstance(settings, dict) and part not in settings:
            settings = settings.get("init_args")
        settings = settings.get(part) if isinstance(settings, dict) else None
    return default if settings is None else settings


def _plan(settings: Any) -> Plan:
    is_validator = isinstance(settings, dict) and "run" in settings and "trainer" not in settings
    swarm, chain = ("run", "chain") if is_validator else ("trainer.strategy", "contribute")
    return Plan(
        is_validator=is_validator,
        run_id=get(settings, f"{swarm}.run_id", "hivetrain" if settings else None),
        initial_peers=get(settings, f"{swarm}.initial_peers"),
        host_maddrs=_list(get(settings, f"{swarm}.host_maddrs")) or LOOPBACK,
        announce_maddrs=_list(get(settings, f"{swarm}.announce_maddrs")),
        client_mode=bool(get(settings, f"{swarm}.client_mode", is_validator)),
        use_auto_relay=bool(get(settings, f"{swarm}.use_auto_relay")),
        identity_path=get(settings, f"{swarm}.identity_path"),
        device=str(get(settings, "replay.device" if is_validator else "trainer.accelerator", "auto")),
        precision=str(get(settings, "replay.precision" if is_validator else "trainer.precision", "32-true")),
        model=get(settings, "model"),
        data=get(settings, "data"),
        chain=get(settings, f"{chain}.address" if is_validator else f"{chain}.chain"),
        wallet=Wallet(
            str(get(settings, f"{chain}.wallet", "default")),
            str(get(settings, f"{chain}.hotkey", "default")),
            str(get(settings, f"{chain}.wallet_path", DEFAULT_WALLET_PATH)),
        ),
        checkpoint_dir=get(settings, "checkpoint.dirpath", "checkpoints" if get(settings, "checkpoint") else None),
        keep=int(get(settings, "checkpoint.keep", 2)),
    )


def _load(path: str) -> dict[str, Any]:
    try:
        found = OmegaConf.to_container(OmegaConf.load(Path(path)))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings")
    return {str(key): value for key, value in found.items()}


def _value(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text) if not text.startswith("${") else text
    except yaml.YAMLError as error:
        raise UserError(f"{key}: {text!r} is no value") from error


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merge(below.get(key), value) for key, value in above.items()}}


def _nested(settings: Any, parts: Sequence[str], value: Any) -> Any:
    """``value`` under the keys; what belongs to a class goes under its init_args, as on the command line."""
    if not parts:
        return value
    if isinstance(settings, dict) and "class_path" in settings and parts[0] not in ("class_path", "init_args"):
        parts = ["init_args", *parts]
    below = settings.get(parts[0]) if isinstance(settings, dict) else None
    return {parts[0]: _nested(below, parts[1:], value)}


def _list(value: Any) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value or []
    return tuple(part.strip() for entry in entries for part in str(entry).split(",") if part.strip())
