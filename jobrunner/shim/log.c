/*
 * The log as it is written (docs/formats.md): first the bytes, then the index record that covers them.
 *
 * A reader believes the index alone, so whatever ends this process in between loses nothing that was told. Nothing is held back
 * here; tiny writes share a record because they are read together (copy.c).
 *
 * A write that fails or is short ends the segment: what was written is indexed, the rest is lost and counted, and the next segment
 * is named by the offset after it and begins with a gap record. Nothing is tried again in place and nothing waits, so a full disk
 * costs the job bytes of its log and no time. What is past a limit that ends the job is lost in the same way.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "jobrunner.h"

#define RETRY (10 * MS)		/* between attempts to make a segment on a full disk: each is some writes to a directory */
#define LEAST_PIECE 4096
#define LARGE_SEGMENT (1 << 20)	/* smaller ones may well be gone before the kernel would write them to the disk by itself, */
#define SLOW (1000 * MS)		/* and so may those that were filled within this time */
#define RECORD sizeof(struct index_record)

enum { DATA = 1, GAP, END };
enum reason { WRITE_ERROR, PAST_LIMIT };	/* of a gap; the field `stream` of its record */

static struct {
	int dir, data, index;		/* data is -1 when no segment is open */
	bool limit_stops, error_stops;
	bool full;			/* what comes now is past the limit, for ever */
	enum cause cause;		/* why the job should be ended, until that was asked for */
	enum reason reason;		/* of what is untold, by its first byte */
	uint64_t segment_bytes, piece;	/* when the next segment is due; bytes written at once */
	int64_t retry_at, begun;	/* when the segment was begun */
	uint64_t base, offset, size;	/* of the segment; of the next byte; data and index of the segment */
	uint64_t untold, lost;		/* bytes lost that no gap record tells yet; all bytes lost */
} out = {.dir = -1, .data = -1, .index = -1};

static void close_segment(void)
{
	if (out.data >= 0) {
		close(out.data);
		close(out.index);
	}
	out.data = out.index = -1;
}

/*
 * Let the kernel begin to write a full segment to the disk, so that the end of the job need not wait for all of it. That takes time
 * of ours, which a job that writes fast would feel: what it writes goes to the disk when the kernel, or the end, has it so.
 */
static void write_early(int64_t now)
{
	if (out.data >= 0 && out.size >= LARGE_SEGMENT && now - out.begun >= SLOW)
		sync_file_range(out.data, 0, 0, SYNC_FILE_RANGE_WRITE);
}

static void grow(size_t size)
{
	out.size += size;
	retention_grow(size);
}

/* `bytes` that a gap has lost, or that a record of data covers. */
static int put_record(uint64_t end, int64_t real_ns, uint32_t kind, uint32_t stream, uint64_t bytes)
{
	struct index_record record = {end, real_ns, kind, stream, {bytes}};
	if (kind != GAP)
		record.checksum = crc32_of(&record, offsetof(struct index_record, checksum));
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
		error = put_record(out.offset, real_ns, GAP, out.reason, out.untold);
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
	char data[SEGMENT_NAME], index[SEGMENT_NAME];
	const int64_t now = now_ns(CLOCK_BOOTTIME);
	write_early(now);
	close_segment();
	segment_names(out.offset, data, index);
	int error = create_segment(data, index, real_ns);
	if (!error) {
		out.base = out.offset;
		out.begun = now;
		out.size = 0;
		retention_begin(out.base);
		grow(out.untold ? RECORD : 0);
		out.untold = 0;
	}
	return error;
}

/* Takes over `dir`, the directory `log`. A segment is an eighth of the limit at most, so that what is kept is most of it. */
int log_open(int dir, const struct plan *plan, struct report *why)
{
	const uint64_t most = plan->output_limit > 0 ? (uint64_t)plan->output_limit / 8 : UINT64_MAX;
	out.dir = dir;
	out.segment_bytes = (uint64_t)plan->segment_bytes < most ? (uint64_t)plan->segment_bytes : most;
	out.piece = out.segment_bytes > LEAST_PIECE ? out.segment_bytes : LEAST_PIECE;
	out.limit_stops = plan->limit_stops;
	out.error_stops = plan->error_stops;
	retention_open(dir, plan->output_limit, plan->limit_stops);
	int error = open_segment(0);
	return error ? fail(why, "log", error, "") : 0;
}

static void lose(size_t size)
{
	const enum reason reason = out.full ? PAST_LIMIT : WRITE_ERROR;
	if (out.error_stops && reason == WRITE_ERROR) {
		out.cause = CAUSE_LOG_ERROR;
		out.error_stops = false;	/* it is asked for once */
	}
	close_segment();
	if (!out.untold)
		out.reason = reason;
	out.offset += size;
	out.untold += size;
	out.lost += size;
}

/* Bytes that no record covers are there for no reader: they are lost, and must not take up room either. */
static void take_back(size_t size)
{
	const uint64_t data = out.offset - out.base;
	if (ftruncate(out.data, (off_t)data) != 0 || ftruncate(out.index, (off_t)(out.size - data)) != 0)
		grow(size + RECORD);	/* they may still be there */
}

/* How many of these bytes are in the log now. */
static size_t put(enum stream stream, const char *data, size_t size, int64_t real_ns)
{
	const bool next = out.data < 0 || out.size >= out.segment_bytes;
	const int64_t now = next ? now_ns(CLOCK_BOOTTIME) : 0;
	if (out.full || (next && now < out.retry_at))
		return 0;
	const size_t room = retention_room(size, next && out.untold ? 2 : 1);
	if (room < size && out.limit_stops) {
		out.full = true;
		out.cause = CAUSE_OUTPUT_LIMIT;
	}
	if (!room)
		return 0;
	if (next && open_segment(real_ns) != 0) {
		out.retry_at = now + RETRY;
		return 0;
	}
	ssize_t n = write(out.data, data, room);
	size_t written = n > 0 ? (size_t)n : 0;
	if (written && put_record(out.offset + written, real_ns, DATA, stream, written) != 0) {
		take_back(written);
		return 0;
	}
	grow(written ? written + RECORD : 0);
	out.offset += written;
	return written;
}

/* What was read from a stream at once. Never fails for the caller: what cannot be written is counted. */
void log_write(enum stream stream, const char *data, size_t size, int64_t real_ns)
{
	size_t piece = 0, kept = 0;
	for (; size && kept == piece; data += kept, size -= kept) {
		piece = size < out.piece ? size : out.piece;
		kept = put(stream, data, piece, real_ns);
	}
	if (size)
		lose(size);
}

/* Why the job should be ended, once; CAUSE_NONE if nothing says so. */
enum cause log_cause(void)
{
	enum cause cause = out.cause;
	out.cause = CAUSE_NONE;
	return cause;
}

static void begin_writing(int file)
{
	sync_file_range(file, 0, 0, SYNC_FILE_RANGE_WRITE);
}

static void finish_writing(int file)
{
	struct stat found;
	if (fstat(file, &found) != 0 || found.st_size)	/* an empty one is its name alone */
		fdatasync(file);
}

static void each_file(void (*act)(int file))
{
	int copy = openat(out.dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = copy < 0 ? NULL : fdopendir(copy);
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		int file = entry->d_name[0] == '.' ? -1 : openat(out.dir, entry->d_name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
		if (file >= 0) {
			act(file);
			close(file);
		}
	}
	if (dir)
		closedir(dir);
}

/*
 * Before the exit record: what it says the log holds must be there after a crash of the host. All is on its way before anything is
 * waited for, so that a journal takes it in one go.
 */
void log_sync(void)
{
	each_file(begin_writing);
	each_file(finish_writing);
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
