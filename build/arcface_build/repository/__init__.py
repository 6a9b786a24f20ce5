"""The model repository on disk: its versions and overlays, and installing into it what passed its gate."""
