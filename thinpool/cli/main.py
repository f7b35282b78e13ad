"""The entry point: answers ``--version`` before anything is imported, then hands over."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line with this process's arguments, and exit."""
    try:
        if sys.argv[1:] == ["--version"]:
            from thinpool import __version__

            sys.stdout.write(f"thinpool {__version__}\n")
            sys.exit(0)
        from thinpool.cli.app import run as run_app

        run_app(sys.argv[1:])
    except KeyboardInterrupt:  # before the signals are caught, or after
        import os

        os._exit(130)
