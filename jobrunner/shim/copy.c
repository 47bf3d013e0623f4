/*
 * The job's output, from its pipes into the log.
 *
 * What comes after silence is read and recorded at once. A read of less than SMALL bytes then leaves its stream alone until a
 * millisecond is over, so that a flood of tiny writes is read together and shares an index record. The other stream is still
 * watched, and when it has something the one that waits is read first: two streams that take turns keep their order as long as
 * this process keeps up. More than BURST such turns in one millisecond, and both wait for its end.
 *
 * Each call reads a stream once, so a flood never keeps the supervisor from its timers and from `ctl`.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "jobrunner.h"

#define SMALL 4096
#define BURST 16

static struct {
	int stream;			/* index of the one that waits */
	int turns;			/* small reads within this millisecond */
	int64_t until;			/* 0: nobody waits */
} pause_;

/* What to poll now, and when to look again if nothing comes. */
void copy_watch(const struct job *job, int64_t now, struct pollfd out[2], int64_t *wake)
{
	for (int i = 0; i < 2; i++)
		out[i] = (struct pollfd){.fd = job->output[i], .events = POLLIN};
	if (now >= pause_.until) {
		pause_.until = 0;
		pause_.turns = 0;
		return;
	}
	out[pause_.stream].fd = -1;
	if (pause_.turns > BURST)
		out[!pause_.stream].fd = -1;
	if (pause_.until < *wake)
		*wake = pause_.until;
}

static void begin_pause(int stream, int64_t now)
{
	if (!pause_.until)
		pause_.until = now + MS;
	pause_.stream = stream;
	pause_.turns++;
}

/* At most `most` bytes of one stream into the log; how many there were, 0 if there is nothing (more). */
static size_t copy(struct job *job, int stream, size_t most)
{
	ssize_t n = read(job->output[stream], scratch, most < sizeof scratch ? most : sizeof scratch);
	if (n > 0) {
		job->last_output = now_ns(CLOCK_BOOTTIME);
		log_write(stream ? STREAM_STDERR : STREAM_STDOUT, scratch, (size_t)n, now_ns(CLOCK_REALTIME));
		if (n < SMALL)
			begin_pause(stream, job->last_output);
		return (size_t)n;
	}
	if (n == 0 || (errno != EAGAIN && errno != EINTR)) {
		/* Nobody holds its other end: nothing can come any more, and POLLHUP would spin. */
		close(job->output[stream]);
		job->output[stream] = -1;
	}
	return 0;
}

/* After a poll of what `copy_watch` gave. */
void copy_ready(struct job *job, const struct pollfd out[2])
{
	bool ready[2] = {out[0].revents != 0, out[1].revents != 0};
	int first = 0;
	if (pause_.until && ready[!pause_.stream] && job->output[pause_.stream] >= 0) {
		first = pause_.stream;		/* Order: what it has was written before, or just now */
		ready[first] = true;
	}
	for (int i = 0; i < 2; i++)
		if (ready[first ^ i])
			copy(job, first ^ i, sizeof scratch);
}

/*
 * What is left when init is gone. A stranger that was handed a pipe may hold it open, and even write to it, for ever: what the job
 * wrote is what is in the pipe now, and no more than that is read.
 */
void copy_rest(struct job *job)
{
	for (int i = 0; i < 2; i++) {
		int left = 0;
		if (job->output[i] < 0 || ioctl(job->output[i], FIONREAD, &left) != 0)
			continue;
		for (size_t n = 1; n && left > 0 && job->output[i] >= 0; left -= (int)n)
			n = copy(job, i, (size_t)left);
	}
}
