/* Life of an endpoint: open, bind, listen, connect, accept, close (SCIF 2.2-2.8). */
#include "internal.h"

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* A connected socket that is an endpoint: descriptor or -errno. */
static int open_endpoint(bool cloexec)
{
	uint64_t cookie = 0, sid = 0;
	int fd = node_connect(), rc;

	if (fd < 0)
		return fd;
	rc = socket_cookie(fd, &cookie);
	if (rc == 0)
		rc = node_open(fd, cookie, &sid);
	if (rc == 0 && !cloexec && fcntl(fd, F_SETFD, 0) < 0)
		rc = -errno;
	if (rc == 0)
		rc = ep_add(fd, cookie, sid);
	if (rc < 0) {
		close(fd);
		return rc;
	}
	return fd;
}

API scif_epd_t scif_open(void)
{
	int saved = errno, fd = open_endpoint(true);

	if (fd < 0)
		return fail(fd);
	errno = saved;
	return fd;
}

/* A request about one endpoint with a plain answer. */
static int simple(int fd, uint32_t op, uint64_t a0, uint64_t *v0)
{
	struct ep *ep;
	int rc = ep_get(fd, &ep);

	if (rc < 0)
		return rc;
	rc = node_ask(op, ep->sid, a0, 0, v0);
	if (rc == 0 && op == MIC_SCIF_LISTEN)
		ep->listening = true;
	ep_put(ep);
	return rc;
}

API int scif_bind(scif_epd_t epd, uint16_t pn)
{
	uint64_t port = 0;
	int rc = simple(epd, MIC_SCIF_BIND, pn, &port);

	return rc < 0 ? fail(rc) : (int)port;
}

API int scif_listen(scif_epd_t epd, int backlog)
{
	int rc = simple(epd, MIC_SCIF_LISTEN, (uint64_t)(int64_t)backlog, NULL);

	if (rc < 0)
		return fail(rc);
	fill(epd); /* a listener is never writable (SCIF 2.9) */
	return 0;
}

static int do_connect(struct ep *ep, int fd, const struct scif_portID *dst)
{
	int saved = errno, fl = fcntl(fd, F_GETFL);
	bool nonblock = fl >= 0 && (fl & O_NONBLOCK);
	const struct mic_scif_request rq = {
		.op = MIC_SCIF_CONNECT, .sid = ep->sid, .a = {dst->node, dst->port, nonblock}};
	struct answer ans = {0};

	errno = saved;
	/* Not writable while the attempt is pending; the node undoes it when it is over (SCIF-42). */
	if (nonblock)
		fill(fd);
	int rc = node_call(&rq, NULL, &ans, false);

	answer_close(&ans);
	return rc < 0 ? rc : (int)ans.head.v[0];
}

API int scif_connect(scif_epd_t epd, struct scif_portID *dst)
{
	struct scif_portID to;
	struct ep *ep;
	int rc;

	if (!dst)
		return fail(-EINVAL);
	to = *dst;
	rc = ep_get(epd, &ep);
	if (rc < 0)
		return fail(rc);
	rc = do_connect(ep, epd, &to);
	ep_put(ep);
	return rc < 0 ? fail(rc) : rc;
}

/* Let the node put the oldest request behind `newfd`. */
static int do_accept(struct ep *ep, int fd, int newfd, struct scif_portID *peer, int flags)
{
	struct ep *fresh;
	int rc = ep_get(newfd, &fresh);

	if (rc < 0)
		return rc;
	const struct mic_scif_request rq = {
		.op = MIC_SCIF_ACCEPT, .sid = ep->sid, .a = {fresh->sid, (uint64_t)flags}};
	struct answer ans = {0};
	char drop;

	ep_put(fresh);
	ep->listening = true; /* closing it here must end accepts of this process */
	rc = node_call(&rq, NULL, &ans, true);
	answer_close(&ans);
	if (ans.head.v[2]) { /* no request is left: one token less (SCIF-71) */
		int saved = errno;

		(void)!recv(fd, &drop, 1, MSG_DONTWAIT);
		errno = saved;
	}
	if (rc < 0)
		return rc;
	peer->node = (uint16_t)ans.head.v[0];
	peer->port = (uint16_t)ans.head.v[1];
	return 0;
}

API int scif_accept(scif_epd_t epd, struct scif_portID *peer, scif_epd_t *newepd, int flags)
{
	struct scif_portID from;
	struct ep *ep;
	int saved = errno, newfd, rc;

	if (!peer || !newepd)
		return fail(-EINVAL);
	newfd = open_endpoint(false);
	if (newfd < 0)
		return fail(newfd);
	rc = ep_get(epd, &ep);
	if (rc == 0) {
		rc = flags & ~SCIF_ACCEPT_SYNC ? -EINVAL : do_accept(ep, epd, newfd, &from, flags);
		ep_put(ep);
	}
	if (rc < 0) {
		ep_forget(newfd);
		close(newfd);
		return fail(rc);
	}
	*peer = from;
	*newepd = newfd;
	errno = saved;
	return 0;
}

API int scif_close(scif_epd_t epd)
{
	struct ep *ep;
	uint64_t sid = 0;
	int saved = errno;

	if (ep_get(epd, &ep) == 0) {
		sid = ep->sid;
		if (ep->listening)
			node_ask(MIC_SCIF_FLUSH, sid, 0, 0, NULL);
		ep_put(ep);
		ep_forget(epd);
	}
	if (close(epd) < 0)
		return -1;
	/* When this was the last reference, return after the release, as close of a device does. */
	if (sid)
		node_ask(MIC_SCIF_SYNC, sid, 0, 0, NULL);
	errno = saved;
	return 0;
}

API int scif_get_fd(scif_epd_t epd)
{
	return epd;
}

API int scif_get_nodeIDs(uint16_t *nodes, int len, uint16_t *self)
{
	uint16_t ids[256];
	const struct mic_scif_request rq = {.op = MIC_SCIF_NODES};
	struct answer ans = {.data = ids, .max = sizeof ids};
	int saved = errno, fd, rc;

	fd = node_connect(); /* a private descriptor, as the real library: EMFILE shows here */
	if (fd < 0)
		return fail(fd);
	close(fd);
	rc = node_call(&rq, NULL, &ans, false);
	answer_close(&ans);
	if (rc < 0)
		return fail(rc);
	if (len < 0)
		return fail(-ENOMEM);
	size_t n = ans.head.ndata / sizeof *ids;

	if (n > (size_t)len)
		n = (size_t)len;
	if ((n && user_writable(nodes, n * sizeof *ids) < 0) || user_writable(self, sizeof *self) < 0)
		return fail(-EFAULT);
	memcpy(nodes ? nodes : ids, ids, n * sizeof *ids);
	*self = (uint16_t)ans.head.v[1];
	errno = saved;
	return (int)ans.head.v[0];
}
