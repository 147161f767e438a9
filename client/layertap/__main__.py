"""`python -m layertap` is the command `layertap`."""

import sys

from layertap.cli import main

sys.exit(main())
