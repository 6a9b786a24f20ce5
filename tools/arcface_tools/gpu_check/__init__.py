"""One bounded run on a GPU host: plans built, proved, served and measured; one report."""
