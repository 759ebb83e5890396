"""What `tailrisk COMMAND --help` says, as text, wherever a page has `{help COMMAND}` on a line."""

import contextlib
import html
import io
import os
import re
from unittest import mock

from tailrisk_jax.cli import main

COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def on_page_markdown(markdown, **_):
    """Puts the help in."""
    return re.sub(r"^\{help (\w+)\}$", lambda found: _help(found[1]), markdown, flags=re.MULTILINE)


def _help(command):
    said = io.StringIO()
    with (
        mock.patch.dict(os.environ, COLUMNS="100"),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        main([command, "--help"])
    return f"<pre>{html.escape(COLOUR.sub('', said.getvalue()))}</pre>"
