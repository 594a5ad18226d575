"""`python -m tests.checkpoints FAMILY DIR` writes a checkpoint; without arguments it lists the families."""

import argparse
from pathlib import Path

from tests.checkpoints import CHECKPOINTS, FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints", description=__doc__)
    parser.add_argument("family", nargs="?", choices=FAMILIES)
    parser.add_argument("folder", nargs="?", type=Path)
    arguments = parser.parse_args()
    if arguments.family is None or arguments.folder is None:
        print("\n".join(FAMILIES))
    else:
        CHECKPOINTS[arguments.family].write(arguments.folder)


if __name__ == "__main__":
    main()
