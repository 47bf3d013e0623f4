/*
 * The job's output, from its pipes into the log, by a thread of its own: the copier. A disk that stalls holds up a write for as long
 * as it pleases, and even SIGKILL does not end that (uninterruptible sleep). It holds up the copier then, and nothing else: deadlines,
 * stops and the kill are the other thread's (supervise.c), which touches no disk while the job lives.
 *
 * What comes after silence is read and recorded at once. A read of less than SMALL bytes then leaves its stream alone until a
 * millisecond is over, so that a flood of tiny writes is read together and shares an index record. The other stream is still
 * watched, and when it has something the one that waits is read first: two streams that take turns keep their order as long as
 * this thread keeps up. More than BURST such turns in one millisecond, and both wait for its end.
 *
 * The two threads share what `struct job` says, and a bell each (eventfd(2)). init is a child of the other thread, and dies with
 * that one (PR_SET_PDEATHSIG goes by threads), however long this one may be stuck.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "jobrunner.h"

#define SMALL 4096
#define BURST 16
#define STACK (64 << 10)	/* of which the copier touches a page or two */

enum { OUT, ERR, BELL, N_WATCHED };

static struct {
	pthread_t thread;
	int bell;			/* rung when the job is gone, or has been asked to end */
	atomic_bool over;		/* the job is gone */
	bool ended[2];			/* streams that nothing can come from any more */
	char data[SCRATCH_SIZE];
} copier;

static struct {
	int stream;			/* index of the one that waits */
	int turns;			/* small reads within this millisecond */
	int64_t until;			/* 0: nobody waits */
} pause_;

/* What to poll now, and when to look again if nothing comes. */
static int64_t watch(const struct job *job, struct pollfd watched[N_WATCHED])
{
	watched[BELL] = (struct pollfd){.fd = copier.bell, .events = POLLIN};
	/* Order: a job that its output has to end is asked to end before more of it is read. */
	const bool asking = atomic_load(&job->log_cause) != CAUSE_NONE;
	for (int i = OUT; i <= ERR; i++)
		watched[i] = (struct pollfd){.fd = copier.ended[i] || asking ? -1 : job->output[i], .events = POLLIN};
	if (asking)
		return NEVER;
	if (now_ns(CLOCK_BOOTTIME) >= pause_.until) {
		pause_.until = 0;
		pause_.turns = 0;
		return NEVER;
	}
	watched[pause_.stream].fd = -1;
	if (pause_.turns > BURST)
		watched[!pause_.stream].fd = -1;
	return pause_.until;
}

static void begin_pause(int stream, int64_t now)
{
	if (!pause_.until)
		pause_.until = now + MS;
	pause_.stream = stream;
	pause_.turns++;
}

static void put(struct job *job, int stream, size_t size)
{
	log_write(stream ? STREAM_STDERR : STREAM_STDOUT, copier.data, size, now_ns(CLOCK_REALTIME));
	const enum cause cause = log_cause();
	if (cause != CAUSE_NONE) {
		atomic_store(&job->log_cause, cause);
		eventfd_write(job->log_bell, 1);
	}
}

/* At most `most` bytes of one stream into the log; how many there were, 0 if there is nothing (more). */
static size_t copy(struct job *job, int stream, size_t most)
{
	ssize_t n = read(job->output[stream], copier.data, most < sizeof copier.data ? most : sizeof copier.data);
	if (n > 0) {
		const int64_t now = now_ns(CLOCK_BOOTTIME);
		atomic_store(&job->last_output, now);
		put(job, stream, (size_t)n);
		if (n < SMALL)
			begin_pause(stream, now);
		return (size_t)n;
	}
	if (n == 0 || (errno != EAGAIN && errno != EINTR))
		copier.ended[stream] = true;	/* nobody holds its other end: nothing can come any more, and POLLHUP would spin */
	return 0;
}

/* After a poll of what `watch` gave. */
static void copy_ready(struct job *job, const struct pollfd watched[N_WATCHED])
{
	bool ready[2] = {watched[OUT].revents != 0, watched[ERR].revents != 0};
	int first = 0;
	if (pause_.until && ready[!pause_.stream] && !copier.ended[pause_.stream]) {
		first = pause_.stream;		/* Order: what it has was written before, or just now */
		ready[first] = true;
	}
	for (int i = 0; i < 2; i++)
		if (ready[first ^ i])
			copy(job, first ^ i, sizeof copier.data);
}

/*
 * What is left when init is gone. A stranger that was handed a pipe may hold it open, and even write to it, for ever: what the job
 * wrote is what is in the pipe now, and no more than that is read.
 */
static void copy_rest(struct job *job)
{
	for (int i = 0; i < 2; i++) {
		int left = 0;
		if (copier.ended[i] || ioctl(job->output[i], FIONREAD, &left) != 0)
			continue;
		for (size_t n = 1; n && left > 0 && !copier.ended[i]; left -= (int)n)
			n = copy(job, i, (size_t)left);
	}
}

static void *copier_main(void *argument)
{
	struct job *job = argument;
	struct pollfd watched[N_WATCHED];
	eventfd_t rung;
	while (!atomic_load(&copier.over)) {
		const int64_t until = watch(job, watched);
		if (poll_until(watched, N_WATCHED, until) <= 0)
			continue;
		if (watched[BELL].revents)
			eventfd_read(copier.bell, &rung);
		copy_ready(job, watched);
	}
	copy_rest(job);
	return NULL;
}

/* After init was made, which would have both otherwise: the descriptors, and a copy of whatever this thread holds at that moment. */
int copy_begin(struct job *job, struct report *why)
{
	pthread_attr_t attributes;
	for (int i = 0; i < 2; i++)
		copier.ended[i] = job->output[i] < 0;
	job->log_bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	copier.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (job->log_bell < 0 || copier.bell < 0)
		return fail(why, "pipe", errno, "");
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	const int error = pthread_create(&copier.thread, &attributes, copier_main, job);
	pthread_attr_destroy(&attributes);
	return error ? fail(why, "clone", error, "copier") : 0;
}

/* What the log says of the output: why the job should be ended, CAUSE_NONE if nothing does. `copy_go_on` after it was asked to. */
enum cause copy_cause(struct job *job)
{
	eventfd_t rung;
	eventfd_read(job->log_bell, &rung);
	return atomic_load(&job->log_cause);
}

void copy_go_on(struct job *job)
{
	atomic_store(&job->log_cause, CAUSE_NONE);
	eventfd_write(copier.bell, 1);
}

/*
 * Bytes that the job has written and that have not been read yet. `full`: it may be waiting until they are. A full pipe holds at least
 * half of its size, because a write that does not fit into the rest of a page takes the next one.
 */
int copy_unread(const struct job *job, bool *full)
{
	int sum = 0;
	*full = false;
	for (int i = 0; i < 2; i++) {
		int left = 0;
		if (job->output[i] < 0 || ioctl(job->output[i], FIONREAD, &left) != 0)
			continue;
		sum += left;
		*full |= left > 0 && left >= fcntl(job->output[i], F_GETPIPE_SZ) / 2;
	}
	return sum;
}

/* init is gone: wait until all that it has written is in the log, and for the disk if need be. */
void copy_end(void)
{
	atomic_store(&copier.over, true);
	eventfd_write(copier.bell, 1);
	pthread_join(copier.thread, NULL);
}
