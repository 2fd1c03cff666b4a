"""The validator: ``python validators/validator.py --config configs/validator.yaml``, that is ``hivetrain score``."""

import sys

from hivetrain.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]], program="validator.py"))
