"""The log of a job as its readers see it: segments and their index on disk (docs/formats.md), read without the job or its shim.

segments   the files: which there are, and bounded reads of both kinds
chunks     from records and bytes to chunks, and the cache that readers share
position   where to begin: for the last lines, and for a time
cursor     the walk through all of it, without waiting
reader     one subscriber, and `Log`: what all subscribers of one job share

Nothing here writes: the shim alone writes a log, and a reader needs no registration with it.
"""

from jobrunner.log.chunks import ChunkCache
from jobrunner.log.reader import Log, LogReader

__all__ = ["ChunkCache", "Log", "LogReader"]
