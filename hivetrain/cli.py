"""The ``hivetrain`` program: finds the command, runs it, turns what went wrong into one line and an exit status.

Surprising fact: nothing heavy is imported before the command line is understood, so ``--help`` of every command
answers at once. The four Lightning commands therefore have a short help page of their own here; ``--help_all`` shows
the generated one.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

import hivetrain.commands
from hivetrain import logs
from hivetrain.doctor.mistakes import explain
from hivetrain.errors import UserError

LIGHTNING_COMMANDS = {
    "fit": "train: what a miner does",
    "validate": "loss and perplexity on the validation split",
    "test": "loss and perplexity on the test split",
    "predict": "mean loss of every block of the data",
}

LIGHTNING_HELP = """\
usage: {program} [-c CONFIG] [--KEY.SUBKEY VALUE ...]

{title}.

  -c, --config PATH         YAML configuration; several are merged, the later one wins
  --KEY.SUBKEY VALUE        override one value of it, for instance:
      --model.learning_rate 3e-4           any argument of hivetrain.model.CausalLM
      --model.config.n_layer 4             any value of the architecture's own config
      --data.block_size 1024               any argument of hivetrain.data.RefinedWebDataModule
      --trainer.precision bf16-mixed       any argument of lightning.pytorch.Trainer
      --trainer.strategy.run_id my-run     any argument of hivetrain.strategies.HivemindStrategy
      --checkpoint.every_n_epochs 10       checkpoints, in --checkpoint.dirpath
      --sample.prompt "The state"          print a continuation now and then
      --report.path report.jsonl           what this miner did, one JSON line for each swarm epoch
      --contribute.chain ledger.db         be audited and paid; --contribute=hivetrain.callbacks.ContributionPublisher
      --status.heldout_every 5             tell dashboards; --status=hivetrain.callbacks.SwarmStatus
      --metrics.port 9100                  serve Prometheus metrics, on loopback
      --energy.every_s 10                  joules, where the machine has a counter
      --stop.epochs 100                    end at this swarm epoch
  --seed_everything N       seed of all random states
  --ckpt_path PATH          resume from, or evaluate, this checkpoint

  --log-level LEVEL         debug, info (default), warning or error
  --log-format FORMAT       text (default) or json, one line for each event on stderr

  -h, --help                this page
  --help_all                every option with type and default (imports everything: takes seconds)
  --model.help [CLASS]      the options of one class; so do --data.help, --trainer.strategy.help, ...
  --print_config            the whole configuration as it would run, as YAML

Values in the YAML may refer to one another; what belongs to a class stands under its init_args:
  block_size: ${{model.init_args.config.n_positions}}
"""


def main(argv: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None takes those of the process.
        program: The name shown to the user, where that is not ``hivetrain``.

    Returns:
        The exit status: 0 done, 2 the user can mend it (one line on stderr says how), 128 + n ended by signal n.
    """
    try:
        arguments = logs.setup_from(sys.argv[1:] if argv is None else argv)
        if arguments and arguments[0] in LIGHTNING_COMMANDS:
            return _lightning(arguments[0], arguments[1:], program or f"hivetrain {arguments[0]}")
        args = _parser().parse_args(arguments)
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        logs.tell_user(program or "hivetrain", UserError(known))
        return 2


def _lightning(command: str, arguments: Sequence[str], program: str) -> int:
    if {"-h", "--help"} & set(arguments):
        title = LIGHTNING_COMMANDS[command].capitalize()
        sys.stdout.write(LIGHTNING_HELP.format(program=program, title=title))
        return 0
    from hivetrain.fit_cli import run

    return run(command, ["--help" if argument == "--help_all" else argument for argument in arguments])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hivetrain", description="Train one language model on many machines that do not trust each other."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=text)  # only for the list: main() dispatches these itself
    for module in sorted(iter_modules(hivetrain.commands.__path__), key=lambda found: found.name):
        command = import_module(f"hivetrain.commands.{module.name}")
        subparser = commands.add_parser(module.name.replace("_", "-"), help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        logs.add_arguments(subparser)  # for the help page: main() has taken them out by now
        subparser.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
