"""Files altered at random, and what a command must then do, see `survives` in conftest.py."""

import json
import os
import random

TIMES = int(os.environ.get("FUZZ", 25))  # alterations of each file; .ci/run asks for 150
HOSTILE = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), "", "x",
    "../../x", "/etc/passwd", "\0", "y" * 5000,
    [], {}, [[]], {"a": {}}, [1e9] * 3, "bfloat16", "movies", "\ud800",
]  # fmt: skip


def altered_bytes(content, rng):
    """Flip, cut, insert, repeat or drop a little of it, once or a few times."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 10])):
        at, length = rng.randrange(len(content) + 1), rng.choice([1, 1, 4, 64])
        kind = rng.choice(["flip", "flip", "cut", "insert", "repeat", "drop"])
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = rng.choice(
                [rng.randbytes(length), b"\n" * length, b"\t" * length, b"[" * 5000]
            )
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        else:
            del content[at : at + length]
    return bytes(content)


def altered_json(value, rng):
    """The same with one value replaced, dropped or renamed, at any depth."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if rng.random() < 0.15:
            changed = copy.pop(key)
            if isinstance(copy, dict) and rng.random() < 0.3:
                copy[str(key) + "x"] = changed
        else:
            copy[key] = altered_json(copy[key], rng)
        return copy
    return rng.choice(HOSTILE)


def altered(content, rng):
    """Bytes of a JSON file or any other -> altered ones."""
    if content[:1] == b"{" and rng.random() < 0.7:
        return json.dumps(altered_json(json.loads(content), rng)).encode()
    return altered_bytes(content, rng)


def fuzz(path, survives, command, seed=0):
    """Alter a file TIMES times. Both outcomes must occur, or the test shows nothing."""
    whole, rng, outcomes = path.read_bytes(), random.Random(seed), []
    for _ in range(TIMES):
        path.write_bytes(altered(whole, rng))
        outcomes.append(survives(command))
    path.write_bytes(whole)
    assert survives(command) is None and any(outcomes)
    return outcomes


def altered_line(content, rng):
    """One line of JSON lines altered."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = altered(lines[at], rng)
    return b"\n".join(lines)


def fuzz_lines(path, survives, command):
    whole, rng, outcomes = path.read_bytes(), random.Random(0), []
    for _ in range(TIMES):
        path.write_bytes(altered_line(whole, rng))
        outcomes.append(survives(command))
    assert None in outcomes and any(outcomes)
