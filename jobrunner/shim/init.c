/*
 * init: pid 1 of the job's namespaces. It finishes them, makes the command, reaps, passes signals on, and tells the end.
 *
 * It is never the command itself: pid 1 ignores the signals that it does not handle, and everybody's orphans come to it. Its death
 * is the death of the whole namespace (pid_namespaces(7)), so it dies with the shim, and it leaves when the command ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "jobrunner.h"

/* All that is open in a job's pid 1 once the command is made. */
enum { CHANNEL, CHILDREN, COMMAND, N_KEPT };

static _Noreturn void give_up(const struct birth *birth, const struct report *why)
{
	say(birth->report, why);
	_exit(1);
}

/* Order: first the wish, then the question. A shim that died before the wish shows as a hang-up, one that dies later kills us. */
static void die_with_the_shim(int channel)
{
	struct pollfd end = {.fd = channel};
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (poll(&end, 1, 0) != 0)
		_exit(1);
}

/* A shim that dies hangs up. */
void wait_to_be_told(int channel, uint32_t kind)
{
	struct message message;
	if (recv(channel, &message, sizeof message, 0) != (ssize_t)sizeof message || message.kind != kind)
		_exit(1);
}

/* The descriptors at their places, everything else closed, 0 to 2 included: there is nobody to talk to but the shim. */
static void keep_only(const int kept[N_KEPT])
{
	for (int i = 0; i < N_KEPT; i++)
		dup3(kept[i], i, O_CLOEXEC);	/* each comes from above: 0 to 2 were taken from the launcher on */
	close_from(N_KEPT);
}

/* Reaping needs no capability, signalling a command of another uid needs one. */
static void drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{.effective = 1U << CAP_KILL, .permitted = 1U << CAP_KILL}};
	syscall(SYS_capset, &header, data);
}

static void tell(uint32_t kind, int32_t value)
{
	struct message message = {kind, value};
	send(CHANNEL, &message, sizeof message, MSG_NOSIGNAL);
}

/* `command` is a child that only we reap, so its number means nobody else. */
static void reap(pid_t command)
{
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == command) {
			tell(SAY_EXITED, status);
			_exit(0);
		}
	}
}

static void pass_signal_on(pid_t command)
{
	struct message message;
	if (recv(CHANNEL, &message, sizeof message, MSG_DONTWAIT) != (ssize_t)sizeof message || message.kind != SAY_SIGNAL)
		return;
	/* Order: a command that has ended by itself is told first; a signal was delivered only if it found the command alive. */
	reap(command);
	if (send_signal(COMMAND, message.value) != 0)
		return;
	tell(SAY_DELIVERED, message.value);
	send_signal(COMMAND, SIGCONT);		/* one that is stopped would take the signal only when it goes on */
}

static _Noreturn void serve(pid_t command)
{
	struct pollfd fds[] = {{.fd = CHANNEL, .events = POLLIN}, {.fd = CHILDREN, .events = POLLIN}};
	struct signalfd_siginfo info[8];
	for (;;) {
		reap(command);
		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[1].revents && read(CHILDREN, info, sizeof info) < 0 && errno != EAGAIN)
			_exit(1);
		if (fds[0].revents & (POLLHUP | POLLERR))
			_exit(1);
		if (fds[0].revents)
			pass_signal_on(command);
	}
}

_Noreturn void init_main(const struct birth *birth)
{
	struct report why = {0};
	sigset_t child;
	int kept[N_KEPT] = {birth->channel, -1, -1};

	die_with_the_shim(birth->channel);
	prctl(PR_SET_NAME, "jobrunner-init");
	if (has_own_ids(birth->plan))
		wait_to_be_told(birth->channel, SAY_MAPPED);
	if (map_ids(birth->plan, &why) != 0 || isolate(birth, &why) != 0)
		give_up(birth, &why);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	/* All signals are blocked since the shim's birth. */
	kept[CHILDREN] = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (kept[CHILDREN] < 0) {
		fail(&why, "init", errno, "signalfd");
		give_up(birth, &why);
	}
	wait_to_be_told(birth->channel, SAY_GO);	/* the job's end can be told from now on */
	pid_t command = spawn(0, -1, &kept[COMMAND]);
	if (command == 0)
		command_main(birth);
	if (command < 0) {
		fail(&why, "clone", errno, "command");
		give_up(birth, &why);
	}
	keep_only(kept);	/* `report` too: its end of file is how the shim hears of execve */
	drop_capabilities();
	plan_free(birth->plan);
	forget_birth();
	serve(command);
}
