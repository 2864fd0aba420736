"""One file per format of training rows, each with the records that data/sources.py lists."""
