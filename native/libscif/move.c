/* Moving the caller's pages into node memory, in place (design section 6).
 *
 * The range is write-protected, copied, and the copy is moved over it in one step. A thread that
 * writes meanwhile waits in its fault and then writes into the new pages: nothing is lost.
 * userfaultfd does that without the process noticing; where it is refused, mprotect and a SIGSEGV
 * handler do. After the move the pages stay there for as long as the process maps them. */
#include "memory.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* A piece of the process that lies in node memory because we moved it. */
struct piece {
	uintptr_t addr;
	size_t len;
	uint64_t off, run, run_len, dev, ino;
};

static struct piece *pieces;
static unsigned npieces, max_pieces;
static pthread_mutex_t piece_lock = PTHREAD_MUTEX_INITIALIZER;

int seg_add(struct seglist *l, uint64_t off, uint64_t len)
{
	if (l->n && l->seg[l->n - 1].off + l->seg[l->n - 1].len == off) {
		l->seg[l->n - 1].len += len;
		return 0;
	}
	if (l->n == l->max) {
		uint32_t max = l->max ? 2 * l->max : 16;
		void *p = realloc(l->seg, max * sizeof *l->seg);

		if (!p)
			return -ENOMEM;
		l->seg = p;
		l->max = max;
	}
	l->seg[l->n++] = (struct mic_scif_seg){off, len};
	return 0;
}

static bool in_node(const struct vma *v, uint64_t dev, uint64_t ino)
{
	return v->shared && v->ino == ino && v->dev == dev;
}

int64_t move_plan(uintptr_t addr, size_t len, uint64_t dev, uint64_t ino, int prot)
{
	uintptr_t end = addr + len;
	int64_t bytes = 0;

	if (end < addr)
		return -EFAULT;
	while (addr < end) {
		struct vma v;

		if (vma_from(addr, &v) < 0 || v.start > addr || !v.read)
			return -EFAULT;
		/* Only a read-only window may lie on read-only memory (SCIF-83). */
		if (!v.write && prot != SCIF_PROT_READ)
			return -EFAULT;
		uintptr_t stop = v.end < end ? v.end : end;

		if (!in_node(&v, dev, ino)) {
			if (v.shared) /* moving it would take it away from those who share it */
				return -EFAULT;
			bytes += (int64_t)(stop - addr);
		}
		addr = stop;
	}
	return bytes;
}

/* --- holding writers back ---------------------------------------------------------------------- */

static uintptr_t guarded_start, guarded_end; /* by mprotect */
static struct sigaction old_segv;

static void on_segv(int sig, siginfo_t *info, void *context)
{
	uintptr_t at = (uintptr_t)info->si_addr;

	if (at >= mic_load_acquire(&guarded_start) && at < mic_load_acquire(&guarded_end)) {
		sched_yield(); /* and fault again until the range has moved */
		return;
	}
	if (old_segv.sa_flags & SA_SIGINFO) {
		old_segv.sa_sigaction(sig, info, context);
	} else if (old_segv.sa_handler != SIG_DFL && old_segv.sa_handler != SIG_IGN) {
		old_segv.sa_handler(sig);
	} else if (at) {
		struct vma v;

		/* The range may have just been released: only a real fault ends the program. */
		if (vma_from(at, &v) < 0 || v.start > at || !v.write)
			sigaction(SIGSEGV, &old_segv, NULL);
	} else {
		sigaction(SIGSEGV, &old_segv, NULL);
	}
}

static int guard_mprotect(uintptr_t addr, size_t len)
{
	struct sigaction sa = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_NODEFER};

	if (!old_segv.sa_flags && !old_segv.sa_handler && sigaction(SIGSEGV, &sa, &old_segv) < 0)
		return -errno;
	mic_store_release(&guarded_start, addr);
	mic_store_release(&guarded_end, addr + len);
	return mprotect((void *)addr, len, PROT_READ) < 0 ? -errno : 0;
}

/* A userfaultfd that blocks writers of the range; closing it lets them go. -errno: not possible. */
static int guard_uffd(uintptr_t addr, size_t len)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_UNPOPULATED};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);

	if (fd < 0)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (fd < 0)
		return -errno;
	if (ioctl(fd, UFFDIO_API, &api) < 0)
		goto no;
	struct uffdio_register reg = {{addr, len}, UFFDIO_REGISTER_MODE_WP, 0};
	struct uffdio_writeprotect wp = {{addr, len}, UFFDIO_WRITEPROTECT_MODE_WP};

	if (ioctl(fd, UFFDIO_REGISTER, &reg) < 0 || ioctl(fd, UFFDIO_WRITEPROTECT, &wp) < 0)
		goto no;
	return fd;
no:
	close(fd);
	return -EINVAL;
}

static int guard(const struct vma *v, uintptr_t addr, size_t len)
{
	int fd = -EINVAL;

	if (!v->write)
		return -ENOENT; /* nobody writes */
	if (!v->ino && !getenv("MICEMU_SCIF_NO_UFFD"))
		fd = guard_uffd(addr, len);
	return fd >= 0 ? fd : guard_mprotect(addr, len) < 0 ? -EFAULT : -ENOENT;
}

static void unguard(int fd)
{
	if (fd >= 0)
		close(fd);
	mic_store_release(&guarded_end, (uintptr_t)0);
}

/* --- moving ------------------------------------------------------------------------------------- */

/* Whole pages, whatever lies in them: not memcpy, which checkers replace by one that knows of the guard
 * zones between the program's objects. */
static void copy_pages(void *to, const void *from, size_t len)
{
	size_t words = len / 8;

	__asm__ __volatile__("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
}

static int prot_of(const struct vma *v)
{
	return (v->read ? PROT_READ : 0) | (v->write ? PROT_WRITE : 0) | (v->exec ? PROT_EXEC : 0);
}

/* Put `len` bytes at `addr` onto the mapping `to`, which then takes their place. */
static int replace(const struct vma *v, uintptr_t addr, size_t len, uint8_t *to)
{
	int hold = guard(v, addr, len), rc = 0;

	if (hold == -EFAULT)
		return -EFAULT;
	copy_pages(to, (const void *)addr, len);
	if ((!v->write || v->exec) && mprotect(to, len, prot_of(v)) < 0)
		rc = -EFAULT;
	else if (mremap(to, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)addr) == MAP_FAILED)
		rc = -ENOMEM;
	if (rc < 0 && v->write)
		mprotect((void *)addr, len, prot_of(v));
	unguard(hold);
	return rc;
}

static int remember(const struct piece *p)
{
	if (npieces == max_pieces) {
		unsigned max = max_pieces ? 2 * max_pieces : 64;
		void *q = realloc(pieces, max * sizeof *pieces);

		if (!q)
			return -ENOMEM;
		pieces = q;
		max_pieces = max;
	}
	pieces[npieces++] = *p;
	return 0;
}

static int move_piece(const struct vma *v, const struct piece *p, int fd)
{
	uint8_t *to;
	int rc = remember(p);

	if (rc < 0)
		return rc;
	to = mmap(NULL, p->len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)p->off);
	if (to == MAP_FAILED) {
		npieces--;
		return -ENOMEM;
	}
	rc = replace(v, p->addr, p->len, to);
	if (rc < 0) {
		munmap(to, p->len);
		npieces--;
	}
	return rc;
}

static int walk(uintptr_t addr, size_t len, int fd, struct piece *p, struct seglist *out, bool *moved)
{
	uintptr_t end = addr + len;
	int rc = 0;

	while (addr < end && rc == 0) {
		struct vma v;

		if (vma_from(addr, &v) < 0 || v.start > addr)
			return -EFAULT;
		size_t n = (v.end < end ? v.end : end) - addr;

		if (in_node(&v, p->dev, p->ino)) {
			rc = seg_add(out, v.off + (addr - v.start), n);
		} else if (p->off + n > p->run + p->run_len) {
			return -EFAULT; /* it changed since it was planned */
		} else {
			p->addr = addr;
			p->len = n;
			rc = move_piece(&v, p, fd);
			if (rc == 0) {
				*moved = true;
				rc = seg_add(out, p->off, n);
				p->off += n;
			}
		}
		addr += n;
	}
	return rc;
}

struct job {
	uintptr_t addr;
	size_t len;
	int fd, rc;
	struct piece *first;
	struct seglist *out;
	bool *moved;
};

static void *run_job(void *arg)
{
	struct job *j = arg;

	j->rc = walk(j->addr, j->len, j->fd, j->first, j->out, j->moved);
	return NULL;
}

int move_range(uintptr_t addr, size_t len, int fd, uint64_t dev, uint64_t ino, uint64_t place,
	       struct seglist *out, bool *moved)
{
	struct piece first = {.off = place, .run = place, .dev = dev, .ino = ino};
	struct job j = {addr, len, fd, 0, &first, out, moved};
	uintptr_t here = (uintptr_t)__builtin_frame_address(0);
	pthread_t t;

	int64_t plan = move_plan(addr, len, dev, ino, SCIF_PROT_READ);

	if (plan < 0)
		return -EFAULT;
	first.run_len = (uint64_t)plan;
	pthread_mutex_lock(&piece_lock);
	/* A thread cannot move the stack that it runs on: another one does, while it waits. */
	if (here + (1 << 20) > addr && here < addr + len + (64 << 10)) {
		if (pthread_create(&t, NULL, run_job, &j))
			j.rc = -ENOMEM;
		else
			pthread_join(t, NULL);
	} else {
		run_job(&j);
	}
	pthread_mutex_unlock(&piece_lock);
	return j.rc;
}

/* --- giving up ---------------------------------------------------------------------------------- */

static bool still_there(const struct piece *p)
{
	struct vma v;

	return vma_from(p->addr, &v) == 0 && v.start < p->addr + p->len && in_node(&v, p->dev, p->ino) &&
	       v.off < p->off + p->len && v.off + (v.end - v.start) > p->off;
}

/* Is any page of the run mapped anywhere? It may have been moved by mremap. */
static bool mapped_elsewhere(const struct piece *p)
{
	struct vma v;

	for (uintptr_t a = 0; vma_from(a, &v) == 0; a = v.end)
		if (in_node(&v, p->dev, p->ino) && v.off < p->run + p->run_len &&
		    v.off + (v.end - v.start) > p->run)
			return true;
	return false;
}

static bool run_in_use(uint64_t run)
{
	for (unsigned i = 0; i < npieces; i++)
		if (pieces[i].run == run && still_there(&pieces[i]))
			return true;
	return false;
}

int move_sweep(uint64_t dev, uint64_t ino, struct seglist *gone)
{
	int rc = 0;

	pthread_mutex_lock(&piece_lock);
	for (unsigned i = 0; i < npieces && rc == 0;) {
		struct piece p = pieces[i];

		if (p.dev != dev || p.ino != ino || still_there(&p) || run_in_use(p.run) ||
		    mapped_elsewhere(&p)) {
			i++;
			continue;
		}
		rc = seg_add(gone, p.run, 0);
		for (unsigned k = npieces; k-- > 0;)
			if (pieces[k].run == p.run && pieces[k].ino == ino)
				pieces[k] = pieces[--npieces];
		i = 0;
	}
	pthread_mutex_unlock(&piece_lock);
	return rc;
}

/* --- fork --------------------------------------------------------------------------------------- */

static int fork_pipe[2] = {-1, -1};

void move_before_fork(void)
{
	pthread_mutex_lock(&piece_lock);
	if (npieces && pipe2(fork_pipe, O_CLOEXEC) < 0)
		fork_pipe[0] = fork_pipe[1] = -1;
}

void move_after_fork_parent(void)
{
	char c;

	/* What the parent writes from now on is not the child's: wait until it has its copies. */
	if (fork_pipe[0] >= 0) {
		close(fork_pipe[1]);
		while (read(fork_pipe[0], &c, 1) < 0 && errno == EINTR)
			;
		close(fork_pipe[0]);
		fork_pipe[0] = -1;
	}
	pthread_mutex_unlock(&piece_lock);
}

static void make_private(uintptr_t addr, size_t len, const struct vma *v)
{
	uint8_t *to = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (to == MAP_FAILED)
		return;
	copy_pages(to, (const void *)addr, len);
	if (!v->write || v->exec)
		mprotect(to, len, prot_of(v));
	mremap(to, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)addr);
}

void move_after_fork_child(void)
{
	for (unsigned i = 0; i < npieces; i++) {
		const struct piece *p = &pieces[i];
		uintptr_t end = p->addr + p->len;
		struct vma v;

		for (uintptr_t a = p->addr; a < end && vma_from(a, &v) == 0 && v.start < end; a = v.end) {
			uintptr_t from = v.start > a ? v.start : a, to = v.end < end ? v.end : end;

			if (in_node(&v, p->dev, p->ino))
				make_private(from, to - from, &v);
		}
	}
	npieces = 0;
	if (fork_pipe[0] >= 0) {
		close(fork_pipe[0]);
		close(fork_pipe[1]);
		fork_pipe[0] = -1;
	}
	pthread_mutex_init(&piece_lock, NULL);
}
