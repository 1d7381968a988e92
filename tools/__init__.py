"""Commands around training, run as python -m tools.NAME. The method imports none of them."""

import plumbing  # noqa: F401 (before torch)
