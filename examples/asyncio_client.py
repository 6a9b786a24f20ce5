"""Embed from asyncio: many small jobs share one client, and the server batches what arrives together.

python examples/asyncio_client.py [localhost:8001]
"""

from __future__ import annotations

import asyncio
import sys

from arcface_clients import AsyncTritonEmbedder
from arcface_clients.faces.synthetic import synthetic_faces


async def main(url: str = "localhost:8001") -> None:
    """Twenty jobs of one to five faces at once."""
    jobs = [synthetic_faces(1 + seed % 5, seed) for seed in range(20)]
    async with AsyncTritonEmbedder(url) as embedder:
        answers = await asyncio.gather(*(embedder.encode(faces) for faces in jobs))
    print(f"{len(answers)} jobs, {sum(map(len, answers))} embeddings")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
