/* The node's end of its programs' connections: one call for what happens to each of them. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sockios.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "mic/scif_abi.h"
#include "mic/vring.h"

int mic_scif_accept(int listener, struct mic_scif_caller *who)
{
	struct ucred cred;
	socklen_t len = sizeof cred;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);

	if (fd < 0)
		return -errno;
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) < 0) {
		int rc = -errno;

		close(fd);
		return rc;
	}
	who->pid = cred.pid;
	who->uid = cred.uid;
	return fd;
}

/* At most one descriptor comes along; the kernel closes what has no room. Hence CMSG_LEN: the padding of
 * CMSG_SPACE would be room for another one. */
int mic_scif_first(int fd, struct mic_scif_request *rq, int *passed)
{
	char extra;
	struct iovec iov[2] = {{rq, sizeof *rq}, {&extra, 1}};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr mh = {.msg_iov = iov,
			    .msg_iovlen = 2,
			    .msg_control = &control,
			    .msg_controllen = CMSG_LEN(sizeof(int))};
	ssize_t n = recvmsg(fd, &mh, MSG_CMSG_CLOEXEC);

	*passed = -1;
	if (n < 0)
		return -errno;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&mh); c; c = CMSG_NXTHDR(&mh, c))
		if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
			memcpy(passed, CMSG_DATA(c), sizeof *passed);
	return n == (ssize_t)sizeof *rq ? (int)n : 0;
}

int mic_scif_receive(int fd, void *packet, size_t max, struct mic_scif_steer *s)
{
	ssize_t n = recv(fd, packet, max, 0);
	struct mic_scif_request rq;

	if (n < 0)
		return -errno;
	if ((size_t)n >= sizeof rq) {
		memcpy(&rq, packet, sizeof rq);
		int cpu = mic_scif_steer(s, rq.cpu, sched_getcpu(), mic_now_ns());

		if (cpu >= 0)
			mic_scif_go_to(cpu); /* where it may not run it stays */
	}
	return (int)n;
}

static int send_answer(int fd, const struct mic_scif_reply *head, const void *data, uint32_t ndata,
		       const int *fds, uint32_t nfds)
{
	struct iovec iov[2] = {{(void *)(uintptr_t)head, sizeof *head}, {(void *)(uintptr_t)data, ndata}};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MIC_SCIF_MAX_FDS * sizeof(int))];
	} control;
	struct msghdr mh = {.msg_iov = iov, .msg_iovlen = ndata ? 2 : 1};

	if (nfds) {
		memset(&control, 0, sizeof control);
		mh.msg_control = &control;
		mh.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&mh);

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
	}
	return sendmsg(fd, &mh, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* A file with `size` bytes of data. -errno. */
static int file_with(const uint8_t *data, size_t size)
{
	int fd = memfd_create("scif-answer", MFD_CLOEXEC);

	if (fd < 0)
		return -errno;
	for (ssize_t n; size; data += n, size -= (size_t)n) {
		n = write(fd, data, size);
		if (n <= 0) {
			close(fd);
			return -ENOMEM;
		}
	}
	return fd;
}

int mic_scif_answer(int fd, const struct mic_scif_reply *head, const void *data, const int *fds,
		    uint32_t nfds)
{
	int all[MIC_SCIF_MAX_FDS];
	const uint32_t more = head->ndata > MIC_SCIF_INLINE;

	if (nfds + more > MIC_SCIF_MAX_FDS)
		return -EINVAL;
	if (!more)
		return send_answer(fd, head, data, head->ndata, fds, nfds);
	for (uint32_t i = 0; i < nfds; i++)
		all[i] = fds[i];
	all[nfds] = file_with(data, head->ndata);
	if (all[nfds] < 0) { /* the program gets that, not nothing */
		const struct mic_scif_reply failed = {.status = all[nfds]};

		return send_answer(fd, &failed, NULL, 0, NULL, 0);
	}
	int rc = send_answer(fd, head, NULL, 0, all, nfds + 1);

	close(all[nfds]);
	return rc;
}

int mic_scif_hang_up(int fd)
{
	/* Full of tokens: not empty, which is what matters. */
	if (send(fd, "D", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno != EAGAIN)
		return -errno;
	return shutdown(fd, SHUT_RDWR) < 0 ? -errno : 0;
}

int mic_scif_gone(int fd)
{
	int error = 0, unread = 1;
	socklen_t len = sizeof error;

	/* A token that was sent after the close has taken the error with it; the last one is never read. */
	return getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) < 0 || error != 0 ||
	       (ioctl(fd, SIOCOUTQ, &unread) == 0 && unread == 0);
}
