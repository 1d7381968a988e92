"""The machinery under training: checkpoints, downloads, the command line, graphs, processes.

Import it before torch. While torch's threads wait for each other, they spin: by default for about a
millisecond, which can double the time of a step when other programs need the processor. Here they
spin for a thirtieth of that.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
