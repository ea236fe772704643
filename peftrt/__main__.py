"""``python -m peftrt`` is the ``peftrt`` command."""

from __future__ import annotations

import sys

from peftrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
