"""`python -m plait` is the `plait` command."""

from .parallel.cli import app

app(prog_name="plait")
