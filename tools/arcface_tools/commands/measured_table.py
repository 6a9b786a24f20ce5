"""`python -m arcface_tools measured-table`: generates the pages of figures from the reports, or checks them."""

from __future__ import annotations

import click

from arcface_clients.errors import GateFailed


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if a page does not match the reports.")
def command(check: bool) -> None:
    """Generate docs/measured/README.md and README's table from docs/measured/rows.yaml and the reports."""
    from arcface_clients.atomic import new_file
    from arcface_tools.measured_table import REPO, stale_pages

    stale = stale_pages()
    if check and stale:
        names = ", ".join(str(path.relative_to(REPO)) for path in stale)
        raise GateFailed(f"out of date with the reports: {names}\nNext: python -m arcface_tools measured-table")
    for path, text in stale.items():
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        click.echo(f"written: {path.relative_to(REPO)}")
