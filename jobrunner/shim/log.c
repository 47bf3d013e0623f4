/*
 * The log as it is written (docs/formats.md): first the bytes, then the index record that covers them.
 *
 * A reader believes the index alone, so whatever ends this process in between loses nothing that was told. Nothing is held back
 * here; tiny writes share a record because they are read together (copy.c).
 *
 * A write that fails or is short ends the segment: what was written is indexed, the rest is lost and counted, and the next segment
 * is named by the offset after it and begins with a gap record. Nothing is tried again in place and nothing waits, so a full disk
 * costs the job bytes of its log and no time.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "jobrunner.h"

#define RETRY (10 * MS)		/* between attempts to make a segment on a full disk: each is some writes to a directory */

enum { DATA = 1, GAP, END };

struct index_record {
	uint64_t end;
	int64_t real_ns;
	uint32_t kind, stream;
	uint64_t lost;
};
_Static_assert(sizeof(struct index_record) == 32, "docs/formats.md, Log");

static struct {
	int dir, data, index;		/* data is -1 when no segment is open */
	int64_t segment_bytes, retry_at;
	uint64_t base, offset;		/* of the segment; of the next byte */
	uint64_t untold, lost;		/* bytes lost that no gap record tells yet; all bytes lost */
} out = {.dir = -1, .data = -1, .index = -1};

static void close_segment(void)
{
	if (out.data >= 0) {
		/* Order: begin to write it to the disk now, wait for that at the end of the job; the job never waits. */
		sync_file_range(out.data, 0, 0, SYNC_FILE_RANGE_WRITE);
		close(out.data);
		close(out.index);
	}
	out.data = out.index = -1;
}

static int put_record(uint64_t end, int64_t real_ns, uint32_t kind, uint32_t stream, uint64_t lost)
{
	struct index_record record = {end, real_ns, kind, stream, lost};
	ssize_t n = write(out.index, &record, sizeof record);
	if (n == (ssize_t)sizeof record)
		return 0;
	return n < 0 ? errno : ENOSPC;
}

/* Data first: a segment counts once its index is there. 0 or errno. */
static int create_segment(const char *data, const char *index, int64_t real_ns)
{
	const int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
	out.data = openat(out.dir, data, flags, 0600);
	if (out.data < 0)
		return errno;
	out.index = openat(out.dir, index, flags, 0600);
	int error = out.index < 0 ? errno : 0;
	if (!error && out.untold)
		error = put_record(out.offset, real_ns, GAP, 0, out.untold);
	if (!error)
		return 0;
	/* A segment that does not say why bytes are missing before it would stop every reader: it must not stay. */
	unlinkat(out.dir, index, 0);
	unlinkat(out.dir, data, 0);
	close(out.data);
	if (out.index >= 0)
		close(out.index);
	out.data = out.index = -1;
	return error;
}

static int open_segment(int64_t real_ns)
{
	char data[24], index[sizeof data + 4];
	close_segment();
	snprintf(data, sizeof data, "%016llx", (unsigned long long)out.offset);
	snprintf(index, sizeof index, "%s.idx", data);
	int error = create_segment(data, index, real_ns);
	if (!error) {
		out.base = out.offset;
		out.untold = 0;
	}
	return error;
}

/* Takes over `dir`, the directory `log`. */
int log_open(int dir, int64_t segment_bytes, struct report *why)
{
	out.dir = dir;
	out.segment_bytes = segment_bytes;
	int error = open_segment(0);
	return error ? fail(why, "log", error, "") : 0;
}

static void lose(size_t size)
{
	close_segment();
	out.offset += size;
	out.untold += size;
	out.lost += size;
}

/* What was read from a stream at once. Never fails for the caller: what cannot be written is counted. */
void log_write(enum stream stream, const char *data, size_t size, int64_t real_ns)
{
	if (out.data < 0 || out.offset - out.base >= (uint64_t)out.segment_bytes) {
		int64_t now = now_ns(CLOCK_BOOTTIME);
		if (now < out.retry_at || open_segment(real_ns) != 0) {
			out.retry_at = now < out.retry_at ? out.retry_at : now + RETRY;
			lose(size);
			return;
		}
	}
	ssize_t n = write(out.data, data, size);
	size_t written = n > 0 ? (size_t)n : 0;
	/* Bytes that no record covers are there for no reader: they are lost with the rest. */
	if (written && put_record(out.offset + written, real_ns, DATA, stream, 0) != 0)
		written = 0;
	out.offset += written;
	if (written < size)
		lose(size - written);
}

/* Before the exit record: what it says the log holds must be there after a crash of the host. */
void log_sync(void)
{
	int copy = openat(out.dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = copy < 0 ? NULL : fdopendir(copy);
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		int file = entry->d_name[0] == '.' ? -1 : openat(out.dir, entry->d_name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
		if (file >= 0) {
			fdatasync(file);
			close(file);
		}
	}
	if (dir)
		closedir(dir);
	fsync(out.dir);
}

/* The last record. If even that finds no place the log just ends, and the exit record has the total. */
void log_end(int64_t real_ns)
{
	if (out.data >= 0 || open_segment(real_ns) == 0)
		put_record(out.offset, real_ns, END, 0, 0);
}

uint64_t log_offset(void)
{
	return out.offset;
}

uint64_t log_lost(void)
{
	return out.lost;
}
