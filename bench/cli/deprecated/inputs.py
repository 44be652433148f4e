"""What `resfuse.bench.inputs` was called until 0.1."""

import sys
import warnings

from resfuse.bench.measuring import photographs

warnings.warn(
    f"resfuse.bench.inputs is now {photographs.__name__}", DeprecationWarning, stacklevel=2
)
sys.modules[__name__] = photographs
