"""``python -m gradsharding`` is ``gradsharding``."""

import sys

from gradsharding.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
