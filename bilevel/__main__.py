"""`python -m bilevel`: the same command as `bilevel`."""

import sys

from bilevel.app import main

sys.exit(main())
