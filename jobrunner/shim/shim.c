/*
 * The shim, from its birth to the command's, and after the end of both. In between it supervises (supervise.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jobrunner.h"

#define PIPE_SIZE (256 << 10)
#define DYING_NS (5000 * MS)

/* Nothing of the server's is left: no terminal, no descriptor, no signal that was meant for it. Only SIGKILL ends a shim. */
static void leave_the_server(const struct places *places)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	signal(SIGPIPE, SIG_IGN);
	setsid();
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		dup2(places->null, fd);
	umask(0);
	prctl(PR_SET_DUMPABLE, 0);
	if (fchdir(places->dir) != 0 && chdir("/") != 0)
		return;		/* it is somewhere else then, and uses no relative path */
}

/*
 * v1: "EVENTFD FD" registers for the event that FD, an open memory.oom_control, has (cgroup v1, memory.rst). v2: the file
 * memory.events itself polls as an exception when it has changed since it was read (cgroup v2, cgroup-v2.rst).
 */
static int watch_oom(struct job *job, struct report *why)
{
	const struct places *places = job->places;
	char line[32];
	job->oom = places->oom_events;
	if (places->oom_control < 0)
		return 0;
	job->oom = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int length = snprintf(line, sizeof line, "%d %d", job->oom, places->oom_control);
	if (job->oom < 0 || write(places->event_control, line, (size_t)length) != length)
		return fail(why, "cgroup", errno, job->plan->oom_control);
	return 0;
}

/* Only our end never blocks: the job's is as a pipe always is, whichever process has it. */
static int make_output(struct job *job, int writing[2], struct report *why)
{
	for (int i = 0; i < (job->plan->merge ? 1 : 2); i++) {
		int ends[2];
		if (pipe2(ends, O_CLOEXEC) != 0)
			return fail(why, "pipe", errno, "");
		fcntl(ends[0], F_SETFL, O_NONBLOCK);
		/* Fewer and longer reads; refused past a user's quota, and that is no harm. */
		fcntl(ends[0], F_SETPIPE_SZ, PIPE_SIZE);
		job->output[i] = ends[0];
		writing[i] = ends[1];
	}
	if (job->plan->merge)
		writing[1] = writing[0];
	return 0;
}

/* What only the shim may hold. A `ctl` in init's hands would look like a shim that lives. */
static void close_private(const struct job *job, int reading, int answer)
{
	const int private[] = {job->ctl, job->ctl_keeper, job->channel, job->output[0], job->output[1], reading, answer,
			       job->places->dir, job->places->log};
	for (size_t i = 0; i < sizeof private / sizeof *private; i++)
		if (private[i] >= 0)
			close(private[i]);
}

static int map_init(const struct job *job, pid_t pid, struct report *why)
{
	const struct message mapped = {.kind = SAY_MAPPED};
	if (map_for(job->plan, pid, why) != 0)
		return -1;
	send(job->channel, &mapped, sizeof mapped, MSG_NOSIGNAL);
	return 0;
}

static int spawn_init(struct job *job, const struct birth *birth, int reading, int answer, struct report *why)
{
	const uint64_t network = job->plan->network_host ? 0 : CLONE_NEWNET;
	const uint64_t namespaces = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | network | user_namespace(job->plan);
	/* A helper maps the ids of who is dumpable alone: by the owner of its /proc (userns.c). */
	prctl(PR_SET_DUMPABLE, has_own_ids(job->plan));
	pid_t pid = spawn(namespaces, job->places->cgroup2_job, &job->init);
	const int error = errno;
	if (pid == 0) {
		close_private(job, reading, answer);
		init_main(birth);
	}
	prctl(PR_SET_DUMPABLE, 0);
	errno = error;
	if (pid < 0)
		return spawn_failed(job->places->cgroup2_job, job->plan->cgroup2_job, "init", why);
	close(birth->channel);
	close(birth->report);
	close(birth->output[0]);
	if (birth->output[1] != birth->output[0])
		close(birth->output[1]);
	return has_own_ids(job->plan) ? map_init(job, pid, why) : 0;
}

static void reap_init(struct job *job, siginfo_t *info)
{
	while (waitid(P_PIDFD, (id_t)job->init, info, WEXITED) != 0 && errno == EINTR)
		;
}

/* The same after a birth that failed; false if it does not go: a process in the hands of a dead file server may not even die. */
static bool reap_unborn(struct job *job, siginfo_t *info)
{
	struct pollfd gone = {.fd = job->init, .events = POLLIN};
	if (poll_until(&gone, 1, now_ns(CLOCK_BOOTTIME) + DYING_NS) <= 0)
		return false;
	reap_init(job, info);
	return true;
}

/*
 * Hear init and the command to the end of file. READY alone means that execve(2) has closed the other end; a report of a failure
 * is one; neither means that init died. A birth that hangs, as one does that needs something of a dead file server, is given up
 * after its time, or by a stop.
 */
static int await_command(struct job *job, int reading, struct report *why)
{
	struct report heard = {0};
	bool ready = false;
	const int64_t until = job->plan->birth_ms < 0 ? NEVER : job->started + job->plan->birth_ms * MS;
	while (why->kind != REPORT_FAILED) {
		struct pollfd fds[] = {{.fd = reading, .events = POLLIN}, {.fd = job->ctl, .events = POLLIN}};
		if (poll_until(fds, 2, until) <= 0) {
			fail(why, "init", ETIMEDOUT, "");
		} else if (!fds[0].revents) {	/* Order: a command that was executed already was started, and is stopped as one */
			if (ctl_heard_stop(job))
				fail(why, "init", ECANCELED, "stopped before it was started");
		} else if (!hear(reading, &heard)) {
			break;
		} else if (heard.kind == REPORT_READY) {
			ready = true;
		} else {
			fail(why, heard.step, heard.error, heard.detail);
		}
	}
	close(reading);
	return why->kind == REPORT_FAILED ? -1 : ready ? 0 : fail(why, "init", 0, "");
}

/* Let the command go: only now, because a start that fails must not have run anything. */
static void let_go(struct job *job)
{
	struct message go = {.kind = SAY_GO};
	send(job->channel, &go, sizeof go, MSG_NOSIGNAL);
}

/* What only the shim needs and init does not wait for: while that is at work. Nothing of the job has run yet. */
static int prepare(struct job *job, struct report *why)
{
	if (open_watched(job->plan, job->places, why) != 0 || watch_oom(job, why) != 0)
		return -1;
	if (log_open(job->places->log, job->plan, why) != 0 || copy_begin(job, why) != 0)
		return -1;
	return exit_prepare(job->places->dir, &job->record, why);
}

static int give_birth(struct job *job, int answer, struct report *why)
{
	int channel[2], reports[2], writing[2];
	if (make_output(job, writing, why) != 0)
		return -1;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) != 0 || pipe2(reports, O_CLOEXEC) != 0)
		return fail(why, "pipe", errno, "");
	job->channel = channel[0];
	struct birth birth = {job->plan, job->places, channel[1], reports[1], {writing[0], writing[1]}};
	siginfo_t info = {0};
	if (spawn_init(job, &birth, reports[0], answer, why) != 0) {
		if (job->init >= 0) {	/* born, and not mapped */
			kill_init(job);
			reap_unborn(job, &info);
		}
		return -1;
	}

	job->started = now_ns(CLOCK_BOOTTIME);
	job->last_output = job->started;
	job->record.started_real_ns = now_ns(CLOCK_REALTIME);
	if (prepare(job, why) == 0)
		let_go(job);
	else
		kill_init(job);
	if (await_command(job, reports[0], why) == 0)
		return 0;
	kill_init(job);
	if (reap_unborn(job, &info) && !why->detail[0] && !why->error && strcmp(why->step, "init") == 0)
		snprintf(why->detail, sizeof why->detail, "the job's init died of signal %d", info.si_status);
	return -1;
}

/* What was only for the birth: the directories of cgroups, mostly. */
static void close_places(const struct plan *plan, const struct places *places)
{
	const int fds[] = {places->null, places->cgroup2_shim, places->cgroup2_job, places->oom_control, places->event_control};
	for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	for (int i = 0; i < plan->n_cgroup1_shim; i++)
		close(places->cgroup1_shim[i]);
	for (int i = 0; i < plan->n_cgroup1_job; i++)
		close(places->cgroup1_job[i]);
}

/* A start that failed after `ctl` was ours leaves a record of it; before that the directory may be somebody else's. */
static _Noreturn void give_up(struct job *job, bool claimed, int answer, const struct report *why)
{
	job->record.state = STATE_FAILED;
	job->record.error = why->error;
	snprintf(job->record.step, sizeof job->record.step, "%s", why->step);
	if (claimed)
		exit_finish(job->places->dir, &job->record);
	say(answer, why);
	_exit(1);
}

/* init is gone, and with it every process of the job. */
static void settle(struct job *job)
{
	struct exit_record *record = &job->record;
	siginfo_t info;
	reap_init(job, &info);
	if (job->channel >= 0)
		take_messages(job);
	record->ended_real_ns = now_ns(CLOCK_REALTIME);
	record->wall_ns = (uint64_t)(now_ns(CLOCK_BOOTTIME) - job->started);
	copy_end();
	counters_read(record->counters);
	decide(job);
	record->state = STATE_ENDED;
	record->log_end = log_offset();
	record->lost = log_lost();
	log_sync();
	exit_finish(job->places->dir, record);
	log_end(now_ns(CLOCK_REALTIME));
}

static void set_timers(struct job *job)
{
	const struct plan *plan = job->plan;
	job->deadline = plan->timeout_ms < 0 ? NEVER : job->started + plan->timeout_ms * MS;
	job->idle_ns = plan->idle_timeout_ms < 0 ? NEVER : plan->idle_timeout_ms * MS;
}

_Noreturn void shim_main(struct plan *plan, struct places *places, int answer)
{
	static struct job job = {.ctl = -1, .ctl_keeper = -1, .init = -1, .channel = -1, .oom = -1, .log_bell = -1, .output = {-1, -1},
				 .deadline = NEVER, .idle_ns = NEVER, .kill_at = NEVER, .oom_until = NEVER};
	struct report why = {0};
	job.plan = plan;
	job.places = places;
	job.record.wait_status = -1;
	memset(job.record.counters, 0xff, sizeof job.record.counters);

	leave_the_server(places);
	bool claimed = false;
	if (enter_cgroups(places->cgroup1_shim, plan->cgroup1_shim, plan->n_cgroup1_shim, &why) == 0)
		claimed = ctl_claim(&job, &why) == 0;
	if (!claimed || give_birth(&job, answer, &why) != 0)
		give_up(&job, claimed, answer, &why);

	/* From here on failure may no longer exit. */
	struct report started = {.kind = REPORT_STARTED};
	say(answer, &started);
	close(answer);
	close_places(plan, places);
	plan_free(plan);
	set_timers(&job);
	forget_birth();
	supervise(&job);
	settle(&job);
	_exit(0);
}
