/* Namespaces and mounts. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "mic/ns.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif

_Static_assert(MIC_NS_USER == CLONE_NEWUSER && MIC_NS_MNT == CLONE_NEWNS && MIC_NS_PID == CLONE_NEWPID &&
		       MIC_NS_UTS == CLONE_NEWUTS && MIC_NS_IPC == CLONE_NEWIPC && MIC_NS_NET == CLONE_NEWNET,
	       "namespace flags are the kernel's");
_Static_assert((unsigned)MIC_MS_BIND == (unsigned)MS_BIND && (unsigned)MIC_MS_REC == (unsigned)MS_REC &&
		       (unsigned)MIC_MS_PRIVATE == (unsigned)MS_PRIVATE &&
		       (unsigned)MIC_MS_RELATIME == (unsigned)MS_RELATIME &&
		       (unsigned)MIC_MS_NOATIME == (unsigned)MS_NOATIME,
	       "mount flags are the kernel's");

/* struct mount_attr of <linux/mount.h>, which older C libraries do not have. */
struct mic_mount_attr {
	uint64_t set, clear, propagation, userns_fd;
};

static int result(int rc)
{
	return rc < 0 ? -errno : 0;
}

int mic_ns_unshare(int flags)
{
	return result(unshare(flags));
}

int mic_ns_enter(int fd, int flag)
{
	return result(setns(fd, flag));
}

int mic_ns_mount(const char *source, const char *target, const char *fstype, unsigned long flags,
		 const char *data)
{
	return result(mount(source, target, fstype, flags, data));
}

int mic_ns_detach(const char *target)
{
	return result(umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW));
}

int mic_ns_pivot_root(const char *new_root, const char *put_old)
{
	return result((int)syscall(SYS_pivot_root, new_root, put_old));
}

int mic_ns_read_only(const char *path)
{
	struct mic_mount_attr attr = {.set = 1 /* MOUNT_ATTR_RDONLY */};

	return result((int)syscall(SYS_mount_setattr, AT_FDCWD, path, AT_RECURSIVE, &attr, sizeof(attr)));
}

int mic_ns_loopback_up(void)
{
	struct ifreq req = {.ifr_name = "lo"};
	int rc;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return -errno;
	rc = result(ioctl(fd, SIOCGIFFLAGS, &req));
	if (!rc) {
		req.ifr_flags = (short)(req.ifr_flags | IFF_UP);
		rc = result(ioctl(fd, SIOCSIFFLAGS, &req));
	}
	close(fd);
	return rc;
}
