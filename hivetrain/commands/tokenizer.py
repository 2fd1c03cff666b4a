"""``hivetrain tokenizer train``: a byte-level BPE of one's own."""

import argparse

HELP = "train a byte-level BPE tokenizer on a corpus"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    train = actions.add_parser("train", help=HELP, description=f"{HELP.capitalize()}; held-out units are not read.")
    train.add_argument(
        "corpus",
        nargs="?",
        default="embedded",
        help="embedded (default), a folder of parquet, jsonl or txt files, or owner/name on the hub",
    )
    train.add_argument("--vocabulary-size", type=int, default=4096, metavar="N", help="default: %(default)s")
    train.add_argument("--out", default="tokenizer.json", metavar="FILE", help="default: %(default)s")
    train.add_argument("--manifest", metavar="FILE", help="manifest of the corpus; built on the fly where missing")
    train.add_argument("--revision", default="", help="the commit, 40 hexadecimal digits; needed for the hub")
    train.add_argument("--config", help="configuration (subset) on the hub, where the data set has several")
    train.add_argument("--content-key", default="content", help="column that holds the text (default: %(default)s)")
    train.add_argument("--max-units", type=int, metavar="N", help="read only the first N units")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from hivetrain.data import Corpus, EmbeddedCorpus, FolderCorpus, HubCorpus
    from hivetrain.data.bpe import train_bpe
    from hivetrain.data.progress import progress
    from hivetrain.errors import UserError

    if args.max_units is not None and args.max_units < 1:
        raise UserError(f"--max-units must be at least 1, not {args.max_units}")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    corpus: Corpus
    if args.corpus == "embedded":
        corpus = EmbeddedCorpus()
    elif Path(args.corpus).is_dir():
        corpus = FolderCorpus(args.corpus, manifest=args.manifest, content_key=args.content_key)
    else:
        corpus = HubCorpus(args.corpus, args.revision, args.manifest, args.config, content_key=args.content_key)
    with progress("units") as on_unit:
        train_bpe(corpus, args.vocabulary_size, out, max_units=args.max_units, on_unit=on_unit)
    print(f"{out}: {args.vocabulary_size} ids, for RefinedWebDataModule(tokenizer={str(out)!r})")
    return 0
