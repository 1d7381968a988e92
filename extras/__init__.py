"""Further methods and tasks, beside SMP. Each file here adds its rows to METHODS or TASKS.

A file of your own in this folder is imported too. To keep SMP alone, delete this folder, tools/,
and the `import extras` lines of train.py and eval.py.
"""

from importlib import import_module
from pkgutil import iter_modules

for module in iter_modules(__path__):
    import_module(f"extras.{module.name}")
