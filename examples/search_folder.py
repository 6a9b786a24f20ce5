"""Embed a folder of known people, then say who is in each photo of another folder.

python examples/search_folder.py people/ unknown/ [localhost:8001]

people/ has one sub-folder a person; all files are aligned crops of 112×112 pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arcface_clients import Gallery, TritonEmbedder
from arcface_clients.faces.images import load_faces


def main(people: str, unknown: str, url: str = "localhost:8001") -> None:
    """Fill a gallery, save it beside the people, search it."""
    with TritonEmbedder(url) as embedder:
        contract = embedder.contract_id or ""  # a gallery refuses a server that states none
        gallery = Gallery(contract)  # and, from now on, embeddings of any other model
        for folder in sorted(path for path in Path(people).iterdir() if path.is_dir()):
            faces, _, refused = load_faces([folder])
            gallery.add(folder.name, embedder.encode(faces), contract)
            for crop in refused:
                print(f"not read: {crop.name}: {crop.refused}", file=sys.stderr)
        if not gallery:
            sys.exit(f"no face could be read from {people}/NAME/: expected aligned crops of 112×112 pixels")
        gallery.save(Path(people) / "gallery.npz")

        faces, names, _ = load_faces([unknown])
        for name, matches in zip(names, gallery.search(embedder.encode(faces), k=1), strict=True):
            print(f"{name}: {matches[0].identity}, distance {matches[0].distance:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
