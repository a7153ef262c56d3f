/* Messages of the host process: JSON lines and descriptors over a Unix socket (mic_emu/wire.py). */
#include "internal.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int vop_wire_connect(struct vop_wire *w, const char *path)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	char reach[64];

	w->sock = -1;
	/* Through a handle: a run directory may be longer than sun_path. */
	int handle = open(path, O_PATH | O_CLOEXEC);

	if (handle < 0)
		return -errno;
	snprintf(reach, sizeof reach, "/proc/self/fd/%d", handle);
	memcpy(to.sun_path, reach, strlen(reach) + 1);
	w->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int rc = w->sock < 0 || connect(w->sock, (struct sockaddr *)&to, sizeof to) < 0 ? -errno : 0;

	close(handle);
	if (rc < 0)
		vop_wire_close(w);
	return rc;
}

void vop_wire_close(struct vop_wire *w)
{
	if (w->sock >= 0)
		close(w->sock);
	w->sock = -1;
	while (w->nfds)
		close(w->fds[--w->nfds]);
}

void vop_wire_goodbye(struct vop_wire *w)
{
	static const char bye[] = "{\"op\":\"close\"}\n";
	struct vop_line line;
	int rc = vop_wire_send(w, bye, sizeof bye - 1);

	while (rc >= 0) {
		while ((rc = vop_wire_recv(w, &line)) > 0) {
			while (line.nfds)
				close(line.fds[--line.nfds]);
			if (vop_word(line.text, "op", "\"closed\""))
				return;
		}
		struct pollfd p = {.fd = w->sock, .events = POLLIN};

		if (rc < 0 || (poll(&p, 1, REPLY_MS) <= 0 && errno != EINTR))
			return;
	}
}

static void take_fds(struct vop_wire *w, struct msghdr *msg)
{
	for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		unsigned n = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));

		for (unsigned i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
			if (w->nfds < MAX_FDS)
				w->fds[w->nfds++] = fd;
			else
				close(fd);
		}
	}
}

static int fill(struct vop_wire *w)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(MAX_FDS * sizeof(int))];
	} control;
	struct iovec iov = {.iov_base = w->in + w->have, .iov_len = sizeof w->in - w->have};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};

	if (!iov.iov_len)
		return -EPROTO;
	msg.msg_control = &control;
	msg.msg_controllen = sizeof control;
	ssize_t n = recvmsg(w->sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -ENODEV;
	if (n == 0)
		return -ENODEV;
	take_fds(w, &msg);
	w->have += (size_t)n;
	return msg.msg_flags & MSG_CTRUNC ? -EMFILE : 0;
}

int vop_wire_recv(struct vop_wire *w, struct vop_line *line)
{
	uint64_t wanted = 0;
	char *end = memchr(w->in, '\n', w->have);

	if (!end) {
		int rc = fill(w);

		if (rc < 0)
			return rc;
		end = memchr(w->in, '\n', w->have);
		if (!end)
			return 0;
	}
	size_t len = (size_t)(end - w->in);

	memcpy(line->text, w->in, len);
	line->text[len] = 0;
	memmove(w->in, end + 1, w->have -= len + 1);
	vop_number(line->text, "fds", &wanted);
	if (wanted > w->nfds)
		return -EPROTO;
	line->nfds = (unsigned)wanted;
	memcpy(line->fds, w->fds, line->nfds * sizeof(int));
	memmove(w->fds, w->fds + line->nfds, (w->nfds -= line->nfds) * sizeof(int));
	return 1;
}

int vop_wire_send(struct vop_wire *w, const char *text, size_t len)
{
	while (len) {
		ssize_t n = send(w->sock, text, len, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -ENODEV;
		text += n;
		len -= (size_t)n;
	}
	return 0;
}

static const char *value_of(const char *text, const char *key)
{
	char quoted[32];

	snprintf(quoted, sizeof quoted, "\"%s\":", key);
	const char *at = strstr(text, quoted);

	return at ? at + strlen(quoted) : NULL;
}

bool vop_number(const char *text, const char *key, uint64_t *value)
{
	const char *at = value_of(text, key);
	char *end;

	if (!at || *at < '0' || *at > '9')
		return false;
	*value = strtoull(at, &end, 10);
	return true;
}

unsigned vop_numbers(const char *text, const char *key, uint64_t *values, unsigned max)
{
	const char *at = value_of(text, key);
	unsigned n = 0;

	if (!at || *at != '[')
		return 0;
	while (n < max && at[1] >= '0' && at[1] <= '9') {
		char *end;

		values[n++] = strtoull(at + 1, &end, 10);
		at = end;
		if (*at != ',')
			break;
	}
	return n;
}

bool vop_word(const char *text, const char *key, const char *word)
{
	const char *at = value_of(text, key);

	return at && !strncmp(at, word, strlen(word));
}
