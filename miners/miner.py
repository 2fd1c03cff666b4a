"""The miner: ``python miners/miner.py --config configs/miner.yaml`` is ``hivetrain fit`` on the same file."""

import sys

from hivetrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit", *sys.argv[1:]], program="miner.py"))
