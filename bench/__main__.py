"""`python -m resfuse.bench ...` is `resfuse ...`."""

import sys

from resfuse.bench.cli import main

sys.exit(main())
