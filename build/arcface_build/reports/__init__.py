"""Reports as text and as self-contained HTML pages with SVG plots."""
