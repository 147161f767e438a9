"""`python -m layertap.cli` is the command `layertap`."""

import sys

from layertap.cli import main

sys.exit(main())
