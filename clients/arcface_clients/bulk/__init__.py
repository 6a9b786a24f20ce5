"""Millions of faces in, one Parquet file of embeddings out; a run that was killed is gone on with.

units.py   what there is to embed, cut into units, listed in a file
read.py    a unit's faces, one at a time
parts.py   a unit's rows as a Parquet part; parts as one file
job.py     the job's folder and the loop over its units, in threads
on_ray.py  the same loop on Ray Data
saved.py   what was written, read again
"""

from __future__ import annotations
