/*
 * The shim: the job's only supervisor. One loop over descriptors and timers; what ends a job, and why, is decided here and nowhere else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

#define MS 1000000LL
#define NEVER INT64_MAX
#define SMALL_READ 4096
#define PIPE_SIZE (256 << 10)
#define OOM_COUNT_MS 20

enum { CTL, CHANNEL, INIT, OUT, ERR, OOM, N_FDS };

static struct {
	int dir;
	struct pollfd fds[N_FDS];
	char line[64];			/* of ctl, as far as it has come */
	size_t line_length;
	int64_t started, deadline, idle_at, kill_at, pause_until;	/* CLOCK_BOOTTIME, ns */
	int64_t idle_ns, grace_ms;
	int stop_signal;
	enum cause stop_cause;		/* asked for; counts if it was delivered, or if we killed */
	bool delivered, killed, oom, exited;
	int wait_status;
	struct exit_record record;
} self;

static char buffer[64 << 10];

static int64_t earliest(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t after_ms(int64_t ms)
{
	return ms < 0 ? NEVER : now_ns(CLOCK_BOOTTIME) + ms * MS;
}

/* Make `ctl` appear, or learn that somebody else has claimed the start. Both ends are ours: a server that dies leaves no hang-up. */
static bool claim(struct failure *failure)
{
	static const char fresh[] = ".ctl.new";
	unlinkat(self.dir, fresh, 0);
	if (mkfifoat(self.dir, fresh, 0600) != 0)
		return fail(failure, "claim", errno, "");
	self.fds[CTL].fd = openat(self.dir, fresh, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (self.fds[CTL].fd < 0 || openat(self.dir, fresh, O_WRONLY | O_NONBLOCK | O_CLOEXEC) < 0)
		return fail(failure, "claim", errno, "");
	if (syscall(SYS_renameat2, self.dir, fresh, self.dir, "ctl", 1U /* RENAME_NOREPLACE */) != 0) {
		int error = errno;
		unlinkat(self.dir, fresh, 0);
		return fail(failure, "claim", error, "");
	}
	return true;
}

/* v1 has no memory.oom.group: the kernel tells of an OOM kill through an eventfd, and we kill the rest. */
static bool watch_oom(const char *oom_control, struct failure *failure)
{
	char path[PATH_MAX], line[32];
	if (!oom_control)
		return true;
	const char *slash = strrchr(oom_control, '/');
	snprintf(path, sizeof path, "%.*s/cgroup.event_control", slash ? (int)(slash - oom_control) : 0, oom_control);
	int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), memory = open(oom_control, O_RDONLY | O_CLOEXEC);
	int control = open(path, O_WRONLY | O_CLOEXEC);
	snprintf(line, sizeof line, "%d %d", event, memory);
	bool watched = event >= 0 && memory >= 0 && control >= 0 && write(control, line, strlen(line)) > 0;
	if (!watched)
		fail(failure, "cgroup", errno, oom_control);
	if (memory >= 0)
		close(memory);
	if (control >= 0)
		close(control);
	self.fds[OOM].fd = event;
	return watched;
}

static bool make_output(bool merge, int output[2], struct failure *failure)
{
	for (int i = 0; i < (merge ? 1 : 2); i++) {
		int ends[2];
		if (pipe2(ends, O_CLOEXEC) != 0)
			return fail(failure, "pipe", errno, "");
		fcntl(ends[0], F_SETFL, O_NONBLOCK);
		fcntl(ends[0], F_SETPIPE_SZ, PIPE_SIZE);	/* a bigger pipe is faster; without it the job still runs */
		self.fds[OUT + i].fd = ends[0];
		output[i] = ends[1];
	}
	if (merge)
		output[1] = output[0];
	return true;
}

/* Read what init and the command say of their birth, to the end of file. True if the command was executed. */
static bool read_birth(int birth, struct failure *failure)
{
	char text[512];
	size_t length = 0;
	ssize_t n;
	while ((n = read(birth, text + length, sizeof text - 1 - length)) > 0 || (n < 0 && errno == EINTR))
		length += n > 0 ? (size_t)n : 0;
	text[length] = '\0';
	close(birth);
	if (strcmp(text, "ready\n") == 0)
		return true;
	char step[STEP_SIZE] = "init", detail[128] = "died";
	int error = 0;
	char *failed = strstr(text, "failed ");
	if (failed) {
		*detail = '\0';
		sscanf(failed, "failed %15s %d %127[^\n]", step, &error, detail);
	}
	return fail(failure, step, error, detail);
}

static void kill_init(void)
{
	self.killed = true;
	self.kill_at = NEVER;
	syscall(SYS_pidfd_send_signal, self.fds[INIT].fd, SIGKILL, NULL, 0);
}

static void reap_init(void)
{
	siginfo_t info;
	while (waitid(P_PIDFD, (id_t)self.fds[INIT].fd, &info, WEXITED) != 0 && errno == EINTR)
		;
}

/* Everything up to READY. What fails here is told, and leaves nothing. */
static bool give_birth(const struct plan *plan, const struct places *places, struct failure *failure)
{
	int output[2], channel[2], birth[2];
	int bad = enter_cgroups(places->cgroup1_shim, plan->n_cgroup1_shim);
	if (bad >= 0)
		return fail(failure, "cgroup", errno, plan->cgroup1_shim[bad]);
	if (!claim(failure))
		return false;
	log_open(self.dir, plan->segment_bytes, failure);
	if (failure->step[0] || !watch_oom(plan->oom_control, failure) || !make_output(plan->merge, output, failure))
		return false;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, channel) != 0 || pipe2(birth, O_CLOEXEC) != 0)
		return fail(failure, "pipe", errno, "");
	self.started = now_ns(CLOCK_BOOTTIME);
	self.record.state = STATE_RUNNING;
	self.record.wait_status = -1;
	self.record.started_ns = now_ns(CLOCK_REALTIME);
	counters_keep(plan, &self.record);

	uint64_t namespaces = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS;
	pid_t init = birth_of(namespaces, places->cgroup2_job, &self.fds[INIT].fd);
	if (init == 0) {
		close(channel[0]);	/* its hang-up is how init learns that the shim is gone */
		init_main(plan, places, channel[1], birth[1], output);
	}
	if (init < 0)
		return fail(failure, "clone", errno, "init");
	close(channel[1]);
	close(birth[1]);
	close(output[0]);
	if (output[1] != output[0])
		close(output[1]);
	self.fds[CHANNEL].fd = channel[0];
	int error = exit_preallocate(self.dir, &self.record);	/* while init is at work */
	if (error)
		fail(failure, "exit", error, "");
	if (!error && read_birth(birth[0], failure))
		return true;
	kill_init();
	reap_init();
	return false;
}

/* Later requests change nothing but the kill, and that only to earlier. */
static void begin_stop(enum cause cause, int signal, int64_t grace_ms)
{
	struct message message = {SAY_SIGNAL, signal};
	self.kill_at = earliest(self.kill_at, after_ms(grace_ms));
	if (self.stop_cause != CAUSE_NONE)
		return;
	self.stop_cause = cause;
	send(self.fds[CHANNEL].fd, &message, sizeof message, MSG_NOSIGNAL);
}

static void take_stop_file(void)
{
	char text[4096];
	struct stop_request request;
	int fd = openat(self.dir, "stop", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	ssize_t size = read(fd, text, sizeof text);
	close(fd);
	if (size > 0 && parse_stop(text, (size_t)size, &request) == 0)
		begin_stop((enum cause)request.cause, request.signal, request.grace_ms);
}

static void take_ctl(void)
{
	char byte;
	while (read(self.fds[CTL].fd, &byte, 1) == 1) {
		if (byte != '\n') {
			if (self.line_length < sizeof self.line)
				self.line[self.line_length++] = byte;
			continue;
		}
		if (self.line_length == 4 && memcmp(self.line, "stop", 4) == 0)
			take_stop_file();
		self.line_length = 0;
	}
}

static void take_messages(void)
{
	struct message message;
	ssize_t n;
	while ((n = recv(self.fds[CHANNEL].fd, &message, sizeof message, MSG_DONTWAIT)) == sizeof message) {
		if (message.kind == SAY_DELIVERED) {
			self.delivered = true;
		} else if (message.kind == SAY_EXITED) {
			self.exited = true;
			self.wait_status = message.value;
		}
	}
	if (n == 0) {		/* init is about to be gone: its pidfd tells */
		close(self.fds[CHANNEL].fd);
		self.fds[CHANNEL].fd = -1;
	}
}

static void take_oom(void)
{
	uint64_t count;
	if (read(self.fds[OOM].fd, &count, sizeof count) != sizeof count)
		return;
	self.oom = true;
	/* The event comes a moment before the kernel's kill is counted; the count is worth that moment. */
	for (int ms = 0; ms < OOM_COUNT_MS; ms++) {
		counters_read(&self.record);
		if (self.record.counters[OOM_KILLS] != 0)
			break;
		nanosleep(&(struct timespec){.tv_nsec = MS}, NULL);
	}
	kill_init();
}

/*
 * One read of one stream. A small one is followed by a pause to the end of its millisecond, during which the pipes are left alone: a
 * flood of tiny writes is then read, written and indexed together, and what comes after silence is not delayed at all.
 * False when there is nothing (more) to read.
 */
static bool copy(int which)
{
	struct pollfd *pipe = &self.fds[which];
	ssize_t n = pipe->fd < 0 ? 0 : read(pipe->fd, buffer, sizeof buffer);
	if (n > 0) {
		int64_t now = now_ns(CLOCK_BOOTTIME);
		log_write(which - OUT + 1, buffer, (size_t)n, now_ns(CLOCK_REALTIME));
		self.idle_at = self.idle_ns ? now + self.idle_ns : NEVER;
		if (n < SMALL_READ)
			self.pause_until = now + MS;
		return true;
	}
	if (n == 0 && pipe->fd >= 0) {		/* every writing end is closed: no more may come, and POLLHUP would spin */
		close(pipe->fd);
		pipe->fd = -1;
	}
	return false;
}

static void run_timers(int64_t now)
{
	if (now >= self.deadline) {
		self.deadline = NEVER;
		begin_stop(CAUSE_DEADLINE, self.stop_signal, self.grace_ms);
	}
	if (now >= self.idle_at) {
		self.idle_at = NEVER;
		self.idle_ns = 0;
		begin_stop(CAUSE_IDLE, self.stop_signal, self.grace_ms);
	}
	if (now >= self.kill_at)
		kill_init();
}

static void wait_for_something(void)
{
	struct pollfd fds[N_FDS];
	memcpy(fds, self.fds, sizeof fds);
	int64_t now = now_ns(CLOCK_BOOTTIME), next = earliest(earliest(self.deadline, self.idle_at), self.kill_at);
	if (now < self.pause_until) {
		next = earliest(next, self.pause_until);
		fds[OUT].fd = fds[ERR].fd = -1;
	}
	int64_t rest = next == NEVER ? 0 : next > now ? next - now : 0;
	struct timespec timeout = {rest / 1000000000, rest % 1000000000};
	if (ppoll(fds, N_FDS, next == NEVER ? NULL : &timeout, NULL) < 0)
		memset(fds, 0, sizeof fds);
	for (int i = 0; i < N_FDS; i++)
		self.fds[i].revents = fds[i].revents;
}

static void supervise(void)
{
	take_stop_file();	/* one that was asked for before `ctl` was there */
	do {
		wait_for_something();
		run_timers(now_ns(CLOCK_BOOTTIME));
		if (self.fds[CTL].revents)
			take_ctl();
		if (self.fds[OOM].revents)
			take_oom();
		if (self.fds[OUT].revents)
			copy(OUT);
		if (self.fds[ERR].revents)
			copy(ERR);
		if (self.fds[CHANNEL].revents)
			take_messages();
	} while (!self.fds[INIT].revents);
}

/* The truth about the end, from what was seen. */
static void decide(void)
{
	uint64_t counted = self.record.counters[OOM_KILLS];
	bool oom = self.oom || (counted != UNKNOWN && counted > 0);
	bool ours = self.stop_cause != CAUSE_NONE && (self.exited ? self.delivered : self.killed);
	self.record.state = STATE_ENDED;
	self.record.wait_status = self.exited ? self.wait_status : ours || oom ? SIGKILL : -1;
	self.record.cause = ours ? self.stop_cause : oom ? CAUSE_OOM : self.exited ? CAUSE_OWN : CAUSE_LOST;
}

/* init is gone, and with it every process of the job. Whoever else was handed a pipe is no part of it: empty is the end. */
static void settle(void)
{
	reap_init();
	if (self.fds[CHANNEL].fd >= 0)
		take_messages();
	for (bool more = true; more;) {
		more = copy(OUT);
		more = copy(ERR) || more;
	}
	counters_read(&self.record);
	decide();
	self.record.ended_ns = now_ns(CLOCK_REALTIME);
	self.record.wall_ns = (uint64_t)(now_ns(CLOCK_BOOTTIME) - self.started);
	self.record.log_end = log_offset();
	self.record.lost = log_lost();
	log_sync();
	exit_write(&self.record);
	log_end_record();
}

static _Noreturn void give_up(const struct failure *failure, int report)
{
	self.record.state = STATE_FAILED;
	self.record.wait_status = -1;
	self.record.error = failure->error;
	memcpy(self.record.step, failure->step, sizeof self.record.step);
	exit_write(&self.record);
	say_failure(report, failure);
	_exit(1);
}

static void leave_the_server(void)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	setsid();
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		dup2(null, fd);
	close(null);
	umask(077);
	if (chdir("/") != 0)
		errno = 0;	/* then it stays where the launcher was: the server gives / */
}

_Noreturn void shim_main(struct plan *plan, const struct places *places, int report, void *list, size_t list_size)
{
	struct failure failure = {0};
	leave_the_server();
	self.dir = places->dir;
	for (int i = 0; i < N_FDS; i++)
		self.fds[i] = (struct pollfd){.fd = -1, .events = POLLIN};
	self.kill_at = NEVER;
	self.stop_signal = plan->stop_signal;
	self.grace_ms = plan->grace_ms;
	self.idle_ns = plan->idle_timeout_ms < 0 ? 0 : plan->idle_timeout_ms * MS;
	if (!give_birth(plan, places, &failure))
		give_up(&failure, report);

	/* From here on failure may no longer exit. */
	self.deadline = after_ms(plan->timeout_ms);
	self.idle_at = after_ms(plan->idle_timeout_ms);
	write_all(report, "started\n", 8);
	close(report);
	munmap(plan->argv, plan->vectors_size);		/* values of environment variables among them */
	munmap(list, list_size);
	forget_birth();
	supervise();
	settle();
	_exit(0);
}
