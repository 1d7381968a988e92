"""Many rows of whole numbers, of different lengths, in one array.

A number takes 4 bytes here. In a list it takes 8, and 28 more from 257 on, so that the tokens of
MNLI would fill gigabytes.

    rows = Rows()
    rows.append([7, 8, 9])
    rows[0]  # array("i", [7, 8, 9])
"""

import hashlib
from array import array


class Rows:
    """Rows that can be appended, counted and read like those of a list."""

    def __init__(self):
        self.numbers = array("i")  # of all rows, one after the other
        self.starts = array("q", [0])  # row i is numbers[starts[i] : starts[i + 1]]

    def append(self, row):
        self.numbers.extend(row)
        self.starts.append(len(self.numbers))

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, i):
        """Row i, a copy."""
        i = range(len(self))[i]  # counts from the end, too, and raises IndexError
        return self.numbers[self.starts[i] : self.starts[i + 1]]


def sha256_of_rows(rows, labels):
    """sha256 of repr((rows as a list of lists, labels)).

    The text is made row by row, as all of it would be five times as large as the rows.
    """
    hasher = hashlib.sha256(b"([")
    separator = ""
    for row in rows:
        hasher.update(f"{separator}{list(row)}".encode())
        separator = ", "
    hasher.update(f"], {labels})".encode())
    return hasher.hexdigest()
