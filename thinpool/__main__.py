"""``python -m thinpool`` is the command line."""

from __future__ import annotations

from thinpool.cli.main import run

if __name__ == "__main__":
    run()
