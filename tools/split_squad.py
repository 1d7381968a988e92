"""Split a SQuAD file by articles into a training and a dev file, for those who have only one of the two.

    python -m tools.split_squad dev-v1.1.json FOLDER --dev 8     # FOLDER/squad/{train,dev}-v1.1.json, 8 articles in dev
"""

import json
from pathlib import Path

from extras.squad import read_articles
from plumbing.cli import Parser, count, one_line_errors
from plumbing.files import write_whole


@one_line_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.split_squad", description="Split a SQuAD file into train and dev.")
    parser.add_argument("file", type=Path, help="a SQuAD v1.1 file")
    parser.add_argument("folder", type=Path, help="for --data-dir; gets squad/{train,dev}-v1.1.json")
    parser.add_argument("--dev", type=count, default=8, help="articles in the dev part, the last of the file (8)")
    args = parser.parse_args(argv)
    articles = read_articles(args.file)
    if args.dev >= len(articles):
        raise ValueError(f"--dev must be less than {len(articles)}, the number of articles; got {args.dev}")
    parts = {"train": articles[: -args.dev], "dev": articles[-args.dev :]}
    paths = {name: args.folder / "squad" / f"{name}-v1.1.json" for name in parts}
    for path in paths.values():
        if path.exists():
            raise ValueError(f"{path} is there already; delete it or name another folder")
    for name, part in parts.items():
        path = paths[name]
        write_whole(path, json.dumps({"version": "1.1", "data": part}, ensure_ascii=False).encode())
        print(f"{path}: {len(part)} articles")


if __name__ == "__main__":
    main()
