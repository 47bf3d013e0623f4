/*
 * The last steps before the command: this process is its, and everything here happens with the job's limits and namespaces around
 * it. What it inherits is exactly what is said here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

#define SIGNALS 64		/* of the kernel; libc keeps some from its own sigaction */

/* No signal is blocked or ignored, as a shell would have it. */
static void reset_signals(void)
{
	const char usual[64] = {0};		/* SIG_DFL, no flags, no mask, in every architecture's struct */
	sigset_t none;
	for (int signal = 1; signal <= SIGNALS; signal++)
		syscall(SYS_rt_sigaction, signal, usual, NULL, SIGNALS / 8);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

/*
 * No core file, as 1 is less than any has. 0 would be no limit where the host's core_pattern is a pipe: the kernel starts the program
 * that it names, as root and outside, for a dump of any size but 1 (core(5)).
 */
static int set_limits(const struct plan *plan, struct report *why)
{
	const struct rlimit none = {1, 1}, files = {(rlim_t)plan->open_files, (rlim_t)plan->open_files};
	/* What is counted are the tasks of the command's uid: with init only where that is init's too. */
	const bool with_init = plan->user_namespace && !has_own_ids(plan);
	const rlim_t counted = (rlim_t)(with_init ? plan->processes : plan->processes - 1);
	const struct rlimit processes = {counted, counted};
	setrlimit(RLIMIT_CORE, &none);
	if (plan->open_files >= 0 && setrlimit(RLIMIT_NOFILE, &files) != 0)
		return fail(why, "rlimit", errno, "open-files");
	if (plan->processes >= 0 && setrlimit(RLIMIT_NPROC, &processes) != 0)
		return fail(why, "rlimit", errno, "processes");
	if (plan->user_namespace)
		share_limits();
	/* When the host is out of memory a job goes before the host's own. Where this may not be set, the host's order holds. */
	int fd = open_own(plan, "/proc/self/oom_score_adj");
	if (fd >= 0) {
		write_all(fd, "500", 3);
		close(fd);
	}
	return 0;
}

/*
 * Everything above 2 is closed, now and not by execve: until then /proc/self/fd would name directories of the host, and the directory
 * to start in, or the command, could be asked for by such a name. `report` can still tell a failure; execve closes it.
 */
static int set_descriptors(const struct birth *birth, struct report *why)
{
	/* Opened here, in the job's own root: the launcher's is a file of the host's mounts. */
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0)
		return fail(why, "pipe", errno, "/dev/null");
	if (dup2(null, STDIN_FILENO) < 0 || dup2(birth->output[0], STDOUT_FILENO) < 0 ||
	    dup2(birth->output[1], STDERR_FILENO) < 0)
		return fail(why, "pipe", errno, "");
	const unsigned int report = (unsigned int)birth->report;
	if (report > STDERR_FILENO + 1)
		syscall(SYS_close_range, STDERR_FILENO + 1U, report - 1, 0);
	close_from(report + 1);
	return 0;
}

static int prepare(const struct birth *birth, struct report *why)
{
	const struct plan *plan = birth->plan;
	prctl(PR_SET_NAME, "jobrunner-exec");
	setsid();
	umask(022);
	if (own_output(birth, why) != 0 || set_descriptors(birth, why) != 0 || set_limits(plan, why) != 0)
		return -1;
	reset_signals();
	if (become_the_job(plan, why) != 0)
		return -1;
	/* As the job: a directory that it may not enter is none to start it in. */
	if (chdir(plan->cwd) != 0)
		return fail(why, "cwd", errno, plan->cwd);
	return filter_calls(plan->seccomp, why);
}

_Noreturn void command_main(const struct birth *birth)
{
	struct report why = {0}, ready = {.kind = REPORT_READY};
	if (prepare(birth, &why) == 0) {
		environ = birth->plan->env;	/* execvp(3) searches the PATH of the job, not of the server */
		if (!say(birth->report, &ready))
			_exit(127);
		execvp(birth->plan->argv[0], birth->plan->argv);
		fail(&why, "exec", errno, "");
	}
	say(birth->report, &why);
	_exit(127);
}
