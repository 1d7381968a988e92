"""What training stands on: files and checkpoints, downloads, the command line, CUDA graphs, processes.

Import it before torch, which starts threads that spin while they wait for each other: for a millisecond, which costs
half of the time where other programs need the processor too, and here for a thirtieth of that.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of GNU OpenMP, which torch uses on Linux; its default is 300,000
