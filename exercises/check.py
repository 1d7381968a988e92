"""Check answers to the programming exercises of EXERCISES.md, and say in words what is wrong.

    python exercises/check.py 3 my_mask.py
    python exercises/check.py --json results.json 2 3 4 6 7 9 FOLDER
    python exercises/check.py --csv class.csv FOLDER_OF_FOLDERS

The second form grades a folder of answers with the file names from EXERCISES.md, and writes the
results for Gradescope's autograder. The third one grades a class, with a folder for each student.
Without numbers, it grades all exercises.
"""

import argparse
import csv
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
    if args.json or args.csv:
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


def grade(number, path, args):
    """Grade an answer, and print the verdict -> an entry of Gradescope's results.

    It gets all points or none. path: the answer, or a folder of answers.
    """
    exercise = EXERCISES[number]
    if path.is_dir():
        path = path / exercise.file
    output = f"not yet: there is no file {path.name}"
    if path.is_file():
        output = run(exercise.function, path, args)
    score = 0
    if output == "right":
        score = exercise.points
    name = f"{number}. {exercise.function}"
    print(f"{name} ({score} of {exercise.points} points): {output}", flush=True)
    return {"name": name, "score": score, "max_score": exercise.points, "output": output}


def grade_class(args):
    """Grade a folder of folders, and write a table: a row per student, a column per exercise."""
    students = sorted(args.path.glob("[!.]*/"))
    if not students:
        sys.exit(f"{args.path} has no folders; with --csv it must have one for each student")
    # The mark at the start of utf-8-sig tells Excel how names are encoded.
    with args.csv.open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file)
        table.writerow(["student", *args.exercises, "total"])
        for student in students:
            print(f"{student.name}:")
            scores = [grade(number, student, args)["score"] for number in args.exercises]
            table.writerow([student.name, *scores, sum(scores)])


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="Check answers to programming exercises of EXERCISES.md."
    )
    add = parser.add_argument
    add("exercises", type=int, nargs="*", help="their numbers; else all")
    add("path", type=Path, help="the answer, a folder of answers, or with --csv a folder of those")
    add("--json", type=Path, metavar="RESULTS", help="write this file for Gradescope")
    add("--csv", type=Path, metavar="TABLE", help="write this table of a class")
    add("--seed", type=int, default=random.randrange(10**6), help="of the cases; else a new one")
    add("--seconds", type=int, default=60, help="for each answer; importing torch takes some (60)")
    args = parser.parse_intermixed_args(argv)
    args.exercises = args.exercises or list(EXERCISES)
    if not EXERCISES.keys() >= set(args.exercises):
        parser.error(f"only exercises {list(EXERCISES)} have a check")
    return args


def main(argv=None):
    args = parse_args(argv)
    note = f"--seed {args.seed} repeats these cases"
    if args.csv:
        grade_class(args)
        print(note)
        return 0

    tests = [grade(number, args.path, args) for number in args.exercises]
    print(note)
    if args.json:
        args.json.write_text(json.dumps({"output": note, "tests": tests}, indent=1))
        return 0
    return 0 if all(test["output"] == "right" for test in tests) else 1


if __name__ == "__main__":
    sys.exit(main())
