"""Check answers to the programming exercises of EXERCISES.md, and say in words what is wrong.

    python exercises/check.py 3 my_mask.py
    python exercises/check.py --json results.json 2 3 4 6 7 9 FOLDER

The second form grades a folder of answers with the file names from EXERCISES.md, and writes the
results for Gradescope's autograder.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import process


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

SHOWN = 2000  # characters of a file's prints that are shown


def grade(number, folder, seed):
    """Grade one answer -> an entry of Gradescope's results: all points or none, and the reason."""
    exercise = EXERCISES[number]
    path = folder / exercise.file
    if path.is_file():
        sentence, printed = process.watch(exercise.function, path, seed)
    else:
        sentence, printed = describe_missing(exercise.file, folder), ""

    right = sentence is None
    output = "right" if right else f"not yet: {sentence}"
    if printed:
        output += f"\n\nThe file printed:\n{printed[:SHOWN]}"
    if len(printed) > SHOWN:
        output += " ..."
    return {
        "name": f"{number}. {exercise.function} ({exercise.file})",
        "score": exercise.points if right else 0,
        "max_score": exercise.points,
        "status": "passed" if right else "failed",
        "output": output,
    }


def describe_missing(name, folder):
    """Say that a file is missing, and which files there are."""
    others = sorted(other.name for other in folder.glob("*.py"))
    if others:
        return f"there is no file {name}; there are {process.one_line(', '.join(others))}"
    return f"there is no file {name}; there is no Python file at all"


def write_whole(path, text):
    """Write a file atomically, under another name first."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def grade_all(numbers, folder, seed, path):
    """Grade every answer, whatever happens to the others, then write all results."""
    tests = []
    for number in numbers:
        test = grade(number, folder, seed)
        tests.append(test)
        first_line = test["output"].splitlines()[0]
        points = f"{test['score']:>3} of {test['max_score']:>2}"
        print(f"{points}  {test['name']}: {first_line}", flush=True)
    results = {"output": f"cases drawn with --seed {seed}", "tests": tests}
    write_whole(path, json.dumps(results, indent=1))


def check_one(number, path, seed):
    """Check one answer and print the verdict -> exit status."""
    function = EXERCISES[number].function
    sentence, printed = process.watch(function, path, seed)
    print(printed, end="" if printed.endswith("\n") or not printed else "\n")
    if sentence is not None:
        print(f"not yet: {sentence}  (--seed {seed} repeats these cases)")
        return 1
    print(f"right: exercise {number}, {function}")
    return 0


def make_parser():
    parser = argparse.ArgumentParser(
        description="Check answers to programming exercises of EXERCISES.md."
    )
    add = parser.add_argument
    numbers = {"type": int, "nargs": "+", "choices": EXERCISES, "metavar": "NUMBER"}
    add("exercises", **numbers, help=f"exercise numbers: {', '.join(map(str, EXERCISES))}")
    add("path", type=Path, metavar="FILE", help="the answer; with --json the folder of answers")
    json_help = "grade a folder, and write this file for Gradescope"
    add("--json", type=Path, metavar="RESULTS", help=json_help)
    add("--seed", type=int, help="seed of the cases; default: a new one each time, printed")
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may print what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")

    if args.json is None:
        if len(args.exercises) > 1:
            parser.error("one exercise at a time, or --json RESULTS and a folder")
        return check_one(args.exercises[0], args.path, seed)
    if not args.path.is_dir():
        parser.error(f"{args.path} is no folder; with --json, name the one that holds the answers")
    try:
        grade_all(args.exercises, args.path, seed, args.json)
    except OSError as error:
        parser.error(f"--json: {error}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
