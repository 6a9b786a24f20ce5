"""`python -m arcface_build` is the command `arcface`; the old `--mode build` still works."""

from __future__ import annotations

from arcface_build.program import main

if __name__ == "__main__":
    main()
