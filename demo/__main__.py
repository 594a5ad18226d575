"""`make demo`: start the application on the demo model, take a tour of it over HTTP, shut it down."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from demo.server import Server
from demo.tour import Tour

IMAGES = Path(__file__).parent / "images"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--image", type=Path, default=IMAGES / "red_circle.png", help="ask about this one")
    parser.add_argument("--question", default="What colour is the shape?")
    arguments = parser.parse_args()
    console = Console(width=110)
    with Server(console) as server:
        Tour(console, server.url, arguments.image, arguments.question).run()
    console.print("[green]Shut down.[/green] Next: [bold]make serve[/bold], and the README's examples.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
