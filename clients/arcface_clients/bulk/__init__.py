"""Any number of faces in, a data set of embeddings out, or one Parquet file; a run that was killed is gone on with.

files.py       files and folders by path or URL; folders.py: those of this host; objects.py: those of object stores
units.py       what there is to embed, cut into units
unit_list.py   the list of units, written ahead of the work
read.py        a unit's faces, one at a time; tars.py: those of WebDataset shards
parts.py       a unit's rows as a Parquet part; parts as one file
spec.py        what decides a job's rows
job.py         the job's folder: what is to do, what is done
work.py        what a worker does with a unit
on_threads.py  the workers are threads of this process
on_ray.py      the workers are Ray actors; schedule.py: which unit is next
saved.py       what was written, read again
"""

from __future__ import annotations
