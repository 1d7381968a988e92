"""Downloads with bounds: whole or not at all, never larger than a limit, never stuck for ever.

A file is downloaded beside its place, so that it can be checked before it is moved there.

    with fetched(url, path, remedy) as part:
        check_digest(part, "sha256", expected, url)
        part.replace(path)
"""

import ast
import base64
import html
import http
import http.client
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from plumbing.files import DISK_FULL, partial_file
from plumbing.progress import progress

LARGEST = {".safetensors": 8 << 30}  # most bytes of a download, by file extension
LARGEST_OF_OTHERS = 1 << 29
PROGRESS = 1 << 20  # bytes that must arrive ...
PATIENCE = 300  # ... in this many seconds
INDEX = "https://pypi.org/simple"


class OutOfBoundsError(OSError):
    pass


class Bounds:
    """The limits of a download: a largest size, and PROGRESS bytes every PATIENCE seconds."""

    def __init__(self, max_bytes):
        self.max_bytes = max_bytes
        self.size = 0  # at the last progress
        self.time = time.monotonic()

    def check(self, size):
        if size > self.max_bytes:
            raise OutOfBoundsError(f"it is larger than {self.max_bytes:,} bytes")
        if size >= self.size + PROGRESS:
            self.size = size
            self.time = time.monotonic()
        elif time.monotonic() > self.time + PATIENCE:
            raise OutOfBoundsError(f"less than a mebibyte came in {PATIENCE} seconds")


@contextmanager
def fetched(url, path, remedy):
    """Download a URL with a progress bar -> a whole partial_file of `path`.

    A download that breaks off resumes where it stopped, as long as each attempt brings new bytes.
    Raises OSError that ends in the remedy if the server cannot be reached, breaks off, is too
    slow, or sends too much.
    """
    bounds = Bounds(LARGEST.get(path.suffix, LARGEST_OF_OTHERS))
    with suggest_smp_cache(), partial_file(path) as part:
        with open(part, "wb") as file, progress(None, path.name, unit="B", unit_scale=True) as bar:
            whole = False
            while not whole:
                before = file.tell()
                try:
                    download_rest(url, file, bar, bounds)
                    whole = True
                except (OSError, ValueError, http.client.HTTPException) as error:
                    if getattr(error, "errno", None) in DISK_FULL:
                        raise
                    if file.tell() <= before or isinstance(error, OutOfBoundsError):
                        raise OSError(
                            f"cannot fetch {without_login(url)} ({error}); {remedy}"
                        ) from None
        yield part


@contextmanager
def suggest_smp_cache():
    """Add a hint at SMP_CACHE to an OSError about a file in the cache."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno in DISK_FULL:
            raise
        raise OSError(f"{error}: name another folder for downloads with SMP_CACHE") from None


def download_rest(url, file, bar, bounds):
    """Append the rest of a URL to a file, or download it all if the server cannot resume.

    Raises OSError if the connection ends too early.
    """
    request = make_request(url)
    if file.tell():
        request.add_header("Range", f"bytes={file.tell()}-")
    with urllib.request.urlopen(request, timeout=30) as reply:
        if reply.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.seek(0)
            file.truncate()
            bounds.size = 0
        elif not (reply.headers.get("Content-Range") or "").startswith(f"bytes {file.tell()}-"):
            raise OSError("the server sent another part than it was asked for")
        size = file.tell() + int(reply.headers.get("Content-Length") or 0)
        bar.reset(size)
        bar.update(file.tell())

        read = getattr(
            reply, "read1", reply.read
        )  # read1 returns what has arrived, without waiting
        while block := read(PROGRESS):
            bar.update(file.write(block))
            bounds.check(file.tell())
    if file.tell() < size:
        raise OSError(f"the connection ended after {file.tell()} of {size} bytes")


def make_request(url):
    """Make a urllib Request. A name and password in the URL, as for a mirror, become a header."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(without_login(url))
    if parts.username is not None:
        name = urllib.parse.unquote(parts.username)
        password = urllib.parse.unquote(parts.password or "")
        login = base64.b64encode(f"{name}:{password}".encode()).decode()
        # "Unredirected": the password must not reach another host.
        request.add_unredirected_header("Authorization", f"Basic {login}")
    return request


def without_login(url):
    """Remove the name and password from a URL.

    "https://me:secret@mirror.org/simple" -> "https://mirror.org/simple"
    """
    return re.sub(r"(?<=://)[^/]*@", "", url)


# --- archives of a package index: files to read, never packages to install --------------------


@contextmanager
def archive_of_package(project, filename, folder, remedy):
    """Find a package's archive where pip would look -> its Path. pip could run its code.

    This looks in the folders of find-links first, then at index-url and extra-index-url. A
    download is a partial_file in `folder`. Raises OSError that ends in the remedy if the archive
    is nowhere.
    """
    for place in pip_setting("find-links"):
        path = Path(urllib.request.url2pathname(place.removeprefix("file://"))) / filename
        if path.is_file():
            yield path
            return

    certificates = pip_setting("cert")  # a company's own mirror may need one
    if certificates:
        os.environ.setdefault("SSL_CERT_FILE", certificates[0])
    indexes = [*(pip_setting("index-url") or [INDEX]), *pip_setting("extra-index-url")]
    if pip_setting("no-index") not in ([], ["0"], ["false"], ["False"]):
        indexes = []

    first_error = OSError(
        f"{filename} is in none of pip's find-links, and it is set to no-index; {remedy}"
    )
    for number, index in enumerate(indexes):
        try:
            url = find_file(f"{index.rstrip('/')}/{project}/", filename, folder, remedy)
        except OSError as error:
            if number == 0:
                first_error = error
            continue
        with fetched(url, folder / filename, remedy) as part:
            yield part
        return
    raise first_error


def find_file(page, filename, folder, remedy):
    """Find a file's URL on a page of a package index (PEP 503).

    Raises OSError that ends in the remedy if the page does not list the file.
    """
    if page.startswith("file:"):
        page += "index.html"
    with fetched(page, folder / f"{filename}.html", remedy) as part:
        text = part.read_text("utf-8", "replace")
    for link in re.findall(r"<a\b[^>]*?\bhref\s*=\s*[\"']([^\"']+)", text):
        url = urllib.parse.urljoin(page, html.unescape(link))
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).endswith(f"/{filename}"):
            return url
    raise OSError(f"{without_login(page)} has no {filename}; {remedy}")


def pip_setting(name):
    """List the values of a pip setting, from the environment or pip's configuration."""
    value = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    for section in ("download", "install", "global"):
        value = value or pip_configuration().get(f"{section}.{name}")
    return (value or "").split()


@cache
def pip_configuration():
    """Read pip's configuration files -> {section.name: value}. Without pip it is empty."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split("=", 1) for line in ended.stdout.splitlines() if "=" in line]
    return {name: str(ast.literal_eval(value)) for name, value in lines}
