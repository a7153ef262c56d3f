/* Yardsticks of SCIF: two processes that share a cache line, a futex in it, a Unix stream socket. */
#define _GNU_SOURCE
#include "bench.h"
#include "mic/scif_bench.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "mic/barrier.h"

struct words { /* of both directions, two lines apart: neighbours are fetched in pairs */
	_Alignas(128) uint64_t there;
	_Alignas(128) uint64_t back;
};

struct ends {
	struct words *shared;
	int fd[2];
};

void bench_pause(uint64_t ns)
{
	for (uint64_t end = mic_now_ns() + ns; ns && mic_now_ns() < end;)
		mic_cpu_relax();
}

static int by_value(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return (x > y) - (x < y);
}

double bench_median(uint64_t *ns, uint64_t count)
{
	qsort(ns, count, sizeof *ns, by_value);
	return count ? (double)ns[count / 2] : 0;
}

static void await_word(uint64_t *word, uint64_t value)
{
	while (mic_load_acquire(word) != value) /* pairs with the store in bench_flag() */
		;
}

double bench_flag(uint64_t count, int serve, uint64_t *own, uint64_t *peer)
{
	uint64_t start = mic_now_ns();

	for (uint64_t i = 1; i <= count; i++) {
		if (serve)
			await_word(own, i);
		mic_store_release(peer, i);
		if (!serve)
			await_word(own, i);
	}
	return (double)(mic_now_ns() - start) / (double)count / 2;
}

/* The low half of a word is a futex. */
static void post(uint64_t *word, uint64_t value)
{
	mic_exchange(word, value);
	(void)syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void await_post(uint64_t *word, uint64_t value)
{
	for (uint64_t seen; (seen = mic_load_acquire(word)) != value;)
		(void)syscall(SYS_futex, word, FUTEX_WAIT, (uint32_t)seen, NULL, NULL, 0);
}

static double futexes(const struct mic_bench *b, int serve, uint64_t *own, uint64_t *peer)
{
	uint64_t *ns = calloc(b->count, sizeof *ns);

	if (!ns)
		return -ENOMEM;
	for (uint64_t i = 1; i <= b->count; i++) {
		if (serve) {
			await_post(own, i);
			post(peer, i);
			continue;
		}
		bench_pause(b->pause_ns);
		uint64_t start = mic_now_ns();

		post(peer, i);
		await_post(own, i);
		ns[i - 1] = mic_now_ns() - start;
	}
	double half = bench_median(ns, b->count) / 2;

	free(ns);
	return half;
}

static int move(int fd, uint8_t *buf, uint32_t size, int out)
{
	for (uint32_t done = 0; done < size;) {
		ssize_t n = out ? write(fd, buf + done, size - done) : read(fd, buf + done, size - done);

		if (n <= 0)
			return -EIO;
		done += (uint32_t)n;
	}
	return 0;
}

static double socket_stream(const struct mic_bench *b, int serve, int fd)
{
	uint8_t *buf = aligned_alloc(4096, (b->size + 4096) / 4096 * 4096);
	int rc = 0;

	if (!buf)
		return -ENOMEM;
	memset(buf, 1, b->size + 1);
	uint64_t start = mic_now_ns();

	for (uint64_t i = 0; i < b->count && rc == 0; i++)
		rc = move(fd, buf, b->size, !serve);
	if (rc == 0)
		rc = move(fd, buf, 1, serve);
	uint64_t end = mic_now_ns();

	free(buf);
	return rc < 0 ? rc : (double)(end - start) / (double)b->count;
}

static double one_end(const struct mic_bench *b, const struct ends *e, int serve)
{
	uint64_t *own = serve ? &e->shared->there : &e->shared->back;
	uint64_t *peer = serve ? &e->shared->back : &e->shared->there;

	if (b->op == MIC_BENCH_STREAM)
		return socket_stream(b, serve, e->fd[serve]);
	if (b->op == MIC_BENCH_PACED)
		return futexes(b, serve, own, peer);
	return bench_flag(b->count, serve, own, peer);
}

/* The child says by a byte that it runs where it should. */
static void child_main(const struct mic_bench *b, const struct ends *e, int cpu)
{
	cpu_set_t set;
	uint8_t ready = 1;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set) < 0 || move(e->fd[1], &ready, 1, 1) < 0)
		_exit(1);
	_exit(one_end(b, e, 1) < 0);
}

double mic_bench_limit(const struct mic_bench *b, int cpu)
{
	struct ends e;
	double ns = -EIO;
	uint8_t ready;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, e.fd) < 0)
		return -errno;
	e.shared = mmap(NULL, sizeof *e.shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t pid = e.shared == MAP_FAILED ? -1 : fork();

	if (pid == 0)
		child_main(b, &e, cpu);
	close(e.fd[1]);
	if (pid > 0 && move(e.fd[0], &ready, 1, 0) == 0)
		ns = one_end(b, &e, 0);
	close(e.fd[0]);
	if (pid > 0) {
		if (ns < 0)
			kill(pid, SIGKILL);
		waitpid(pid, NULL, 0);
	}
	if (e.shared != MAP_FAILED)
		munmap(e.shared, sizeof *e.shared);
	return ns;
}

double mic_bench_connect_limit(const char *path, uint64_t count)
{
	struct sockaddr_un to = {.sun_family = AF_UNIX};
	uint64_t start = mic_now_ns();

	if (strlen(path) >= sizeof to.sun_path)
		return -ENAMETOOLONG;
	memcpy(to.sun_path, path, strlen(path));
	for (uint64_t i = 0; i < count; i++) {
		int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), rc = -errno;
		uint8_t c = 1;

		if (fd >= 0)
			rc = connect(fd, (struct sockaddr *)&to, sizeof to) < 0 ? -errno : move(fd, &c, 1, 1);
		if (rc == 0)
			rc = move(fd, &c, 1, 0);
		if (fd >= 0)
			close(fd);
		if (rc < 0)
			return rc;
	}
	return (double)(mic_now_ns() - start) / (double)count;
}
