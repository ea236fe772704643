"""``python -m bench``: draw the tables and plots again from stored results, without measuring."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import report, results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of results; default: %(default)s")
    folders = sorted(path.parent for path in parser.parse_args().results.glob("*/*.json"))
    for folder in dict.fromkeys(folders):
        print(report.draw(folder))
    if not folders:
        parser.error("no results there; `pytest --benchmark` measures some")


if __name__ == "__main__":
    main()
