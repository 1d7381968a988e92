"""Split a labelled file of a task in two: to choose settings without dev, or where one file is all that there is.

python -m tools.split mrpc glue/MRPC/train.tsv held --dev 600     # held/MRPC/{train,dev}.tsv, rows in random order
python -m tools.split squad dev-v1.1.json FOLDER --dev 8          # FOLDER/squad/{train,dev}-v1.1.json, by articles
"""

import json
import random
from pathlib import Path

from data import TASKS, read_rows
from extras.squad import read_articles
from plumbing.cli import Parser, count, one_line_errors
from plumbing.files import write_whole

CHOICES = [
    name
    for name, task in TASKS.items()
    if name == "squad" or not task.read and task.dev == ("dev",)
]


def halves(items, dev):
    """-> {"train": all but the last `dev` items, "dev": these}. Raises ValueError if nothing would be left to train."""
    if dev >= len(items):
        raise ValueError(f"--dev {dev}: the file holds only {len(items)}; leave some to train on")
    return {"train": items[:-dev], "dev": items[-dev:]}


def split_articles(path, dev):
    """A SQuAD file -> {"train" and "dev": bytes of one}, its last articles in dev."""
    parts = halves(read_articles(path), dev)
    files = {
        name: json.dumps({"version": "1.1", "data": part}, ensure_ascii=False)
        for name, part in parts.items()
    }
    return {name: file.encode() for name, file in files.items()}


def split_rows(path, task, dev):
    """A TSV file of the task -> {"train" and "dev": bytes of one}, its rows in an order that is always the same."""
    read_rows(path, task)  # raises for what is no such file
    lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    header = [lines.pop(0)] if isinstance(task.label, str) else []
    random.Random(0).shuffle(lines)
    return {
        name: "\n".join([*header, *part, ""]).encode() for name, part in halves(lines, dev).items()
    }


@one_line_errors()
def main(argv=None):
    parser = Parser(
        prog="python -m tools.split",
        description="Split a labelled file of a task into train and dev.",
    )
    parser.add_argument("task", choices=CHOICES, metavar="TASK", help=", ".join(CHOICES))
    parser.add_argument(
        "file", type=Path, help="a labelled file with the task's columns; of squad its JSON"
    )
    parser.add_argument("folder", type=Path, help="for --data-dir")
    parser.add_argument(
        "--dev", type=count, required=True, help="rows, or articles of SQuAD, in the dev part"
    )
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    parts = (
        split_articles(args.file, args.dev) if task.read else split_rows(args.file, task, args.dev)
    )
    paths = {name: args.folder / task.folder / task.file.format(name) for name in parts}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"{path} is there already; delete it or name another folder")
    for name, path in paths.items():
        write_whole(path, parts[name])
        print(path)


if __name__ == "__main__":
    main()
