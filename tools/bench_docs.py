"""Write a run's figures into docs/benchmarks.md, the README and docs/plots.

    python tools/bench_docs.py [bench-results]

The folder is what ``thinpool bench --output`` filled. Nothing is measured.
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
    folder = parser.parse_args().results
    report = results.read(folder / RESULTS)
    for problem in plots.draw(report, folder):
        print(problem)
    repository = Path(__file__).resolve().parent.parent
    for path in document.write(report, results=folder, repository=repository):
        print(path.relative_to(repository))


if __name__ == "__main__":
    main()
