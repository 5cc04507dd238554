"""``python -m cpattn``."""

import sys

from cpattn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
