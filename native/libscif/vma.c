/* What is mapped where in this process. */
#include "memory.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
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

static int by_query(int fd, uintptr_t addr, struct vma *v)
{
	struct map_query q = {.size = sizeof q, .flags = Q_COVERING_OR_NEXT, .addr = addr};

	if (ioctl(fd, QUERY, &q) < 0)
		return errno == ENOENT ? -ENOENT : -ENOSYS;
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

static int by_text(int fd, uintptr_t addr, struct vma *v)
{
	FILE *f = fdopen(dup(fd), "re");
	char *line = NULL;
	size_t size = 0;
	int rc = -ENOENT;

	if (!f)
		return -ENOMEM;
	while (rc < 0 && getline(&line, &size, f) > 0) {
		unsigned long start, end, off, ino;
		unsigned maj, min;
		char perm[5];

		if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &start, &end, perm, &off, &maj, &min, &ino) !=
			    7 ||
		    end <= addr)
			continue;
		*v = (struct vma){.start = start,
				  .end = end,
				  .read = perm[0] == 'r',
				  .write = perm[1] == 'w',
				  .exec = perm[2] == 'x',
				  .shared = perm[3] == 's',
				  .ino = ino,
				  .dev = makedev(maj, min),
				  .off = off};
		rc = 0;
	}
	free(line);
	fclose(f);
	return rc;
}

int vma_from(uintptr_t addr, struct vma *v)
{
	int saved = errno, fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC), rc;

	if (fd < 0) {
		errno = saved;
		return -ENOENT;
	}
	rc = by_query(fd, addr, v);
	if (rc == -ENOSYS)
		rc = by_text(fd, addr, v);
	close(fd);
	errno = saved;
	return rc;
}
