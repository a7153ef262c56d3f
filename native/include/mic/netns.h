/* User and network namespaces, held by descriptors alone. */
#ifndef MIC_NETNS_H
#define MIC_NETNS_H

/* cffi-begin */
/* What mic_netns_create() and mic_netns_tap() were doing when they failed. */
enum mic_netns_step {
	MIC_NETNS_FORK = 1,  /* a helper process */
	MIC_NETNS_USER = 2,  /* the user namespace */
	MIC_NETNS_MAP = 3,   /* its uid and gid maps */
	MIC_NETNS_NET = 4,   /* the network namespace */
	MIC_NETNS_ENTER = 5, /* setns */
	MIC_NETNS_OPEN = 6,  /* open /dev/net/tun */
	MIC_NETNS_TAP = 7    /* TUNSETIFF */
};

/* Create a user namespace and a network namespace in it; uid_map and gid_map are lines for
 * /proc/PID/uid_map, deny_setgroups is needed for an unprivileged gid_map. The namespaces live as
 * long as the two descriptors (close-on-exec). Returns 0 or -errno with *step set. */
int mic_netns_create(const char *uid_map, const char *gid_map, int deny_setgroups, int *user_fd, int *net_fd,
		     int *step);
/* Enter; user_fd -1 = stay in the user namespace. The process must have one thread when user_fd is
 * another user namespace (-EINVAL otherwise). Returns 0 or -errno. */
int mic_netns_enter(int user_fd, int net_fd);
/* Open a new TAP with a vnet header in these namespaces (-1, -1: in the current ones) from any thread
 * of any process. Returns a non-blocking descriptor or -errno with *step set. */
int mic_netns_tap(int user_fd, int net_fd, const char *name, int *step);
/* cffi-end */

#endif
