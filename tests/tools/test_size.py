"""tools/ stays small and airy."""

import ast

from house import ROOT, python_files

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
# Load, Store and Del only say how a name is used.
USES = (ast.Load, ast.Store, ast.Del)


def test_the_tools_are_small_and_airy():
    lines = nodes = statements = comprehensions = 0
    for path in python_files(ROOT / "tools"):
        text = path.read_text()
        lines += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            nodes += not isinstance(node, USES)
            statements += isinstance(node, ast.stmt)
            comprehensions += isinstance(node, COMPREHENSIONS)
    assert nodes <= 9460
    assert nodes / statements <= 7.8
    assert 100 * comprehensions / lines <= 4
