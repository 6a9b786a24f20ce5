"""The model repository on disk: versions, overlays, and what passed its gate put into them."""
