"""What `resfuse.bench.errors` was called until 0.1."""

import sys
import warnings

from resfuse.bench.common import errors

warnings.warn(f"resfuse.bench.errors is now {errors.__name__}", DeprecationWarning, stacklevel=2)
sys.modules[__name__] = errors
