"""`python -m arcface_tools measured-table`: the pages of figures, made from the reports or checked against them."""

from __future__ import annotations

import click

from arcface_clients.errors import GateFailed


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where a page is not what the reports say.")
def command(check: bool) -> None:
    """Make docs/measured/README.md and README's table from docs/measured/rows.yaml and the reports."""
    from arcface_clients.atomic import new_file
    from arcface_tools.measured_table import REPO, stale_pages

    stale = stale_pages()
    if check and stale:
        names = ", ".join(str(path.relative_to(REPO)) for path in stale)
        raise GateFailed(f"not what the reports say: {names}\nNext: python -m arcface_tools measured-table")
    for path, text in stale.items():
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        click.echo(f"written: {path.relative_to(REPO)}")
