"""The log of a job as its readers see it: segments and their index on disk (docs/formats.md), read without the job or its shim.

`segments` finds and reads the files, `reader` is one subscriber, `Log` is what all subscribers of one job share. Nothing here
writes: the shim alone writes a log, and a reader needs no registration with it.
"""

from jobrunner.log.reader import Log, LogReader
from jobrunner.log.segments import ChunkCache

__all__ = ["ChunkCache", "Log", "LogReader"]
