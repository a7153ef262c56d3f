/* Namespaces by way of a short-lived child: unshare() and setns() on a user namespace want a process
 * with one thread, which callers cannot promise. Children use async-signal-safe calls only. */
#define _GNU_SOURCE
#include "mic/netns.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* One message from the child: how far it came. */
struct report {
	int step, error;
};

static int last_error(void)
{
	return -errno;
}

static int write_text(pid_t pid, const char *name, const char *text)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return last_error();
	int rc = write(fd, text, strlen(text)) < 0 ? last_error() : 0;

	close(fd);
	return rc;
}

static int open_ns(pid_t pid, const char *name)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/%d/ns/%s", (int)pid, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	return fd < 0 ? last_error() : fd;
}

static void say(int sock, int step, int error)
{
	struct report r = {step, error};

	(void)!write(sock, &r, sizeof r);
}

/* Unshare in two steps so that the report can name the one that failed; live until the parent has
 * opened the namespaces. */
static void create_child(int sock)
{
	char go;

	if (unshare(CLONE_NEWUSER) < 0) {
		say(sock, MIC_NETNS_USER, errno);
		return;
	}
	say(sock, MIC_NETNS_USER, 0);
	if (read(sock, &go, 1) != 1)
		return;
	say(sock, MIC_NETNS_NET, unshare(CLONE_NEWNET) < 0 ? errno : 0);
	(void)!read(sock, &go, 1);
}

/* The caller's signal handlers may run meanwhile: that is no end. */
static ssize_t receive(int sock, struct msghdr *m)
{
	ssize_t n;

	do
		n = recvmsg(sock, m, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	return n;
}

static int next_report(int sock, int *step)
{
	struct report r;
	struct iovec iov = {&r, sizeof r};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	if (receive(sock, &m) != (ssize_t)sizeof r)
		return -EPIPE; /* the child died */
	*step = r.step;
	return -r.error;
}

static int write_maps(pid_t pid, const char *uid_map, const char *gid_map, int deny_setgroups)
{
	int rc = write_text(pid, "uid_map", uid_map);

	if (rc == 0 && deny_setgroups)
		rc = write_text(pid, "setgroups", "deny");
	return rc == 0 ? write_text(pid, "gid_map", gid_map) : rc;
}

static int create_parent(pid_t pid, int sock, const char *uid_map, const char *gid_map, int deny_setgroups,
			 int *user_fd, int *net_fd, int *step)
{
	int rc = next_report(sock, step);

	if (rc < 0)
		return rc;
	*step = MIC_NETNS_MAP;
	rc = write_maps(pid, uid_map, gid_map, deny_setgroups);
	if (rc < 0)
		return rc;
	if (write(sock, "", 1) != 1)
		return -EPIPE;
	rc = next_report(sock, step);
	if (rc < 0)
		return rc;
	*user_fd = open_ns(pid, "user");
	*net_fd = open_ns(pid, "net");
	rc = *user_fd < 0 ? *user_fd : *net_fd < 0 ? *net_fd : 0;
	if (rc < 0) {
		if (*user_fd >= 0)
			close(*user_fd);
		if (*net_fd >= 0)
			close(*net_fd);
	}
	return rc;
}

/* Fork with a socket pair between the two; *sock is this side's end. */
static pid_t fork_with_socket(int *sock)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -1;
	pid_t pid = fork();

	if (pid < 0) {
		int saved = errno;

		close(pair[0]);
		close(pair[1]);
		errno = saved;
		return -1;
	}
	close(pair[pid == 0]);
	*sock = pair[pid != 0];
	return pid;
}

static void reap(pid_t pid)
{
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

int mic_netns_create(const char *uid_map, const char *gid_map, int deny_setgroups, int *user_fd, int *net_fd,
		     int *step)
{
	int sock;
	pid_t pid = fork_with_socket(&sock);

	*step = MIC_NETNS_FORK;
	if (pid < 0)
		return last_error();
	if (pid == 0) {
		create_child(sock);
		_exit(0);
	}
	int rc = create_parent(pid, sock, uid_map, gid_map, deny_setgroups, user_fd, net_fd, step);

	close(sock); /* the child sees the end and exits */
	reap(pid);
	return rc;
}

/* Is fd the namespace this process lives in already? */
static int same_ns(int fd, const char *name)
{
	struct stat a, b;

	return fstat(fd, &a) == 0 && stat(name, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

int mic_netns_enter(int user_fd, int net_fd)
{
	if (user_fd >= 0 && !same_ns(user_fd, "/proc/self/ns/user") && setns(user_fd, CLONE_NEWUSER) < 0)
		return last_error();
	return net_fd >= 0 && setns(net_fd, CLONE_NEWNET) < 0 ? last_error() : 0;
}

static int open_tap(const char *name, int *step)
{
	struct ifreq r = {0};
	size_t len = strlen(name);

	*step = MIC_NETNS_TAP;
	if (!len || len >= sizeof r.ifr_name)
		return -ENAMETOOLONG;
	memcpy(r.ifr_name, name, len);
	/* Never an interface that is there already. */
	r.ifr_flags = (short)(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_TUN_EXCL);
	*step = MIC_NETNS_OPEN;
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

	if (fd < 0)
		return last_error();
	*step = MIC_NETNS_TAP;
	if (ioctl(fd, TUNSETIFF, &r) < 0) {
		int rc = last_error();

		close(fd);
		return rc;
	}
	return fd;
}

/* The report, and with it the descriptor when there is one. */
static void send_fd(int sock, struct report r, int fd)
{
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec iov = {&r, sizeof r};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

	if (fd >= 0) {
		m.msg_control = control.space;
		m.msg_controllen = sizeof control.space;
		struct cmsghdr *c = CMSG_FIRSTHDR(&m);

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof fd);
	}
	(void)!sendmsg(sock, &m, MSG_NOSIGNAL);
}

static int receive_fd(int sock, int *step)
{
	union {
		struct cmsghdr head;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct report r;
	struct iovec iov = {&r, sizeof r};
	struct msghdr m = {.msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = control.space,
			   .msg_controllen = sizeof control.space};
	int fd;

	if (receive(sock, &m) != (ssize_t)sizeof r)
		return -EPIPE;
	*step = r.step;
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);

	if (!c || c->cmsg_type != SCM_RIGHTS)
		return r.error ? -r.error : -EPIPE;
	memcpy(&fd, CMSG_DATA(c), sizeof fd);
	return fd;
}

static void tap_child(int sock, int user_fd, int net_fd, const char *name)
{
	int step = MIC_NETNS_ENTER, fd = mic_netns_enter(user_fd, net_fd);

	if (fd == 0)
		fd = open_tap(name, &step);
	send_fd(sock, (struct report){step, fd < 0 ? -fd : 0}, fd);
}

int mic_netns_tap(int user_fd, int net_fd, const char *name, int *step)
{
	int sock;

	if (user_fd < 0 && net_fd < 0)
		return open_tap(name, step);
	*step = MIC_NETNS_FORK;
	pid_t pid = fork_with_socket(&sock);

	if (pid < 0)
		return last_error();
	if (pid == 0) {
		tap_child(sock, user_fd, net_fd, name);
		_exit(0);
	}
	int fd = receive_fd(sock, step);

	close(sock);
	reap(pid);
	return fd;
}
