"""Write a run's figures into docs/benchmarks.md, the README and docs/plots.

    python tools/bench_docs.py [bench-results] [--apart]

The folder is what ``thinpool bench --output`` filled. Nothing is measured. With --apart the run, of
some suites, goes into its own part of docs/benchmarks.md, and the figures of the whole run stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from thinpool.bench import document, plots, results
from thinpool.bench.runner import RESULTS


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="?", default=Path("bench-results"))
    parser.add_argument("--apart", action="store_true", help="beside the whole run's figures")
    arguments = parser.parse_args()
    folder: Path = arguments.results
    report = results.read(folder / RESULTS)
    repository = Path(__file__).resolve().parent.parent
    if arguments.apart:
        written = [document.write_apart(report, repository=repository)]
    else:
        for problem in plots.draw(report, folder):
            print(problem)
        written = document.write(report, results=folder, repository=repository)
    for path in written:
        print(path.relative_to(repository))


if __name__ == "__main__":
    main()
