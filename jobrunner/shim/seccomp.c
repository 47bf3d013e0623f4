/*
 * The filter of system calls, as the server has compiled it (jobrunner/linux/seccomp.py): this program needs no library for it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "jobrunner.h"

static int digit(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Whole instructions in lower-case hexadecimal, no more than the kernel takes. */
bool filter_parse(const char *text)
{
	size_t length = strlen(text);
	if (!length || length % (2 * sizeof(struct sock_filter)) || length > 2 * sizeof(struct sock_filter) * BPF_MAXINSNS)
		return false;
	for (; *text; text++)
		if (digit(*text) < 0)
			return false;
	return true;
}

/* Last of all: what comes after it has to pass it. Needs no_new_privs, or CAP_SYS_ADMIN, which is gone by now (seccomp(2)). */
int filter_calls(const char *text, struct report *why)
{
	static struct sock_filter filter[BPF_MAXINSNS];
	unsigned char *at = (unsigned char *)filter;
	if (!text)
		return 0;
	size_t size = strlen(text) / 2;
	for (size_t i = 0; i < size; i++)
		at[i] = (unsigned char)(digit(text[2 * i]) << 4 | digit(text[2 * i + 1]));
	struct sock_fprog program = {(unsigned short)(size / sizeof *filter), filter};
	if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) != 0)
		return fail(why, "seccomp", errno, "");
	return 0;
}
