/*
 * The supervisor: one loop over descriptors and timers. What ends a job, and why, is decided here and nowhere else.
 *
 * From the report `started` on nothing here may exit: whatever fails, the loop goes on until init is gone. Nor may anything here wait
 * for the disk, which may stall: what is written is the copier's (copy.c), and the file `stop`, which is read, has just been written.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "jobrunner.h"

/* ppoll's own clock stands still while the host sleeps, so timers are looked at this often. */
#define LONGEST_WAIT (60 * 1000 * MS)
#define OOM_WAIT (1000 * MS)
#define OOM_TICK (5 * MS)
#define IDLE_LOOKS 16	/* in the time of an idle timeout, which is late by one of them at most while the disk stalls */

enum { INIT, CHANNEL, CTL, OOM, LOG, N_WATCHED };

/*
 * With init goes everything in its PID namespace (pid_namespaces(7)), whether it goes by our kill, after its command's own end, or by
 * the kernel's kill of the whole cgroup. The limits that would hold that up go with init (lift.c). The signal makes sure that it does
 * go, whoever spoke in its name, before they do.
 */
static void let_it_die(const struct job *job)
{
	send_signal(job->init, SIGKILL);
	lift_limits(job->places);
}

/* The one way to end a job that has not ended by itself. */
void kill_init(struct job *job)
{
	job->killed = true;
	job->kill_at = NEVER;
	let_it_die(job);
}

/*
 * The stop signal through init, and the kill after the grace period. Later requests, whatever their cause, change nothing but the
 * time of the kill, and that only to an earlier one; one that comes after the kill is not what ended the job.
 */
static void begin_stop(struct job *job, enum cause cause, int64_t signal, int64_t grace_ms)
{
	int64_t kill_at = now_ns(CLOCK_BOOTTIME) + grace_ms * MS;
	if (!job->killed && kill_at < job->kill_at)
		job->kill_at = kill_at;
	if (job->stop_cause != CAUSE_NONE || job->killed)
		return;
	job->stop_cause = cause;
	struct message message = {SAY_SIGNAL, (int32_t)signal};
	if (grace_ms > 0)
		send(job->channel, &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* What the log says of the output: it is more than is kept, or cannot be written. */
static void take_log(struct job *job)
{
	const enum cause cause = copy_cause(job);
	if (cause != CAUSE_NONE)
		begin_stop(job, cause, job->plan->stop_signal, job->plan->grace_ms);
	copy_go_on(job);
}

static void take_stop(struct job *job, bool asked)
{
	struct stop stop;
	if (ctl_stop_file(job, asked, &stop))
		begin_stop(job, stop.cause, stop.signal, stop.grace_ms);
}

/*
 * What init says. False if it will say nothing more.
 *
 * Race: an init that leaves with a request of ours unread gives ECONNRESET, once, and before what it has said, which is still there
 * (the kernel's net/unix/af_unix.c, unix_release_sock).
 */
bool take_messages(struct job *job)
{
	struct message message;
	ssize_t n;
	for (;;) {
		n = recv(job->channel, &message, sizeof message, MSG_DONTWAIT);
		if (n < 0 && errno == ECONNRESET)
			continue;
		if (n != (ssize_t)sizeof message)
			break;
		if (message.kind == SAY_DELIVERED)
			job->delivered = true;
		if (message.kind == SAY_EXITED) {
			job->exited = true;
			job->wait_status = message.value;
			let_it_die(job);
		}
	}
	return n < 0 && errno == EAGAIN;
}

/*
 * v2: the kernel kills the whole job, memory.oom.group, and its count of kills is there before the event that tells it. Our own kill
 * comes on top for the CPU limit's sake, under which a dying job takes its time.
 */
static void take_oom_events(struct job *job)
{
	const uint64_t kills = counter_in(job->oom, "oom_kill");
	if (kills == 0)
		return;
	job->oom = -1;		/* nothing more to learn, or not to be read */
	if (kills != UNKNOWN) {
		job->oom_kill = true;
		kill_init(job);
	}
}

/*
 * v1 has no memory.oom.group: the kernel's eventfd tells that the job is out of memory, and we kill the rest of it. But the event
 * also comes when a cgroup above ours is out of memory, to every job below it, and then somebody else may be the one that the
 * kernel kills. So it is only a hint to look at our own count of kills, which grows a moment later, and a little longer where the
 * CPU limit holds the kernel's work back. Who cannot count believes the event.
 */
static void take_oom(struct job *job)
{
	uint64_t count;
	if (job->places->oom_events >= 0)
		take_oom_events(job);
	else if (read(job->oom, &count, sizeof count) == (ssize_t)sizeof count)
		job->oom_until = now_ns(CLOCK_BOOTTIME) + OOM_WAIT;
}

static void check_oom(struct job *job, int64_t now)
{
	if (job->oom_until == NEVER)
		return;
	counters_read(job->record.counters);
	if (job->record.counters[OOM_KILLS] != 0) {
		job->oom_kill = true;
		kill_init(job);
	}
	if (job->oom_kill || now >= job->oom_until)
		job->oom_until = NEVER;
}

/* What the copier has not read, because the disk stalls, is output all the same; and a job that waits for it is not silent. */
static void look_for_output(struct job *job, int64_t now)
{
	bool full;
	const int unread = copy_unread(job, &full);
	if (full || unread > job->unread)
		job->last_output = now;
	job->unread = unread;
}

static void run_timers(struct job *job, int64_t now)
{
	if (now >= job->deadline) {
		job->deadline = NEVER;
		begin_stop(job, CAUSE_DEADLINE, job->plan->stop_signal, job->plan->grace_ms);
	}
	if (job->idle_ns != NEVER)
		look_for_output(job, now);
	if (job->idle_ns != NEVER && now - job->last_output >= job->idle_ns) {
		job->idle_ns = NEVER;
		begin_stop(job, CAUSE_IDLE_TIMEOUT, job->plan->stop_signal, job->plan->grace_ms);
	}
	check_oom(job, now);
	if (now >= job->kill_at)
		kill_init(job);
}

static int64_t next_timer(const struct job *job, int64_t now)
{
	int64_t next = job->deadline < job->kill_at ? job->deadline : job->kill_at;
	if (job->idle_ns != NEVER) {
		const int64_t look_at = now + job->idle_ns / IDLE_LOOKS, silent_at = job->last_output + job->idle_ns;
		next = look_at < next ? look_at : next;
		next = silent_at < next ? silent_at : next;
	}
	if (job->oom_until != NEVER && now + OOM_TICK < next)
		next = now + OOM_TICK;
	return next;
}

static void wait_for_something(struct job *job, struct pollfd watched[N_WATCHED])
{
	int64_t now = now_ns(CLOCK_BOOTTIME), wake = next_timer(job, now);
	const int fds[N_WATCHED] = {
		[INIT] = job->init, [CHANNEL] = job->channel, [CTL] = job->ctl, [OOM] = job->oom, [LOG] = job->log_bell
	};
	for (int i = 0; i < N_WATCHED; i++)
		watched[i] = (struct pollfd){.fd = fds[i], .events = POLLIN};
	if (job->places->oom_events >= 0)
		watched[OOM].events = POLLPRI;
	int64_t rest = wake <= now ? 0 : wake - now < LONGEST_WAIT ? wake - now : LONGEST_WAIT;
	struct timespec timeout = {rest / (1000 * MS), rest % (1000 * MS)};
	if (ppoll(watched, N_WATCHED, wake == NEVER ? NULL : &timeout, NULL) < 0)
		for (int i = 0; i < N_WATCHED; i++)
			watched[i].revents = 0;
}

/* Until init is gone. */
void supervise(struct job *job)
{
	struct pollfd watched[N_WATCHED];
	take_stop(job, false);		/* one that was asked for before `ctl` had its name */
	do {
		wait_for_something(job, watched);
		if (watched[OOM].revents)
			take_oom(job);
		run_timers(job, now_ns(CLOCK_BOOTTIME));
		if (watched[CTL].revents && ctl_heard_stop(job))
			take_stop(job, true);
		if (watched[LOG].revents)
			take_log(job);
		if (watched[CHANNEL].revents && !take_messages(job)) {
			close(job->channel);	/* a hang-up would spin until the kernel has ended the namespace */
			job->channel = -1;
			let_it_die(job);
		}
	} while (!watched[INIT].revents);
}

/*
 * The truth about the end, from what was seen; after the counters were read for the last time.
 *
 * A stop is the reason only if its signal found the command alive, or if the kill came before the command's own end was told. A
 * command that nobody saw ending was killed with init.
 */
void decide(struct job *job)
{
	struct exit_record *record = &job->record;
	uint64_t counted = record->counters[OOM_KILLS];
	bool stopped = job->stop_cause != CAUSE_NONE && (job->exited ? job->delivered : job->killed);
	bool oom = (counted != UNKNOWN && counted > 0) || (job->oom_kill && !job->exited);
	record->cause = stopped ? job->stop_cause : oom ? CAUSE_OOM_KILLED : job->exited ? CAUSE_OWN_END : CAUSE_LOST;
	record->wait_status = job->exited ? job->wait_status : record->cause == CAUSE_LOST ? -1 : SIGKILL;
}
