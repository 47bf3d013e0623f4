/*
 * `ctl`, the FIFO that the shim is told through, and the file `stop` (docs/formats.md).
 *
 * Whoever makes `ctl` owns the start of the job: a shim, or a server that finds a job without one and decides that it never starts.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

/* The line as far as it has come; longer ones are not known and are only skipped. */
static struct {
	char text[16];
	size_t length;
} line;

/* Both ends are opened before it has its name: whoever finds `ctl` finds a reader, or its shim is dead (ENXIO). */
static int open_ends(struct job *job, const char *name)
{
	job->ctl = openat(job->places->dir, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (job->ctl < 0)
		return errno;
	/* Held for ever and never used: without a writer of our own a server that leaves would hang up, and poll would spin. */
	job->ctl_keeper = openat(job->places->dir, name, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
	return job->ctl_keeper < 0 ? errno : 0;
}

/* Whether the directory is where it was given. */
static bool in_its_place(const struct job *job)
{
	struct stat here, there;
	return fstat(job->places->dir, &here) == 0 && stat(job->plan->dir, &there) == 0 && here.st_dev == there.st_dev &&
	       here.st_ino == there.st_ino;
}

/* EEXIST if somebody else has claimed the start; ENOENT if he has removed the job since. */
int ctl_claim(struct job *job, struct report *why)
{
	int dir = job->places->dir, error;
	uint32_t random = 0;
	char name[24];
	/* A name of its own for each claimant, two of which may be at it at the same time. */
	if (getrandom(&random, sizeof random, 0) < 0)
		return fail(why, "claim", errno, "");
	snprintf(name, sizeof name, ".ctl.%08x", random);
	if (mkfifoat(dir, name, 0600) != 0)
		return fail(why, "claim", errno, "");
	error = open_ends(job, name);
	if (!error && syscall(SYS_renameat2, dir, name, dir, "ctl", 1U /* RENAME_NOREPLACE */) != 0)
		error = errno;
	/* Order: whoever gives a start up moves the directory away before his `ctl` in it goes, so that ours could take its place. */
	if (!error && !in_its_place(job)) {
		error = ENOENT;
		unlinkat(dir, "ctl", 0);
	}
	if (!error)
		return 0;
	unlinkat(dir, name, 0);
	return fail(why, "claim", error, "");
}

/* Read what is there; true if a line `stop` was completed. */
bool ctl_heard_stop(struct job *job)
{
	bool stop = false;
	char text[512];
	ssize_t n = read(job->ctl, text, sizeof text);
	for (ssize_t i = 0; i < n; i++) {
		if (text[i] != '\n') {
			if (line.length < sizeof line.text)
				line.text[line.length] = text[i];
			line.length++;
			continue;
		}
		stop |= line.length == 4 && memcmp(line.text, "stop", 4) == 0;
		line.length = 0;
	}
	return stop;
}

/*
 * What the file `stop` asks for; false if there is none and nobody has asked on `ctl` either. A stop that was asked for is never
 * dropped: where the file cannot be read, or is a newer server's, it is the job's own signal and grace period.
 */
bool ctl_stop_file(const struct job *job, bool asked, struct stop *stop)
{
	int fd = openat(job->places->dir, "stop", O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0 && errno == ENOENT && !asked)
		return false;
	ssize_t size = fd < 0 ? -1 : read(fd, scratch, sizeof scratch);
	if (fd >= 0)
		close(fd);
	if (size <= 0 || !stop_parse(scratch, (size_t)size, stop))
		*stop = (struct stop){CAUSE_STOPPED, job->plan->stop_signal, job->plan->grace_ms};
	return true;
}
