"""Check answers to the programming exercises of EXERCISES.md, and say in words what is wrong.

    python exercises/check.py 3 my_mask.py
    python exercises/check.py --json results.json 2 3 4 6 7 9 FOLDER

The second form grades a folder of answers with the file names from EXERCISES.md, and writes the
results for Gradescope's autograder.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Exercise(NamedTuple):
    function: str  # the function that the student writes
    file: str  # the file name for handing it in
    points: int


EXERCISES = {
    2: Exercise("density_at", "schedule.py", 5),
    3: Exercise("top_v", "top_v.py", 15),
    4: Exercise("score_gradient", "score_gradient.py", 20),
    6: Exercise("rank", "rank.py", 20),
    7: Exercise("two_of_four", "two_of_four.py", 15),
    9: Exercise("dead_neurons", "dead_neurons.py", 25),
}


def run(function, path, args):
    """Run an answer in a process of its own -> "right", or what is wrong."""
    answer = Path(__file__).with_name("answer.py")
    prints = None  # what the answer prints goes to the terminal
    if args.json:
        prints = subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder, "verdict")
        command = [sys.executable, answer, function, path, str(args.seed), verdict]
        try:
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=prints, timeout=args.seconds
            )
        except subprocess.TimeoutExpired:
            return f"not yet: no result after {args.seconds} seconds; does a loop never end?"
        # A crash or an exit() leaves no verdict.
        if not verdict.exists():
            return f"not yet: Python ended with status {ended.returncode} before all cases were run"
        return verdict.read_text("utf-8")


def grade(number, args):
    """Grade an answer -> an entry of Gradescope's results: all points or none, and the reason."""
    exercise = EXERCISES[number]
    path = args.path
    if path.is_dir():
        path = path / exercise.file
    output = f"not yet: there is no file {path.name}"
    if path.is_file():
        output = run(exercise.function, path, args)
    score = 0
    if output == "right":
        score = exercise.points
    return {
        "name": f"{number}. {exercise.function}",
        "score": score,
        "max_score": exercise.points,
        "output": output,
    }


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Check answers to programming exercises of EXERCISES.md."
    )
    add = parser.add_argument
    add("exercises", type=int, nargs="+", choices=EXERCISES, help="their numbers")
    add("path", type=Path, help="the answer, or a folder of answers")
    add("--json", type=Path, metavar="RESULTS", help="write this file for Gradescope")
    add("--seed", type=int, default=random.randrange(10**6), help="of the cases; else a new one")
    add("--seconds", type=int, default=60, help="for each answer; importing torch takes some (60)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    tests = []
    for number in args.exercises:
        test = grade(number, args)
        tests.append(test)
        points = f"{test['score']} of {test['max_score']} points"
        print(f"{test['name']} ({points}): {test['output']}", flush=True)
    note = f"--seed {args.seed} repeats these cases"
    print(note)

    if args.json:
        args.json.write_text(json.dumps({"output": note, "tests": tests}, indent=1))
        return 0
    for test in tests:
        if test["output"] != "right":
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
