"""What an audited miner may not do, because nobody could replay it.

Surprising fact: dropout is looked for in every module's attributes rather than by class, since architectures keep it in
configs, in ``nn.Dropout``, and in plain floats that they pass to functions.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer

from hivetrain.contribution.audit import TOLERANCES
from hivetrain.errors import UserError

_DATA_NEEDS = ("assignment", "batch_size", "consumed_addresses", "cursor", "slot")


def check_replayable(trainer: Trainer, module: torch.nn.Module) -> None:
    """Refuses what makes a microbatch's gradient another one when a validator computes it again.

    Raises:
        UserError: names the place and what to do.
    """
    strategy: Any = trainer.strategy
    if not hasattr(strategy, "watchers"):
        raise UserError(
            f"contribute needs a strategy that trains in a swarm, got {type(strategy).__name__}: "
            "set trainer.strategy to HivemindStrategy, or remove contribute"
        )
    if strategy.overlap:
        raise UserError(
            "an audited miner's work must be replayable: set overlap to false, since it mixes gradients of two params"
        )
    if trainer.precision not in TOLERANCES:
        raise UserError(
            f"an audited miner's work must be replayable: there is no tolerance for precision {trainer.precision!r}; "
            f"use {' or '.join(map(repr, TOLERANCES))}"
        )
    check_data(strategy, getattr(trainer, "datamodule", None))
    check_dropout(module)


def check_data(strategy: Any, data: Any) -> None:
    """Refuses data whose blocks have no public address."""
    if data is None or not all(hasattr(type(data), name) or hasattr(data, name) for name in _DATA_NEEDS):
        got = "none" if data is None else type(data).__name__
        raise UserError(
            f"an audited miner's work must be replayable: it needs a data module that tells where each block comes "
            f"from, such as RefinedWebDataModule; got {got}"
        )
    if strategy.batch_size not in (None, data.batch_size):
        raise UserError(
            f"trainer.strategy.batch_size is {strategy.batch_size}, but a microbatch has {data.batch_size} blocks: "
            "leave it out"
        )


def check_dropout(module: torch.nn.Module) -> None:
    """Refuses a module with dropout, or with anything of that name, other than 0."""
    found = [f"{place} = {value:g}" for place, value in _dropouts(module)]
    if found:
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"an audited miner's work must be replayable: set dropout to 0 ({found[0]}{others})")


def _dropouts(module: torch.nn.Module) -> Iterator[tuple[str, float]]:
    seen: set[int] = set()
    for name, part in module.named_modules():
        values = {key: value for key, value in vars(part).items() if "drop" in key.lower()}
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            values["p"] = part.p
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "__dict__") and id(config) not in seen:
            seen.add(id(config))
            values |= {f"config.{key}": value for key, value in vars(config).items() if "drop" in key.lower()}
        for key, value in values.items():
            if type(value) in (int, float) and value > 0:
                yield ".".join(filter(None, (name, key))), value
