"""Reports as one HTML page without network: pieces of a page, plots as SVG, and a page for each kind of report."""
