/* Requests to the node: a small pool of control connections, one request on each at a time. */
#include "internal.h"

#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define POOL    8
#define HIGH_FD 512 /* our own descriptors stay out of the program's low numbers (SCIF-8) */

struct control {
	int fd;
	ino_t ino; /* to notice that the program closed it under us */
	struct control *next;
};

static struct control pool[POOL];
static unsigned pooled;
static struct control *in_use; /* each on the stack of the call that uses it */
/* A signal handler may fork while its own thread holds it: then it goes on without. */
#define FREE_LOCK PTHREAD_ERRORCHECK_MUTEX_INITIALIZER_NP
static pthread_mutex_t pool_lock = FREE_LOCK;
static bool fork_holds_pool;

static int socket_path(struct sockaddr_un *sa)
{
	const char *env = getenv("MICEMU_SCIF_SOCKET"), *run = getenv("XDG_RUNTIME_DIR");
	const char *named = getenv("MICEMU_RUNDIR"), *instance = getenv("MICEMU_INSTANCE");
	int n;

	if (!instance || !*instance)
		instance = "default";
	if (strchr(instance, '/'))
		return -ENOENT;

	sa->sun_family = AF_UNIX;
	if (env && *env)
		n = snprintf(sa->sun_path, sizeof sa->sun_path, "%s", env);
	else if (named && *named)
		n = snprintf(sa->sun_path, sizeof sa->sun_path, "%s/%s/scif.sock", named, instance);
	else if (run && *run)
		n = snprintf(sa->sun_path, sizeof sa->sun_path, "%s/micemu/%s/scif.sock", run, instance);
	else
		n = snprintf(sa->sun_path, sizeof sa->sun_path, "/tmp/micemu-%u/%s/scif.sock", getuid(),
			     instance);
	return n < 0 || (size_t)n >= sizeof sa->sun_path ? -ENOENT : 0;
}

static int node_socket(void)
{
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	return fd < 0 ? -errno : fd;
}

/* Connect the socket to the node. */
static int reach_node(int fd)
{
	struct sockaddr_un sa;
	int rc = socket_path(&sa);

	while (rc == 0 && connect(fd, (struct sockaddr *)&sa, sizeof sa) < 0) {
		if (errno == EINTR)
			continue;
		rc = -errno;
		/* Nobody listens there: the driver is not loaded (SCIF 2.17). */
		if (rc == -ECONNREFUSED || rc == -ENOTDIR || rc == -EPROTOTYPE)
			rc = -ENOENT;
	}
	return rc;
}

int node_connect(void)
{
	int fd = node_socket(), rc;

	if (fd < 0)
		return fd;
	rc = reach_node(fd);
	if (rc == 0)
		return fd;
	close(fd);
	return rc;
}

static int send_packet(int fd, const struct mic_scif_request *rq, const void *data)
{
	struct mic_scif_request out = *rq;
	struct iovec iov[2] = {{&out, sizeof out}, {(void *)(uintptr_t)data, rq->ndata}};
	struct msghdr mh = {.msg_iov = iov, .msg_iovlen = data ? 2 : 1};
	ssize_t n;

	out.cpu = (uint64_t)(sched_getcpu() + 1);
	do
		n = sendmsg(fd, &mh, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

static void take_fds(struct msghdr *mh, struct answer *ans)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(mh); c; c = CMSG_NXTHDR(mh, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		unsigned n = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));

		for (unsigned i = 0; i < n && ans->nfds < MIC_SCIF_MAX_FDS; i++)
			memcpy(&ans->fds[ans->nfds++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
	}
}

/* The data of an answer that is beyond a packet: in the file that came last. */
static int take_file(struct answer *ans)
{
	int fd = ans->fds[--ans->nfds], rc = 0;
	size_t at = 0, size = ans->head.ndata;
	uint8_t *data = realloc(ans->data, size);

	if (!data)
		rc = -ENOMEM;
	else
		ans->data = data;
	for (ssize_t n; rc == 0 && at < size; at += (size_t)n) {
		n = pread(fd, data + at, size - at, (off_t)at);
		if (n <= 0)
			rc = -ENODEV;
	}
	close(fd);
	return rc;
}

/* 0, -EINTR (nothing was received), -ENODEV (the node is gone), -ENOMEM. */
static int recv_packet(int fd, struct answer *ans)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MIC_SCIF_MAX_FDS * sizeof(int))];
	} control;
	struct iovec iov[2] = {{&ans->head, sizeof ans->head}, {ans->data, ans->max}};
	struct msghdr mh = {.msg_iov = iov,
			    .msg_iovlen = ans->max ? 2 : 1,
			    .msg_control = &control,
			    .msg_controllen = sizeof control};
	ssize_t n = recvmsg(fd, &mh, MSG_CMSG_CLOEXEC);

	if (n < 0)
		return errno == EINTR ? -EINTR : -ENODEV;
	take_fds(&mh, ans); /* whatever the answer is worth, they are ours to close */
	if ((size_t)n == sizeof ans->head && ans->head.ndata > MIC_SCIF_INLINE && ans->max && ans->nfds)
		return take_file(ans);
	if ((size_t)n < sizeof ans->head || (size_t)n != sizeof ans->head + ans->head.ndata)
		return -ENODEV;
	return 0;
}

void answer_close(struct answer *ans)
{
	int saved = errno;

	for (unsigned i = 0; i < ans->nfds; i++)
		close(ans->fds[i]);
	ans->nfds = 0;
	errno = saved;
}

int node_open(int fd, uint64_t cookie, uint64_t *sid)
{
	/* Nobody waits for an answer: the connection itself says that the node is there. */
	if (getrandom(sid, sizeof *sid, GRND_NONBLOCK) != sizeof *sid)
		*sid = cookie * 0x9e3779b97f4a7c15u ^ (uint64_t)getpid() << 32 ^ mic_timestamp();
	const struct mic_scif_request rq = {.op = MIC_SCIF_OPEN, .a = {cookie, *sid}};

	return send_packet(fd, &rq, NULL) < 0 ? -ENODEV : 0;
}

/* Move a descriptor out of the way of the program's; on failure it stays where it is. */
static int move_high(int fd)
{
	int high = fcntl(fd, F_DUPFD_CLOEXEC, HIGH_FD);

	if (high < 0)
		return fd;
	close(fd);
	return high;
}

/* Programs that close all descriptors they do not know close ours, and then get their numbers. */
static bool still_ours(const struct control *c)
{
	struct stat st;

	return fstat(c->fd, &st) == 0 && st.st_ino == c->ino && S_ISSOCK(st.st_mode);
}

/* pool_lock is held. */
static void mark_used(struct control *c)
{
	c->next = in_use;
	mic_store_release(&in_use, c); /* a fork between the two leaves a list without it */
}

static void mark_unused(const struct control *c)
{
	struct control **p = &in_use;

	pthread_mutex_lock(&pool_lock);
	while (*p && *p != c)
		p = &(*p)->next;
	if (*p)
		*p = c->next;
	pthread_mutex_unlock(&pool_lock);
}

/* A connection to use; 1 when it was used before: its node may have been replaced since. */
static int control_get(struct control *c)
{
	library_init();
	pthread_mutex_lock(&pool_lock);
	while (pooled) {
		*c = pool[--pooled];
		if (still_ours(c)) {
			mark_used(c);
			pthread_mutex_unlock(&pool_lock);
			return 1;
		}
	}
	pthread_mutex_unlock(&pool_lock);

	const struct mic_scif_request hello = {.op = MIC_SCIF_HELLO, .a = {(uint64_t)getpid()}};
	struct answer ans = {0};
	struct stat st;
	int rc = 0, fd;

	/* A fork of another thread sees it listed, or not at all. */
	pthread_mutex_lock(&pool_lock);
	fd = node_socket();
	if (fd >= 0) {
		fd = move_high(fd);
		rc = fstat(fd, &st) < 0 ? -EBADF : 0;
	}
	if (fd >= 0 && rc == 0) {
		*c = (struct control){fd, st.st_ino, NULL};
		mark_used(c);
	}
	pthread_mutex_unlock(&pool_lock);
	if (fd < 0)
		return fd;
	if (rc < 0) {
		close(fd);
		return rc;
	}
	rc = reach_node(fd);
	if (rc == 0)
		rc = send_packet(fd, &hello, NULL);
	while (rc == 0 && (rc = recv_packet(fd, &ans)) == -EINTR)
		rc = 0;
	if (rc == 0)
		rc = ans.head.status;
	if (rc == 0)
		return 0;
	mark_unused(c);
	close(fd);
	return rc;
}

static void control_put(const struct control *c)
{
	pthread_mutex_lock(&pool_lock);
	if (pooled < POOL) {
		pool[pooled++] = *c;
		pthread_mutex_unlock(&pool_lock);
		return;
	}
	pthread_mutex_unlock(&pool_lock);
	close(c->fd);
}

static int exchange(int fd, const struct mic_scif_request *rq, const void *data, struct answer *ans,
		    bool interruptible)
{
	int rc = send_packet(fd, rq, data);

	if (rc < 0)
		return -ENODEV;
	while ((rc = recv_packet(fd, ans)) == -EINTR) {
		const struct mic_scif_request cancel = {.op = MIC_SCIF_CANCEL, .sid = rq->sid};

		if (interruptible && send_packet(fd, &cancel, NULL) < 0)
			return -ENODEV;
		interruptible = false; /* once is enough; the answer now comes at once */
	}
	return rc;
}

int node_call(const struct mic_scif_request *rq, const void *data, struct answer *ans, bool interruptible)
{
	struct control c;
	int saved = errno, rc, used;

	do {
		used = rc = control_get(&c);
		if (rc < 0)
			break;
		rc = exchange(c.fd, rq, data, ans, interruptible);
		mark_unused(&c);
		if (rc < 0) {
			answer_close(ans);
			close(c.fd);
		} else {
			control_put(&c);
		}
	} while (rc == -ENODEV && used == 1);
	errno = saved;
	return rc < 0 ? rc : ans->head.status;
}

int node_ask(uint32_t op, uint64_t sid, uint64_t a0, uint64_t a1, uint64_t *v0)
{
	const struct mic_scif_request rq = {.op = op, .sid = sid, .a = {a0, a1}};
	struct answer ans = {0};
	int rc = node_call(&rq, NULL, &ans, false);

	answer_close(&ans);
	if (v0)
		*v0 = ans.head.v[0];
	return rc;
}

bool wire_busy(void)
{
	return mic_load_relaxed(&in_use) != NULL;
}

void wire_before_fork(void)
{
	fork_holds_pool = pthread_mutex_lock(&pool_lock) == 0;
}

void wire_after_fork_parent(void)
{
	if (fork_holds_pool)
		pthread_mutex_unlock(&pool_lock);
}

void wire_after_fork(void)
{
	/* The connections are the parent's: an answer must not reach the wrong process. */
	pool_lock = (pthread_mutex_t)FREE_LOCK;
	while (pooled)
		if (still_ours(&pool[--pooled]))
			close(pool[pooled].fd);
	/* Also those whose calls are not here: with them open, the parent's death would end none of its
	 * requests. */
	for (const struct control *c = in_use; c; c = c->next)
		if (still_ours(c))
			close(c->fd);
	in_use = NULL;
}
