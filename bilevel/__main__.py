"""`python -m bilevel`: the same command as `bilevel`."""

import sys

from bilevel.cli.app import main

sys.exit(main())
