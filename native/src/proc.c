/* Process attributes (prctl). */
#include "mic/proc.h"

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "mic/uffd.h"

int mic_proc_die_with_parent(int expected_parent)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		return -errno;
	/* The parent may have died between fork and prctl: then no signal ever comes. */
	return expected_parent && getppid() != expected_parent ? -ESRCH : 0;
}

int mic_proc_adopt_orphans(void)
{
	return prctl(PR_SET_CHILD_SUBREAPER, 1) < 0 ? -errno : 0;
}

int mic_proc_set_name(const char *name)
{
	return prctl(PR_SET_NAME, name) < 0 ? -errno : 0;
}

int mic_proc_no_core(void)
{
	struct rlimit core;

	if (getrlimit(RLIMIT_CORE, &core) < 0)
		return -errno;
	/* The hard limit stays: a program that is run later may want its core. */
	core.rlim_cur = 0;
	return setrlimit(RLIMIT_CORE, &core) < 0 ? -errno : 0;
}

int mic_proc_userfaultfd(void)
{
	int fd = mic_uffd_open();

	if (fd < 0)
		return fd;
	close(fd);
	return 0;
}
