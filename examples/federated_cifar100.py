"""Root, cluster and leaf adapters across federated clients with CIFAR-100, a folder of images, or generated glyphs.

The same as `hilora train`, for a clone that is not installed; `--help` says the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hilora.cli.train import main

if __name__ == "__main__":
    sys.exit(main(prog=f"python examples/{Path(__file__).name}"))
