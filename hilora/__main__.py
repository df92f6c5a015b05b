"""`python -m hilora`: the command `hilora`."""

import sys

from hilora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
