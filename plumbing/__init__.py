"""What training stands on: files and checkpoints, downloads, the command line, CUDA graphs, processes.

Import it before torch, whose threads spin while they wait for each other: by default for about a millisecond, which
can double a step's time when other programs need the processor. Here it is a thirtieth of that.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault(
        "GOMP_SPINCOUNT", "10000"
    )  # of GNU OpenMP, torch's on Linux; its default is 300,000
