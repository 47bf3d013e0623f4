/*
 * The exit record (docs/formats.md): allocated and synced before the command is let go, overwritten in place at the end, so that
 * neither a full disk nor a crash in between loses how a job ended.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "jobrunner.h"

static int file = -1;

/* 0 or errno. */
static int put(struct exit_record *record)
{
	memcpy(record->magic, "JREXIT", sizeof record->magic);
	record->version = 1;
	record->checksum = crc32_of(record, offsetof(struct exit_record, checksum));
	ssize_t n = pwrite(file, record, sizeof *record, 0);
	if (n != (ssize_t)sizeof *record)
		return n < 0 ? errno : ENOSPC;
	return fdatasync(file) == 0 ? 0 : errno;
}

static int create(int dir)
{
	file = openat(dir, "exit", O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	return file < 0 ? errno : 0;
}

int exit_prepare(int dir, struct exit_record *record, struct report *why)
{
	record->state = STATE_RUNNING;
	int error = create(dir);
	if (!error)
		error = put(record);
	if (!error && fsync(dir) != 0)
		error = errno;
	return error ? fail(why, "exit", error, "") : 0;
}

/*
 * In place where it was prepared. One that cannot be written leaves the record that says `running`: the job is then told as lost.
 * A start that failed earlier has none yet, and gets one if it can.
 */
void exit_finish(int dir, struct exit_record *record)
{
	if (file >= 0 || create(dir) == 0)
		put(record);
}
