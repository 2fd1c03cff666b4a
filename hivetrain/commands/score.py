"""``hivetrain score``: run a validator."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hivetrain.chain.base import Chain, Snapshot

HELP = "run a validator: follow a run, audit its miners, set weights"

_PAGE = """\
usage: {program} [-c CONFIG] [--KEY.SUBKEY VALUE ...]

Run a validator: follow a run, audit its miners, set weights.

  -c, --config PATH         YAML configuration; several are merged, the later one wins
  --KEY.SUBKEY VALUE        override one value of it, for instance:
      --state validator.db              file that keeps records, verdicts and scores
      --chain.address ledger.db         any option of the chain: address, wallet, hotkey, wallet_path, timeout_s
      --run.initial_peers URL           any option of the run to follow: run_id, target_batch_size, device, ...
      --model.config.n_layer 4          the miners' model
      --data.block_size 1024            the miners' data
      --rules.probability 0.25          the miners' audit rules
      --replay.device cuda:0            how drawn microbatches are replayed: device, precision, rows, most_rows
      --scoring.alpha 0.5               from verdicts to weights; the same for all validators of a run

      --metrics.port 9101               serve Prometheus metrics, on loopback

  --log-level LEVEL         debug, info (default), warning or error
  --log-format FORMAT       text (default) or json, one line for each event on stderr

  -h, --help                this page
  --help_all                every option with type and default (imports everything: takes seconds)
  --model.help [CLASS]      the options of one class; so does --data.help
  --print_config            the whole configuration as it would run, as YAML
"""
_DEFAULTS = ("--model=hivetrain.model.CausalLM", "--data=hivetrain.data.RefinedWebDataModule")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def take_all(
        arguments: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        return argparse.Namespace(run=run, arguments=list(arguments or ())), []

    # The options are those of the classes that the configuration names: for jsonargparse, once they may be imported.
    parser.parse_known_args = take_all  # type: ignore[assignment, method-assign]


def run(args: argparse.Namespace) -> int:
    arguments: list[str] = args.arguments
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_PAGE.format(program="hivetrain score"))
        return 0
    from hivetrain.ending import exit_status, orderly_end

    with orderly_end() as received:
        try:
            _score(parse(["--help" if argument == "--help_all" else argument for argument in arguments]))
        except (SystemExit, KeyboardInterrupt) as end:
            return exit_status(end, received)
    return 0


def parse(arguments: Sequence[str]) -> Any:
    """The configuration with everything that it names built; nothing is opened.

    Raises:
        UserError: it is wrong.
    """
    from jsonargparse import ActionConfigFile, set_parsing_settings  # type: ignore[attr-defined]
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule
    from omegaconf.errors import OmegaConfBaseException

    from hivetrain.config_errors import describe
    from hivetrain.contribution.rules import AuditRules
    from hivetrain.errors import UserError
    from hivetrain.fit_cli import ConfigError, HiveArgumentParser
    from hivetrain.validator.config import ChainOptions, MetricsOptions, ReplayOptions, RunOptions, ScoringOptions

    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    parser = HiveArgumentParser(prog="hivetrain score", parser_mode="omegaconf+", description=HELP)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="configuration file, YAML")
    parser.add_argument("--state", default="validator.db", help="file that keeps records, verdicts and scores")
    for key, options in {
        "run": RunOptions,
        "chain": ChainOptions,
        "rules": AuditRules,
        "replay": ReplayOptions,
        "scoring": ScoringOptions,
        "metrics": MetricsOptions,
    }.items():
        parser.add_class_arguments(options, key)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    try:
        return parser.instantiate_classes(parser.parse_args([*_DEFAULTS, *arguments]))
    except ConfigError as error:
        message = str(error)
        told = describe(message, arguments) if message.startswith("Parser key") else " ".join(message.split())
        raise UserError(told) from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).partition(chr(10))[0]}") from error
    except (ValueError, MisconfigurationException) as error:
        raise UserError(" ".join(str(error).split())) from error


def _score(config: Any) -> None:
    """Open everything, validate until a signal comes, close everything."""
    import threading
    from contextlib import ExitStack
    from pathlib import Path

    from hivetrain.callbacks.replayable import check_dropout
    from hivetrain.chain.address import open_chain
    from hivetrain.contribution.audit import Verdict
    from hivetrain.data.reader import SlotReader
    from hivetrain.keys import Wallet
    from hivetrain.metrics.server import MetricsServer, new_registry
    from hivetrain.metrics.validator import ValidatorMetrics
    from hivetrain.validator.auditor import Auditor
    from hivetrain.validator.bulletin import Bulletin
    from hivetrain.validator.following import FollowedSwarm
    from hivetrain.validator.intake import Admission
    from hivetrain.validator.schema import Database
    from hivetrain.validator.state import State
    from hivetrain.validator.tempos import Status
    from hivetrain.validator.validator import Validator
    from hivetrain.validator.watch import ValidatorWatcher, Watchers

    run, replay, scoring = config.run, config.replay, config.scoring
    check_dropout(config.model)
    hotkey = Wallet(config.chain.wallet, config.chain.hotkey, config.chain.wallet_path).load()
    with ExitStack() as opened:
        chain = opened.enter_context(open_chain(config.chain.address, hotkey))
        view = _look(chain, config.chain.timeout_s, scoring.submit_margin)
        watchers: list[ValidatorWatcher] = []
        if config.metrics.port is not None:
            registry = new_registry("validator")
            opened.enter_context(MetricsServer(config.metrics.port, config.metrics.host, registry))
            metrics = ValidatorMetrics(registry, Verdict, Status)
            neuron = view.neuron(hotkey.address)
            metrics.began(run.run_id, hotkey.address, None if neuron is None else neuron.uid)
            watchers.append(metrics)
        state = State(Database(config.state))
        opened.callback(state.close)
        state.open(run_id=run.run_id, hotkey=hotkey.address)
        most_samples = scoring.most_targets * run.target_batch_size
        reader = SlotReader.of(config.data, max_offset=2 * most_samples + replay.most_rows)
        admission = Admission(run.run_id, config.rules, reader.assignment.n_slots, most_samples, replay.most_rows)
        followed = FollowedSwarm(run, config.model.to(run.device), Path(f"{state.database.path}.epochs"))
        opened.callback(followed.close)
        followed.open()
        auditor = Auditor(
            run.run_id, config.model, followed.trainable_params, reader,
            run.compression, replay.device, replay.precision, replay.rows,
        )  # fmt: skip
        tempo_s = view.tempo * view.rules.block_time_s
        watchers.append(Bulletin(run.run_id, hotkey, followed.publish, lifetime_s=3 * tempo_s))
        validator = Validator(
            chain, followed, state, admission, auditor, scoring, config.chain.timeout_s, watcher=Watchers(watchers)
        )
        validator.run_forever(threading.Event().wait)


def _look(chain: "Chain", timeout_s: float, submit_margin: int | None) -> "Snapshot":
    """The chain as it is now. Refuses one that cannot work, before anything is joined; waits for a silent one."""
    import threading
    import time

    from hivetrain.chain.base import Code, LedgerError
    from hivetrain.errors import UserError
    from hivetrain.validator.tempos import margin_of

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            view = chain.snapshot(max(1.0, deadline - time.monotonic()))
            margin_of(view, submit_margin)
            break
        except LedgerError as error:
            if error.code is not Code.UNREACHABLE or time.monotonic() + 1 > deadline:
                raise UserError(f"chain.address: {error}") from error
            threading.Event().wait(1)
    if view.neuron(chain.hotkey) is None:
        raise UserError(f"hotkey {chain.hotkey} is not registered: hivetrain chain register --chain ... --wallet ...")
    return view
