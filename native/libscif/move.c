/* Moving the caller's pages into node memory, in place (design section 6).
 *
 * The range is write-protected, copied, and the copy is moved over it in one step. A thread that
 * writes meanwhile waits in its fault and then writes into the new pages: nothing is lost.
 * userfaultfd does that without the process noticing; where it is refused, mprotect and a SIGSEGV
 * handler do. After the move the pages stay there for as long as the process maps them. */
#include "memory.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "mic/uffd.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define PART ((size_t)256 << 10) /* of a copy: fits into any cache of a core */

/* Bytes of one mapping's part [addr, addr + len) of the range that are to be moved, or -EFAULT. */
static int64_t plan_part(const struct vma *v, uint64_t dev, uint64_t ino, int prot, uintptr_t addr,
			 size_t len)
{
	/* Only a read-only window may lie on read-only memory (SCIF-83). */
	if (!v->read || (!v->write && prot != SCIF_PROT_READ))
		return -EFAULT;
	if (in_node(v, dev, ino))
		return 0;
	if (v->shared) /* moving it would take it away from those who share it */
		return -EFAULT;
	/* A file may end before its mapping does. */
	return v->ino && user_present((const void *)addr, len) < 0 ? -EFAULT : (int64_t)len;
}

int64_t move_plan(uintptr_t addr, size_t len, uint64_t dev, uint64_t ino, int prot)
{
	uintptr_t end = addr + len;
	int64_t bytes = 0, part = 0;
	struct maps m;

	if (end < addr)
		return -EFAULT;
	if (maps_open(&m) < 0)
		return -ENOMEM;
	while (addr < end && part >= 0) {
		struct vma v;

		if (maps_from(&m, addr, &v) < 0 || v.start > addr) {
			part = -EFAULT;
			break;
		}
		uintptr_t stop = v.end < end ? v.end : end;

		part = plan_part(&v, dev, ino, prot, addr, stop - addr);
		bytes += part;
		addr = stop;
	}
	maps_close(&m);
	return part < 0 ? part : bytes;
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
	/* On the program's other stack, if it has one: its handler may be for a stack that ran over. */
	struct sigaction sa = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK}, is;

	if (sigaction(SIGSEGV, NULL, &is) < 0)
		return -errno;
	if (!(is.sa_flags & SA_SIGINFO) || is.sa_sigaction != on_segv) { /* never passed on to itself */
		old_segv = is;
		if (sigaction(SIGSEGV, &sa, NULL) < 0)
			return -errno;
	}
	mic_store_release(&guarded_start, addr);
	mic_store_release(&guarded_end, addr + len);
	if (mprotect((void *)addr, len, PROT_READ) == 0)
		return 0;
	mic_store_release(&guarded_end, (uintptr_t)0); /* a fault in it is the program's */
	return -ENOMEM;
}

/* A userfaultfd that blocks writers of the range; closing it lets them go. -errno: not possible. */
static int guard_uffd(uintptr_t addr, size_t len)
{
	static uint32_t unknown; /* a tool or filter that does not know the call: asked once */
	int fd;

	if (mic_load_relaxed(&unknown))
		return -ENOSYS;
	fd = mic_uffd_open();
	if (fd < 0) {
		mic_store_relaxed(&unknown, fd == -ENOSYS);
		return fd;
	}
	struct uffdio_register reg = {{addr, len}, UFFDIO_REGISTER_MODE_WP, 0};
	struct uffdio_writeprotect wp = {{addr, len}, UFFDIO_WRITEPROTECT_MODE_WP};

	if (ioctl(fd, UFFDIO_REGISTER, &reg) == 0 && ioctl(fd, UFFDIO_WRITEPROTECT, &wp) == 0)
		return fd;
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

/* Tell valgrind not to report (1), to report again (-1): whole pages are copied, what the program has freed
 * in them included. By a rotation that changes nothing, for any other processor. */
static void valgrind_silent(int64_t change)
{
	const uint64_t request[6] = {0x1801 /* CHANGE_ERR_DISABLEMENT */, (uint64_t)change};
	uint64_t answer = 0;

	__asm__ __volatile__(
		"rolq $3, %%rdi; rolq $13, %%rdi; rolq $61, %%rdi; rolq $51, %%rdi; xchgq %%rbx, %%rbx"
		: "+d"(answer)
		: "a"(request)
		: "cc", "memory");
}

/* Not memcpy, which checkers replace by one that knows of the guard zones between the program's objects. */
static void copy_part(void *to, const void *from, size_t len)
{
	size_t words = len / 8;

	__asm__ __volatile__("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
}

/* New pages cost a fault each, and their zeros are in the cache only for a short while: so they are asked for
 * in parts, each of which is overwritten while it is still there. A refusal does no harm. */
void copy_pages(void *to, const void *from, size_t len)
{
	valgrind_silent(1);
	for (size_t at = 0, n; at < len; at += n) {
		n = len - at < PART ? len - at : PART;
		if (n > PAGE)
			madvise((uint8_t *)to + at, n, MADV_POPULATE_WRITE);
		copy_part((uint8_t *)to + at, (const uint8_t *)from + at, n);
	}
	valgrind_silent(-1);
}

int prot_of(const struct vma *v)
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

struct job {
	uintptr_t addr;
	size_t len;
	int fd, rc;
	uint64_t dev, ino;
	struct piece next; /* where the next pages go */
	struct seglist *out;
	bool *moved;
};

static int move_piece(const struct vma *v, const struct job *j)
{
	const struct piece *p = &j->next;
	uint8_t *to;
	int rc = piece_add(j->dev, j->ino, p);

	if (rc < 0)
		return rc;
	to = mmap(NULL, p->len, PROT_READ | PROT_WRITE, MAP_SHARED, j->fd, (off_t)p->off);
	if (to == MAP_FAILED) {
		piece_undo(j->dev, j->ino);
		return -ENOMEM;
	}
	rc = replace(v, p->addr, p->len, to);
	if (rc < 0) {
		munmap(to, p->len);
		piece_undo(j->dev, j->ino);
	}
	return rc;
}

static int walk(struct job *j, struct maps *m)
{
	uintptr_t addr = j->addr, end = addr + j->len;
	struct piece *p = &j->next;
	int rc = 0;

	while (addr < end && rc == 0) {
		struct vma v;

		if (maps_from(m, addr, &v) < 0 || v.start > addr)
			return -EFAULT;
		size_t n = (v.end < end ? v.end : end) - addr;

		if (in_node(&v, j->dev, j->ino)) {
			rc = seg_add(j->out, v.off + (addr - v.start), n);
		} else if (!v.read || v.shared || p->off + n > p->run + p->run_len) {
			return -EFAULT; /* another thread has changed it since it was planned */
		} else {
			p->addr = addr;
			p->len = n;
			rc = move_piece(&v, j);
			if (rc == 0) {
				*j->moved = true;
				rc = seg_add(j->out, p->off, n);
				p->off += n;
			}
		}
		addr += n;
	}
	return rc;
}

static void *run_job(void *arg)
{
	struct job *j = arg;
	struct maps m;

	j->rc = maps_open(&m) < 0 ? -ENOMEM : walk(j, &m);
	maps_close(&m);
	return NULL;
}

/* --- the caller's own stack ------------------------------------------------------------------------ */

static uint32_t still, moved_it; /* not on the stack; one registration at a time */

static void *run_when_still(void *job)
{
	while (!mic_load_acquire(&still))
		(void)syscall(SYS_futex, &still, FUTEX_WAIT, 0, NULL, NULL, 0);
	run_job(job);
	mic_store_release(&moved_it, 1u);
	(void)syscall(SYS_futex, &moved_it, FUTEX_WAKE, 1, NULL, NULL, 0);
	return NULL;
}

/* Say that this thread stands still, and wait. Nothing is written to its stack from the first store to the
 * last look: by hand, since any call of a function would. */
static void stand_still(void)
{
	__asm__ __volatile__("movl $1, (%[still])\n\t"
			     "movl %[futex], %%eax\n\t"
			     "movq %[still], %%rdi\n\t"
			     "movl %[wake], %%esi\n\t"
			     "movl $1, %%edx\n\t"
			     "syscall\n"
			     "1:\tcmpl $0, (%[moved])\n\t"
			     "jne 2f\n\t"
			     "movl %[futex], %%eax\n\t"
			     "movq %[moved], %%rdi\n\t"
			     "movl %[wait], %%esi\n\t"
			     "xorl %%edx, %%edx\n\t"
			     "xorl %%r10d, %%r10d\n\t"
			     "syscall\n\t"
			     "jmp 1b\n"
			     "2:"
			     :
			     : [still] "r"(&still), [moved] "r"(&moved_it), [futex] "i"(SYS_futex),
			       [wake] "i"(FUTEX_WAKE), [wait] "i"(FUTEX_WAIT)
			     : "rax", "rcx", "rdx", "rsi", "rdi", "r10", "r11", "cc", "memory");
}

/* A thread cannot move the stack that it runs on: another one does, while it stands still. A handler of the
 * program would run on that stack, so signals wait, too. */
static void run_elsewhere(struct job *j)
{
	sigset_t most, old;
	pthread_t t;

	sigfillset(&most);
	sigdelset(&most, SIGSEGV);
	sigdelset(&most, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &most, &old);
	mic_store_relaxed(&still, 0u);
	mic_store_relaxed(&moved_it, 0u);
	if (pthread_create(&t, NULL, run_when_still, j)) {
		j->rc = -ENOMEM;
	} else {
		stand_still();
		pthread_join(t, NULL);
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

int move_range(uintptr_t addr, size_t len, int fd, uint64_t dev, uint64_t ino,
	       const struct mic_scif_seg *room, struct seglist *out, bool *moved)
{
	struct job j = {.addr = addr,
			.len = len,
			.fd = fd,
			.dev = dev,
			.ino = ino,
			.next = {.off = room->off, .run = room->off, .run_len = room->len},
			.out = out,
			.moved = moved};
	uintptr_t here = (uintptr_t)__builtin_frame_address(0);

	pieces_lock();
	if (here + (1 << 20) > addr && here < addr + len + (64 << 10))
		run_elsewhere(&j);
	else
		run_job(&j);
	pieces_unlock();
	return j.rc;
}
