"""`python -m autoclip.core`: the command `autoclip`, where scripts are not on the path."""

import sys

from autoclip.core.inspect._command import main

if __name__ == "__main__":
    sys.exit(main())
