"""Split a labelled file of a task in two: to choose settings without dev, or to get a dev set.

    python -m tools.split mrpc glue/MRPC/train.tsv held --dev 600
    python -m tools.split squad dev-v1.1.json FOLDER --dev 8

The first writes held/MRPC/train.tsv and dev.tsv, with the rows in random order. The second writes
FOLDER/squad/train-v1.1.json and dev-v1.1.json, and splits by article.
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
    if name == "squad" or (not task.read and task.dev == ("dev",))
]


def halves(items, dev):
    """Split off the last `dev` items -> {"train": the others, "dev": these}.

    Raises ValueError if nothing would be left to train on.
    """
    if dev >= len(items):
        raise ValueError(f"--dev {dev}: the file holds only {len(items)}; leave some to train on")
    return {"train": items[:-dev], "dev": items[-dev:]}


def split_articles(path, dev):
    """Split a SQuAD file -> {"train": bytes, "dev": bytes}. The last articles are dev."""
    files = {}
    for split, articles in halves(read_articles(path), dev).items():
        text = json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False)
        files[split] = text.encode()
    return files


def split_rows(path, task, dev):
    """Split a task's TSV file -> {"train": bytes, "dev": bytes}. Rows are always shuffled alike."""
    read_rows(path, task)  # raises ValueError if the file is not of this task
    lines = path.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    header = [lines.pop(0)] if isinstance(task.label, str) else []
    random.Random(0).shuffle(lines)
    files = {}
    for split, rows in halves(lines, dev).items():
        files[split] = "\n".join([*header, *rows, ""]).encode()
    return files


@one_line_errors()
def main(argv=None):
    description = "Split a labelled file of a task into train and dev."
    parser = Parser(prog="python -m tools.split", description=description)
    add = parser.add_argument
    add("task", choices=CHOICES, metavar="TASK", help=", ".join(CHOICES))
    add("file", type=Path, help="a labelled file with the task's columns; JSON for squad")
    add("folder", type=Path, help="where to write, for --data-dir")
    add("--dev", type=count, required=True, help="rows, or articles of SQuAD, in the dev part")
    args = parser.parse_args(argv)

    task = TASKS[args.task]
    if task.read:
        files = split_articles(args.file, args.dev)
    else:
        files = split_rows(args.file, task, args.dev)
    paths = {split: args.folder / task.folder / task.file.format(split) for split in files}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"{path} is there already; delete it or name another folder")
    for split, path in paths.items():
        write_whole(path, files[split])
        print(path)


if __name__ == "__main__":
    main()
