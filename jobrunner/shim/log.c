/*
 * The log as it is written (docs/formats.md): bytes first, then the index record that covers them.
 *
 * A reader believes the index alone, so a crash between the two loses nothing that was told. Tiny reads that come within a
 * millisecond share a record because the shim reads them together (shim.c), not because anything is held back here.
 *
 * A write that fails ends the segment. The bytes it took are gone, and counted: the next segment is named by the offset after them and
 * begins with a gap record. Nothing is retried in place, so a full disk costs each read one failed write and never blocks the job.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

struct index_record {
	uint64_t end;
	int64_t time_ns;
	uint32_t kind, stream;
	uint64_t lost;
};
_Static_assert(sizeof(struct index_record) == 32, "an index record is 32 bytes");

static struct {
	int dir, data, index;		/* data and index are -1 when there is no segment to write to */
	uint64_t segment_bytes;
	uint64_t base, offset;		/* of the segment; of the next byte */
	uint64_t index_size;
	uint64_t pending;		/* bytes lost that no gap record tells yet */
	uint64_t lost;
} out;

static void close_segment(void)
{
	if (out.data >= 0)
		close(out.data);
	if (out.index >= 0)
		close(out.index);
	out.data = out.index = -1;
}

/* A record that does not fit whole is taken back, so that no later one stands at a crooked place. */
static bool put_record(uint32_t kind, uint32_t stream, int64_t time_ns, uint64_t lost)
{
	struct index_record record = {out.offset, time_ns, kind, stream, lost};
	if (out.index < 0)
		return false;
	if (pwrite(out.index, &record, sizeof record, (off_t)out.index_size) != sizeof record) {
		if (ftruncate(out.index, (off_t)out.index_size) != 0)
			close_segment();
		return false;
	}
	out.index_size += sizeof record;
	return true;
}

/* The index comes second: a segment counts once its index exists. */
static bool open_segment(int64_t time_ns)
{
	char name[32];
	close_segment();
	snprintf(name, sizeof name, "%016llx", (unsigned long long)out.offset);
	out.data = openat(out.dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (out.data < 0)
		return false;
	strcat(name, ".idx");
	out.index = openat(out.dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	out.base = out.offset;
	out.index_size = 0;
	if (out.index >= 0 && (!out.pending || put_record(KIND_GAP, 0, time_ns, out.pending))) {
		out.pending = 0;
		return true;
	}
	int error = errno;
	close_segment();
	name[16] = '\0';
	unlinkat(out.dir, name, 0);
	strcat(name, ".idx");
	unlinkat(out.dir, name, 0);
	errno = error;
	return false;
}

void log_open(int job_dir, uint64_t segment_bytes, struct failure *failure)
{
	out.data = out.index = -1;
	out.segment_bytes = segment_bytes;
	out.dir = openat(job_dir, "log", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (out.dir < 0 || !open_segment(0))
		fail(failure, "log", errno, "");
}

/* Write one read of a stream; false if bytes were lost. */
bool log_write(int stream, const char *data, size_t size, int64_t time_ns)
{
	size_t done = 0;
	bool open = out.data >= 0 && !out.pending && out.offset - out.base < out.segment_bytes;
	if (open || open_segment(time_ns)) {
		while (done < size) {
			ssize_t n = pwrite(out.data, data + done, size - done, (off_t)(out.offset - out.base + done));
			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				break;
			done += (size_t)n;
		}
		out.offset += done;
		if (done && !put_record(KIND_DATA, (uint32_t)stream, time_ns, 0)) {
			/* Bytes that no record covers are not there for any reader: they are lost, too. */
			out.offset -= done;
			done = 0;
		}
	}
	if (done == size)
		return true;
	out.offset += size - done;
	out.pending += size - done;
	out.lost += size - done;
	return false;
}

void log_sync(void)
{
	if (out.data >= 0)
		fdatasync(out.data);
	if (out.index >= 0)
		fdatasync(out.index);
}

void log_end_record(void)
{
	int64_t now = now_ns(CLOCK_REALTIME);
	if ((out.pending || out.index < 0) && !open_segment(now))
		return;		/* the disk is full to the end; the exit record has the total */
	put_record(KIND_END, 0, now, 0);
}

uint64_t log_offset(void)
{
	return out.offset;
}

uint64_t log_lost(void)
{
	return out.lost;
}
