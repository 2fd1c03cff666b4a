"""Lightning's commands: YAML and dot overrides in, a running Trainer out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from omegaconf.errors import OmegaConfBaseException

from hivetrain.callbacks import (
    ContributionPublisher,
    EnergyUse,
    GenerationSample,
    MinerReport,
    StopAtSwarmEpoch,
    SwarmCheckpoint,
    SwarmMetrics,
    SwarmProgress,
    SwarmStatus,
)
from hivetrain.config_errors import describe
from hivetrain.ending import exit_status, orderly_end
from hivetrain.errors import UserError

DEFAULTS = {"model": "hivetrain.model.CausalLM", "data": "hivetrain.data.RefinedWebDataModule"}
# Where keys lie, and keys: these options stay out of what is saved for others to read.
PRIVATE = ("identity_path", "wallet_path", "credentials_file", "identity_token_file", "api_key", "password")
CALLBACKS: dict[str, type[Callback]] = {
    "stop": StopAtSwarmEpoch,
    "checkpoint": SwarmCheckpoint,
    "sample": GenerationSample,
    "report": MinerReport,
    "contribute": ContributionPublisher,
    "metrics": SwarmMetrics,
    "energy": EnergyUse,
    "progress": SwarmProgress,
    "status": SwarmStatus,
}


class HiveArgumentParser(LightningArgumentParser):
    """Reports a mistake as one line that names the key and its place, instead of a usage page."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what ``run`` turns into a UserError."""
        raise ConfigError(message) from ex


class SaveConfig(SaveConfigCallback):
    """Keeps the configuration beside the logs, but not where keys lie; without a logger nothing is written."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it once, over that of an earlier run."""
        if trainer.loggers:
            self.config = _without_private(self.config)
            super().setup(trainer, pl_module, stage)


class HiveCLI(LightningCLI):
    """LightningCLI with CausalLM and RefinedWebDataModule as defaults and a key for each of our callbacks.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: What follows the command on the command line.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        # Plain "omegaconf" resolves references before the overrides arrive; "+" does it after, and these settings make
        # ${model.x} mean the same inside a subcommand.
        self._command = command
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=HiveArgumentParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "hivetrain"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            # As arguments rather than as defaults, whose values would stay when another class is chosen.
            args=[command, *(f"--{key}={default}" for key, default in DEFAULTS.items()), *arguments],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static
        """The one command: building the options of all four takes four times as long."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments; Lightning's own method warns that they do not come from ``sys.argv``."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a key for each callback."""
        for key, callback in CALLBACKS.items():
            default = {"class_path": "hivetrain.callbacks.SwarmProgress"} if key == "progress" else None
            parser.add_argument(f"--{key}", type=callback | None, default=default)

    def before_instantiate_classes(self) -> None:
        """Miss a checkpoint before anything is built for it."""
        path = self._get(self.config, "ckpt_path")
        if path and path not in ("best", "last", "hpc") and ":" not in str(path) and not Path(path).exists():
            raise UserError(f"--ckpt_path: there is no checkpoint {path}")

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is a mistake in the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            raise _user_error(error) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer with the chosen callbacks."""
        config = self._get(self.config_init, "trainer")
        chosen = [self._get(self.config_init, key) for key in CALLBACKS]
        if config["enable_progress_bar"] is False:
            chosen = [callback for callback in chosen if not isinstance(callback, SwarmProgress)]
        own = config["callbacks"] or []
        own = own if isinstance(own, list) else [own]
        callbacks = [*own, *(callback for callback in chosen if callback is not None)]
        if config["enable_checkpointing"] is None:  # nothing is written that nobody asked for
            kwargs["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of Lightning's commands and return the exit status.

    Raises:
        UserError: If the configuration cannot be read, or what it asks for cannot be done.
    """
    with orderly_end() as received:
        try:
            HiveCLI(command, arguments)
        except ConfigError as error:
            raise UserError(describe(str(error), arguments)) from error
        except OmegaConfBaseException as error:
            key = str(error.full_key or "").removeprefix(f"{command}.")
            hint = " (what belongs to a class stands under its init_args: ${model.init_args.x})"
            raise UserError(f"{key}: {str(error).partition(chr(10))[0]}{hint}") from error
        except MisconfigurationException as error:
            raise _user_error(error) from error
        except (SystemExit, KeyboardInterrupt) as end:
            return exit_status(end, received)
    return 0


class ConfigError(UserError):
    """The parser's own words, still to be put into one clear line."""


def _without_private(config: Namespace) -> Namespace:
    """A copy for others to read: those options are left out, so that it can still be run."""
    shown = config.clone()
    for key in [key for key, _ in shown.items() if key.rpartition(".")[2] in PRIVATE]:
        del shown[key]
    return shown


def _user_error(error: BaseException) -> UserError:
    """The UserError that a library wrapped on its way up, or the library's message on one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return UserError(str(cause))
        cause = cause.__cause__ or cause.__context__
    return UserError(" ".join(str(error).split()))
