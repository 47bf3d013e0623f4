"""The SDK: jobs on a server, over mutual TLS. The same verbs, values and exceptions as the library, `jobrunner.runner`.

channel   one connection, and why it broke
errors    what goes wrong below, as errors of `jobrunner.errors`
reader    a job's output
client    JobClient and ClientJob

async with JobClient("build1:7443", ca="ca.pem", cert="admin.pem", key="admin.key") as client:
    job = await client.start("make", "-j4", cwd="/src")
    async with job.log() as reader:
        while (line := await reader.next_line()) is not None:
            print(line.stream, line.data)
    print((await job.wait()).status)
"""

from jobrunner.client.client import ClientJob, JobClient, ServerFacts
from jobrunner.client.reader import ClientOutputReader

__all__ = ["ClientJob", "ClientOutputReader", "JobClient", "ServerFacts"]
