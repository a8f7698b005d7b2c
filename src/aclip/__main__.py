"""`python -m aclip`, which is what torchrun starts."""

import sys

from aclip.cli import main

sys.exit(main())
