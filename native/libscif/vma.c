/* What is mapped where in this process. */
#include "memory.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/sysmacros.h>

/* The query of newer kernels (6.11); the text of /proc/self/maps is the other way. */
struct map_query {
	uint64_t size, flags, addr, start, end, vma_flags, page_size, off, ino;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name, build_id;
};
#define QUERY _IOWR('f', 17, struct map_query)
enum { Q_READ = 1, Q_WRITE = 2, Q_EXEC = 4, Q_SHARED = 8, Q_COVERING_OR_NEXT = 16 };

int maps_open(struct maps *m)
{
	int saved = errno, fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC), rc = fd < 0 ? -errno : 0;

	errno = saved;
	m->fd = fd;
	m->text = false;
	m->at = m->have = 0;
	m->past = 0;
	return rc;
}

void maps_close(struct maps *m)
{
	int saved = errno;

	if (m->fd >= 0)
		close(m->fd);
	errno = saved;
}

static int by_query(int fd, uintptr_t addr, struct vma *v)
{
	struct map_query q = {.size = sizeof q, .flags = Q_COVERING_OR_NEXT, .addr = addr};

	if (ioctl(fd, QUERY, &q) < 0)
		return errno == ENOENT || errno == ENOTTY || errno == EINVAL ? -errno : -EIO;
	*v = (struct vma){.start = q.start,
			  .end = q.end,
			  .read = q.vma_flags & Q_READ,
			  .write = q.vma_flags & Q_WRITE,
			  .exec = q.vma_flags & Q_EXEC,
			  .shared = q.vma_flags & Q_SHARED,
			  .ino = q.ino,
			  .dev = makedev(q.major, q.minor),
			  .off = q.off};
	return 0;
}

/* --- the text: without stdio, because a signal handler looks, too ---------------------------------- */

/* The next character of the text; -ENOENT at its end, -EIO. */
static int next_char(struct maps *m)
{
	if (m->at == m->have) {
		ssize_t n;

		do
			n = read(m->fd, m->buf, sizeof m->buf);
		while (n < 0 && errno == EINTR);
		if (n <= 0)
			return n < 0 ? -EIO : -ENOENT;
		m->have = (uint32_t)n;
		m->at = 0;
	}
	return (unsigned char)m->buf[m->at++];
}

/* A number up to the character behind it, which is taken, too. */
static int number(struct maps *m, unsigned base, uint64_t *out)
{
	int c;

	for (*out = 0; (c = next_char(m)) >= 0; *out = *out * base + (unsigned)c) {
		c = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : 16;
		if ((unsigned)c >= base)
			return 0;
	}
	return c;
}

static int line(struct maps *m, struct vma *v)
{
	uint64_t start, end, major, minor;
	int rc = number(m, 16, &start), c = 0;
	char perm[5];

	if (rc < 0)
		return rc; /* this may be the end, anywhere else is too early */
	*v = (struct vma){.start = start};
	rc = number(m, 16, &end);
	for (int i = 0; i < 5 && rc == 0; i++) {
		c = next_char(m);
		perm[i] = (char)c;
		rc = c < 0 ? c : 0;
	}
	if (rc < 0 || number(m, 16, &v->off) < 0 || number(m, 16, &major) < 0 || number(m, 16, &minor) < 0 ||
	    number(m, 10, &v->ino) < 0)
		return -EIO;
	for (c = ' '; c >= 0 && c != '\n';) /* the name, and the space before it, which number() took */
		c = next_char(m);
	v->end = end;
	v->read = perm[0] == 'r';
	v->write = perm[1] == 'w';
	v->exec = perm[2] == 'x';
	v->shared = perm[3] == 's';
	v->dev = makedev((unsigned)major, (unsigned)minor);
	return c < 0 ? -EIO : 0;
}

static int by_text(struct maps *m, uintptr_t addr, struct vma *v)
{
	int rc = 0;

	if (!m->text || addr < m->past) {
		if (lseek(m->fd, 0, SEEK_SET) < 0)
			return -EIO;
		m->text = true;
		m->at = m->have = 0;
	}
	do
		rc = line(m, v);
	while (rc == 0 && v->end <= addr);
	m->past = rc == 0 ? v->end : UINTPTR_MAX;
	return rc;
}

int maps_from(struct maps *m, uintptr_t addr, struct vma *v)
{
	int saved = errno, rc = m->text ? -ENOTTY : by_query(m->fd, addr, v);

	if (rc == -ENOTTY || rc == -EINVAL)
		rc = by_text(m, addr, v);
	errno = saved;
	return rc;
}

int vma_from(uintptr_t addr, struct vma *v)
{
	struct maps m;
	int rc = maps_open(&m);

	if (rc < 0)
		return rc;
	rc = maps_from(&m, addr, v);
	maps_close(&m);
	return rc;
}
