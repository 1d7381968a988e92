"""The machinery under training: checkpoints, downloads, the command line, graphs, processes.

Import it before torch and numpy: both read the environment once, when they start.

While torch's threads wait for each other, they spin: by default for about a millisecond, which can
double the time of a step when other programs need the processor. Here they spin for a thirtieth of
that.

With AVX-512, numpy's partition takes five times as long as with AVX2 on AMD's Zen 4. On a CPU it
chooses which weights stay. So numpy is to leave AVX-512 alone, whose name depends on its version.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "AVX512_SKX X86_V4")
