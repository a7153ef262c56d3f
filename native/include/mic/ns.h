/* Namespaces and mounts: system calls that Python 3.10's standard library does not reach. */
#ifndef MIC_NS_H
#define MIC_NS_H

/* cffi-begin */
enum mic_ns_flag {
	MIC_NS_MNT = 0x00020000,
	MIC_NS_UTS = 0x04000000,
	MIC_NS_IPC = 0x08000000,
	MIC_NS_USER = 0x10000000,
	MIC_NS_PID = 0x20000000,
	MIC_NS_NET = 0x40000000
};

enum mic_mount_flag {
	MIC_MS_RDONLY = 1,
	MIC_MS_NOSUID = 2,
	MIC_MS_NODEV = 4,
	MIC_MS_NOEXEC = 8,
	MIC_MS_REMOUNT = 32,
	MIC_MS_NOATIME = 1024,
	MIC_MS_NODIRATIME = 2048,
	MIC_MS_BIND = 4096,
	MIC_MS_REC = 16384,
	MIC_MS_PRIVATE = 1 << 18,
	MIC_MS_RELATIME = 1 << 21
};

/* All return 0 or -errno. */
int mic_ns_unshare(int flags);
int mic_ns_enter(int fd, int flag);
/* Any of source, fstype and data may be NULL. */
int mic_ns_mount(const char *source, const char *target, const char *fstype, unsigned long flags,
		 const char *data);
int mic_ns_detach(const char *target); /* lazy, does not follow a symbolic link */
int mic_ns_pivot_root(const char *new_root, const char *put_old);
/* Everything mounted at `path` and below becomes read-only; -ENOSYS before Linux 5.12. */
int mic_ns_read_only(const char *path);
/* Bring up the loopback interface of this network namespace. */
int mic_ns_loopback_up(void);
/* cffi-end */

#endif
