/*
 * init: pid 1 of the job. Finishes the namespaces it was born into, forks the command, reaps, passes signals on, and reports.
 *
 * It is never the command: pid 1 ignores signals that it does not handle, and everybody's orphans come to it. Its death is the
 * death of everything in the namespace (pid_namespaces(7)), so it dies with the shim and is the only process that is ever killed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "shim.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

/* The shim may have died before PR_SET_PDEATHSIG took hold; its end of the channel is closed then. */
static void die_with_the_shim(int channel)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	struct pollfd end = {.fd = channel};
	if (poll(&end, 1, 0) == 1 && (end.revents & (POLLHUP | POLLERR)))
		_exit(127);
}

static void set_up_mounts(int birth)
{
	/* First private: nothing that is mounted from here on may reach the host. */
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)
		report_failure(birth, "mount", errno, "/");
	if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
		report_failure(birth, "mount", errno, "/proc");
}

static void bring_up_loopback(int birth)
{
	struct ifreq lo = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &lo) != 0)
		report_failure(birth, "network", errno, "lo");
	close(fd);
}

static void set_up_namespaces(const struct plan *plan, const struct places *places, int birth)
{
	/* Before anything else: no instruction that the job could cause runs outside its limits. */
	int bad = enter_cgroups(places->cgroup1_job, plan->n_cgroup1_job);
	if (bad >= 0)
		report_failure(birth, "cgroup", errno, plan->cgroup1_job[bad]);
	/* After entering: a cgroup namespace is rooted where its maker is (cgroup_namespaces(7)). */
	if (unshare(CLONE_NEWCGROUP) != 0)
		report_failure(birth, "clone", errno, "cgroup namespace");
	set_up_mounts(birth);
	if (sethostname(plan->hostname, strlen(plan->hostname)) != 0)
		report_failure(birth, "hostname", errno, plan->hostname);
	bring_up_loopback(birth);
}

static void set_limits(const struct plan *plan, int birth)
{
	struct rlimit none = {0, 0}, files = {(rlim_t)plan->open_files, (rlim_t)plan->open_files};
	setrlimit(RLIMIT_CORE, &none);
	if (plan->open_files >= 0 && setrlimit(RLIMIT_NOFILE, &files) != 0)
		report_failure(birth, "rlimit", errno, "open-files");
	int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		/* The job goes before the host's own processes; where it may not be set the host's order stays. */
		if (write(fd, "500", 3) != 3)
			errno = 0;
		close(fd);
	}
}

static _Noreturn void become_command(const struct plan *plan, int birth, const int output[2])
{
	sigset_t none;
	struct sigaction as_usual = {.sa_handler = SIG_DFL};

	prctl(PR_SET_PDEATHSIG, 0);
	setsid();
	int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (in < 0 || dup2(in, STDIN_FILENO) < 0 || dup2(output[0], STDOUT_FILENO) < 0 || dup2(output[1], STDERR_FILENO) < 0)
		report_failure(birth, "pipe", errno, "standard descriptors");
	set_limits(plan, birth);
	for (int signal = 1; signal <= SIGRTMAX; signal++)
		sigaction(signal, &as_usual, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	if (chdir(plan->cwd) != 0)
		report_failure(birth, "cwd", errno, plan->cwd);
	environ = plan->envp;
	if (!getenv("PATH"))
		setenv("PATH", DEFAULT_PATH, 1);
	/* Everything but 0, 1, 2 goes at execve, `birth` among them: that is what tells the shim that it happened. */
	syscall(SYS_close_range, 3U, ~0U, 1U << 2 /* CLOSE_RANGE_CLOEXEC */);
	if (!write_all(birth, "ready\n", 6))
		_exit(127);
	execvp(plan->argv[0], plan->argv);
	report_failure(birth, "exec", errno, "");
}

/* Keeps what signalling and reaping the job need, and what the job could want least: no way to touch memory or files. */
static void drop_capabilities(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2] = {{0}};
	for (int cap = 0; prctl(PR_CAPBSET_DROP, cap) == 0; cap++)
		;
	data[0].effective = data[0].permitted = 1U << CAP_KILL;
	syscall(SYS_capset, &header, data);
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	prctl(PR_SET_DUMPABLE, 0);
}

static void say(int channel, uint32_t kind, int value)
{
	struct message message = {kind, value};
	send(channel, &message, sizeof message, MSG_NOSIGNAL);
}

/* Reap all there is; when the command is among it, report and leave, and the namespace ends. */
static void reap(pid_t command, int channel)
{
	int status;
	pid_t pid;
	while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
		if (pid == command) {
			say(channel, SAY_EXITED, status);
			_exit(0);
		}
	}
}

static void pass_signal_on(int channel, int command_fd, pid_t command)
{
	struct message message;
	ssize_t n = recv(channel, &message, sizeof message, MSG_DONTWAIT);
	if (n == 0)
		_exit(127);	/* the shim is gone */
	if (n != sizeof message || message.kind != SAY_SIGNAL)
		return;
	/* Order: first see whether the command has ended by itself; only a signal that found it alive may be called the reason. */
	reap(command, channel);
	if (syscall(SYS_pidfd_send_signal, command_fd, message.value, NULL, 0) == 0) {
		say(channel, SAY_DELIVERED, message.value);
		/* A job that is stopped gets its signal only when it goes on. */
		syscall(SYS_pidfd_send_signal, command_fd, SIGCONT, NULL, 0);
	}
}

_Noreturn void init_main(const struct plan *plan, const struct places *places, int channel, int birth, const int output[2])
{
	sigset_t all, child;
	int command_fd = -1;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	die_with_the_shim(channel);
	prctl(PR_SET_NAME, "jobrunner-init");
	set_up_namespaces(plan, places, birth);

	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	int children = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (children < 0)
		report_failure(birth, "init", errno, "signalfd");
	pid_t command = birth_of(0, -1, &command_fd);
	if (command == 0)
		become_command(plan, birth, output);
	if (command < 0)
		report_failure(birth, "clone", errno, "command");

	/* Now only the channel, the signals and the command: whoever gets into this process finds nothing else. */
	int keep[] = {channel, children, command_fd}, at[] = {3, 4, 5};
	for (int i = 0; i < 3; i++)
		keep[i] = fcntl(keep[i], F_DUPFD_CLOEXEC, 100);
	for (int i = 0; i < 3; i++)
		dup3(keep[i], at[i], O_CLOEXEC);
	close_above(6);
	drop_capabilities();
	forget_birth();

	struct pollfd fds[] = {{.fd = 3, .events = POLLIN}, {.fd = 4, .events = POLLIN}};
	for (;;) {
		struct signalfd_siginfo info;
		reap(command, 3);
		if (poll(fds, 2, -1) < 0)
			continue;
		while (read(4, &info, sizeof info) > 0)
			;
		if (fds[0].revents)
			pass_signal_on(3, 5, command);
	}
}
