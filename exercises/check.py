"""Check answers to the programming exercises of EXERCISES.md, and say in words what is wrong.

    python exercises/check.py 3 my_mask.py
    python exercises/check.py --json results.json 2 3 4 6 7 9 FOLDER

The second form grades a folder of answers, under the names that EXERCISES.md gives them, and writes what Gradescope's
autograder reads.
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
    function: str  # that the student writes
    file: str  # under which name it is handed in
    points: int


EXERCISES = {
    2: Exercise("density_at", "schedule.py", 5),
    3: Exercise("top_v", "top_v.py", 15),
    4: Exercise("score_gradient", "score_gradient.py", 20),
    6: Exercise("masking", "masking.py", 20),
    7: Exercise("two_of_four", "two_of_four.py", 15),
    9: Exercise("dead_neurons", "dead_neurons.py", 25),
}

SHOWN = 2000  # characters of what a student's file printed


def grade(number, folder, seed):
    """One entry of Gradescope's results: all points or none, and why."""
    exercise = EXERCISES[number]
    path, printed = folder / exercise.file, ""
    if path.is_file():
        sentence, printed = process.watch(EXERCISES[number].function, path, seed)
    else:
        others = sorted(other.name for other in folder.glob("*.py"))
        there = (
            f"; there are {process.one_line(', '.join(others))}"
            if others
            else "; there is no Python file at all"
        )
        sentence = f"there is no file {exercise.file}{there}"

    output = "right" if sentence is None else f"not yet: {sentence}"
    if printed:
        output += f"\n\nThe file printed:\n{printed[:SHOWN]}" + (
            " ..." if len(printed) > SHOWN else ""
        )
    return {
        "name": f"{number}. {exercise.function} ({exercise.file})",
        "score": exercise.points if sentence is None else 0,
        "max_score": exercise.points,
        "status": "passed" if sentence is None else "failed",
        "output": output,
    }


def write_whole(path, text):
    """Under another name first: a file that is there is complete."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def grade_all(numbers, folder, seed, path):
    """Every answer is checked, whatever became of the others, and then all results are written."""
    tests = []
    for number in numbers:
        tests.append(grade(number, folder, seed))
        first_line = tests[-1]["output"].splitlines()[0]
        print(
            f"{tests[-1]['score']:>3} of {tests[-1]['max_score']:>2}  {tests[-1]['name']}: {first_line}",
            flush=True,
        )
    write_whole(
        path, json.dumps({"output": f"cases drawn with --seed {seed}", "tests": tests}, indent=1)
    )


def check_one(number, path, seed):
    sentence, printed = process.watch(EXERCISES[number].function, path, seed)
    print(printed, end="" if printed.endswith("\n") or not printed else "\n")
    if sentence is not None:
        print(f"not yet: {sentence}  (--seed {seed} repeats these cases)")
        return 1
    print(f"right: exercise {number}, {EXERCISES[number].function}")
    return 0


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Check answers to programming exercises of EXERCISES.md."
    )
    numbers = {"type": int, "nargs": "+", "choices": EXERCISES, "metavar": "NUMBER"}
    parser.add_argument(
        "exercises", **numbers, help=f"of an exercise: {', '.join(map(str, EXERCISES))}"
    )
    parser.add_argument(
        "path", type=Path, metavar="FILE", help="the answer; with --json the folder of the answers"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="RESULTS",
        help="grade a folder; write this file for Gradescope",
    )
    parser.add_argument(
        "--seed", type=int, help="of the cases; default: another one each time, printed"
    )
    args = parser.parse_args(argv)
    seed = random.randrange(10**6) if args.seed is None else args.seed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an answer may print what a terminal cannot show
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
