"""One time-bounded run on a GPU host that builds, proves, serves and measures plans, and writes a report."""
