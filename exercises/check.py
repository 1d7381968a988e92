"""Check answers to the programming exercises of EXERCISES.md, and say in words what is wrong.

    python exercises/check.py 3 top_v.py
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

EXERCISES = {  # number: (function to write, file name for handing it in, points)
    2: ("density_at", "schedule.py", 5),
    3: ("top_v", "top_v.py", 15),
    4: ("score_gradient", "score_gradient.py", 20),
    6: ("rank", "rank.py", 20),
    7: ("two_of_four", "two_of_four.py", 15),
    9: ("dead_neurons", "dead_neurons.py", 25),
}


def run(function, path, args):
    """Run an answer in a process of its own -> "right", or what is wrong."""
    answer = Path(__file__).with_name("answer.py")
    # What the answer prints goes to the terminal (None), or nowhere.
    prints = subprocess.DEVNULL if args.json or args.csv else None
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
    function, file, points = EXERCISES[number]
    if path.is_dir():
        path /= file
    output = f"not yet: there is no file {path.name}"
    if path.is_file():
        output = run(function, path, args)
    score = points if output == "right" else 0
    name = f"{number}. {function}"
    print(f"{name} ({score} of {points} points): {output}", flush=True)
    return {"name": name, "score": score, "max_score": points, "output": output}


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
    add("exercises", type=int, nargs="*", default=list(EXERCISES), help="exercise numbers (all)")
    add("path", type=Path, help="an answer, a folder of answers, or with --csv a folder of folders")
    add_file = parser.add_mutually_exclusive_group().add_argument
    add_file("--json", type=new_file, metavar="RESULTS", help="write this file for Gradescope")
    add_file("--csv", type=new_file, metavar="TABLE", help="write this table of a class")
    add("--seed", type=int, default=random.randrange(10**6), help="seed of the cases (random)")
    add("--seconds", type=int, default=60, help="time limit per answer (60)")
    args = parser.parse_intermixed_args(argv)
    if set(args.exercises) - EXERCISES.keys():
        parser.error(f"only exercises {list(EXERCISES)} have a check")
    if not args.path.exists():
        parser.error(f"there is no {args.path}; name the answer, or its folder, last")
    if args.seconds < 1:
        parser.error("--seconds must be at least 1")
    return args


def new_file(text):
    """Refuse a file that could not be written once everything is graded."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write a file {path}")
    return path


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
