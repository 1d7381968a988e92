"""What stands beside the method: its rivals, P-pruning, SQuAD. Each module adds its rows to METHODS or TASKS.

Delete this folder, tools/, and the `import extras` lines of train.py and eval.py: what remains is SMP.
"""

from extras import pprune, rivals, squad  # noqa: F401
