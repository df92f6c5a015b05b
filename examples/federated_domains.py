"""Root, cluster and leaf adapters across federated clients whose images are of different domains, as in PACS.

The same as `hilora domains`, for a clone that is not installed; `--help` says the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hilora.cli.domains import main

if __name__ == "__main__":
    sys.exit(main(prog=f"python examples/{Path(__file__).name}"))
