"""``hivetrain manifest``: list the units of a data set, so that its data has a name."""

import argparse

HELP = "build the manifest of a data set: its files, row groups and hashes, whose digest names the data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Builds the manifest of a data set on the hub, at a pinned commit, or of a folder. Can be interrupted: a "
        "second call with the same --out goes on where the first ended. No parquet data is downloaded, only footers."
    )
    parser.add_argument("source", help="owner/name on the hub, or a folder of parquet, jsonl or txt files")
    parser.add_argument("--revision", default="", help="the commit, 40 hexadecimal digits; needed for the hub")
    parser.add_argument("--out", default="manifest.json", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--config", help="configuration (subset), where the data set has several")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--content-key", default="content", help="column that holds the text (default: %(default)s)")
    parser.add_argument(
        "--heldout-units", type=int, default=0, metavar="N", help="units at the end kept for validation (default: 0)"
    )
    parser.add_argument(
        "--rows-per-unit", type=int, default=500, metavar="N", help="where there are no row groups (default: 500)"
    )
    parser.add_argument(
        "--requests-per-minute",
        type=int,
        default=300,
        metavar="N",
        help="pace on the hub, which allows 600 to users who are not logged in (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from hivetrain.data.folder import manifest_of_folder
    from hivetrain.data.hub_manifest import default_download_dir, manifest_of_hub
    from hivetrain.data.progress import progress
    from hivetrain.errors import UserError

    if min(args.rows_per_unit, args.requests_per_minute) < 1 or args.heldout_units < 0:
        raise UserError("--rows-per-unit and --requests-per-minute must be at least 1, --heldout-units at least 0")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    journal = out.with_name(out.name + ".journal")
    with progress("files") as on_file:
        if Path(args.source).is_dir():
            manifest = manifest_of_folder(
                args.source,
                content_key=args.content_key,
                rows_per_unit=args.rows_per_unit,
                heldout_units=args.heldout_units,
                on_file=on_file,
                journal_path=journal,
            )
        else:
            manifest = manifest_of_hub(
                args.source,
                args.revision,
                config=args.config,
                split=args.split,
                content_key=args.content_key,
                heldout_units=args.heldout_units,
                rows_per_unit=args.rows_per_unit,
                requests_per_minute=args.requests_per_minute,
                download_dir=default_download_dir(),
                on_file=on_file,
                journal_path=journal,
            )
    manifest.save(out)
    print(f"{out}: {len(manifest.files)} files, {manifest.n_units} units, digest {manifest.digest}")
    return 0
