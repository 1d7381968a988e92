"""The machinery under training: checkpoints, downloads, the command line, graphs, processes.

Import it before torch and numpy: both read the environment once, when they start.

While torch's threads wait for each other, they spin: by default for about a millisecond, which can
double the time of a step when other programs need the processor. Here they spin for a thirtieth of
that.

On a CPU, numpy's partition finds the thresholds of the masks. On AMD's Zen 4 it is five times
slower with AVX-512 than with AVX2. So AVX-512 is switched off. Its name depends on numpy's version.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "AVX512_SKX X86_V4")
