/* A blocking send may run ahead of a reader that waits in recv, and of nobody else (SCIF 2.7). */
#include "t.h"

#include <sys/time.h>

#define WANT  60000
#define AHEAD 20000 /* more than fits without a reader, less than the ring holds */
#define MAGIC 0x5c1f000000005c1full
#define FIELD 192 /* local_read of a queue pair page */

static unsigned char out[100000], in[100000];

static void fill_pattern(void)
{
	for (unsigned i = 0; i < sizeof out; i++)
		out[i] = (unsigned char)(i * 11 + (i >> 8) * 3);
}

static char process_state(pid_t pid)
{
	char path[40], line[200] = "";
	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	FILE *f = fopen(path, "r");

	CHECK(f);
	CHECK(fgets(line, sizeof line, f));
	fclose(f);
	char *end = strrchr(line, ')');

	CHECK(end);
	return end[2];
}

static void on_signal(int s) { (void)s; }
static void catch(int s)
{
	struct sigaction sa = { .sa_handler = on_signal };

	CHECK(sigaction(s, &sa, NULL) == 0);
}

/* A timer that interrupts a blocked call again and again. */
static void interrupts(bool on)
{
	struct itimerval t = { { 0, on ? 20000 : 0 }, { 0, on ? 20000 : 0 } };

	catch(SIGALRM);
	CHECK(setitimer(ITIMER_REAL, &t, NULL) == 0);
}

/* Without a reader exactly 4095 bytes fit, for blocking sends too. */
static void exactly_4095_fit(int ep)
{
	EQ(poll1(ep, SCIF_POLLOUT, 0), SCIF_POLLOUT);
	EQ(scif_send(ep, out, 5000, 0), 4095);
	EQ(poll1(ep, SCIF_POLLOUT, 0), 0);
	interrupts(true);
	FAILS(scif_send(ep, out, 1, SCIF_SEND_BLOCK), EINTR);
	interrupts(false);
	EQ(scif_send(ep, out, 1, 0), 0);
}

/* A word of the queue pair pages that this process maps: of the peer's (one page), or of its own (more)
 * where the upper half is not 0. NULL: none. */
static uint64_t *read_word(bool peers)
{
	FILE *f = fopen("/proc/self/maps", "r");
	unsigned long from, to;
	uint64_t *found = NULL;
	char line[300], perm[8];

	CHECK(f);
	while (fgets(line, sizeof line, f)) {
		if (sscanf(line, "%lx-%lx %7s", &from, &to, perm) != 3 || strcmp(perm, "rw-s") ||
		    (to - from == PG) != peers || *(volatile uint64_t *)from != MAGIC)
			continue;
		uint64_t *word = (uint64_t *)(from + FIELD);

		if (peers || *(volatile uint64_t *)word >> 32)
			found = word;
	}
	fclose(f);
	return found;
}

static void wait_state(pid_t pid, char want)
{
	EVENTUALLY(process_state(pid) == want);
}

/* `pid` sleeps in a recv of WANT bytes from `ep`. */
static void wait_reader(pid_t pid, int ep)
{
	poll1(ep, SCIF_POLLOUT, 0); /* the library maps the connection now */
	EVENTUALLY(read_word(false));
	wait_state(pid, 'S');
}

static void interrupted_reader(int ep)
{
	fill_pattern();
	catch(SIGUSR1);
	EQ(scif_recv(ep, in, WANT, SCIF_RECV_BLOCK), AHEAD);
	CHECK(!memcmp(in, out, AHEAD));
	send_all(ep, "x", 1);
	EVENTUALLY(poll1(ep, SCIF_POLLIN, 0) & SCIF_POLLHUP);
	EQ(scif_recv(ep, in, WANT, 0), 4095);
}

TEST(scif_58_66_a_signal_ends_recv_with_all_that_was_sent_on_its_promise)
{
	pid_t pid;
	char c;

	fill_pattern();
	int ep = with_peer(interrupted_reader, &pid);

	wait_reader(pid, ep);
	CHECK(kill(pid, SIGSTOP) == 0); /* in the middle of its recv it takes nothing now */
	wait_state(pid, 'T');
	EQ(scif_send(ep, out, AHEAD, SCIF_SEND_BLOCK), AHEAD);
	EQ(scif_send(ep, out, 1, 0), 0); /* neither non-blocking sends nor poll see the promise */
	EQ(poll1(ep, SCIF_POLLOUT, 0), 0);
	EQ(native1(ep, POLLOUT, 0), 0);
	CHECK(kill(pid, SIGUSR1) == 0);
	CHECK(kill(pid, SIGCONT) == 0);
	EVENTUALLY(kill(pid, SIGUSR1) == 0 && scif_recv(ep, &c, 1, 0) == 1);
	EQ(native1(ep, POLLOUT, 5000), POLLOUT);
	exactly_4095_fit(ep);
	CHECK(scif_close(ep) == 0);
	reap(pid);
}

TEST(scif_58_66_after_an_interrupted_recv_exactly_4095_bytes_fit)
{
	int e[2];

	pair(e);
	interrupts(true);
	FAILS(scif_recv(e[1], in, WANT, SCIF_RECV_BLOCK), EINTR);
	interrupts(false);
	exactly_4095_fit(e[0]);
}

TEST(scif_58_59_a_waiting_reader_does_not_change_nonblocking_sends)
{
	pid_t pid;
	int ep = with_peer(interrupted_reader, &pid);

	wait_reader(pid, ep);
	CHECK(kill(pid, SIGSTOP) == 0);
	wait_state(pid, 'T');
	fill_pattern();
	EQ(scif_send(ep, out, AHEAD, 0), 4095);
	EQ(scif_send(ep, out, 1, 0), 0);
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitpid(pid, NULL, 0) == pid);
}

TEST(scif_58_61_a_killed_reader_loses_nothing_for_those_who_share_its_endpoint)
{
	int e[2], st;

	fill_pattern();
	pair(e);
	meet_both(e);
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		scif_recv(e[1], in, WANT, SCIF_RECV_BLOCK);
		_exit(1);
	}
	wait_reader(pid, e[0]);
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitpid(pid, &st, 0) == pid);
	EQ(scif_send(e[0], out, AHEAD, SCIF_SEND_BLOCK), AHEAD); /* the promise stands */
	EQ(poll1(e[1], SCIF_POLLIN, 20000), SCIF_POLLIN);
	EQ(scif_send(e[0], out, 1, 0), 0);
	EQ(scif_recv(e[1], in, 1000, 0), 1000); /* there is still more than fits without a reader */
	EQ(native1(e[0], POLLOUT, 50), 0);
	EQ(scif_recv(e[1], in + 1000, AHEAD - 2000, 0), AHEAD - 2000);
	EQ(native1(e[0], POLLOUT, 5000), POLLOUT);
	recv_all(e[1], in + AHEAD - 1000, 1000);
	CHECK(!memcmp(in, out, AHEAD));
	EQ(scif_recv(e[1], in, 1, 0), 0);
	exactly_4095_fit(e[0]);
	recv_all(e[1], in, 4095);
}

TEST(scif_61_a_poll_after_a_reader_was_killed_leaves_its_lock_free)
{
	int e[2], st;

	pair(e);
	meet_both(e);
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		scif_recv(e[1], in, 1, SCIF_RECV_BLOCK);
		_exit(1);
	}
	wait_state(pid, 'S');
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitpid(pid, &st, 0) == pid);
	EQ(poll1(e[1], SCIF_POLLIN, 20), 0);
	pid = fork();
	CHECK(pid >= 0);
	if (pid == 0) {
		alarm(10);
		recv_all(e[1], in, 3);
		_exit(0);
	}
	send_all(e[0], "abc", 3);
	reap(pid);
}

static void promises_everything(int ep)
{
	meet(ep);
	*read_word(true) |= 0xffffffffull << 32;
	send_all(ep, "x", 1);
	pause();
}

TEST(scif_135_a_peer_that_promises_more_than_the_ring_holds)
{
	pid_t pid;
	char c;
	int ep = with_peer(promises_everything, &pid);

	meet(ep);
	recv_all(ep, &c, 1);
	int n, total = 0;

	interrupts(true);
	while ((n = scif_send(ep, out, sizeof out, SCIF_SEND_BLOCK)) > 0)
		total += n;
	interrupts(false);
	EQ(n, -1);
	EQ(errno, EINTR);
	EQ(total, 32767); /* never over what was not read */
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitpid(pid, NULL, 0) == pid);
}

static void damages_index(int ep)
{
	meet(ep);
	*read_word(true) = 0x8000;
	send_all(ep, "x", 1);
	pause();
}

TEST(scif_135_a_peer_that_damages_the_read_index)
{
	pid_t pid;
	char c;
	int ep = with_peer(damages_index, &pid);

	meet(ep);
	recv_all(ep, &c, 1);
	FAILS(scif_send(ep, out, sizeof out, SCIF_SEND_BLOCK), ECONNRESET);
	FAILS(scif_send(ep, out, 5000, 0), ECONNRESET);
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(waitpid(pid, NULL, 0) == pid);
}

enum { NOT_YET, FITTED, READS };
static int *stage; /* shared with the peer */

static void sleepy(int ep)
{
	static char buf[10000];

	meet(ep);
	EVENTUALLY(__atomic_load_n(stage, __ATOMIC_ACQUIRE) == FITTED);
	usleep(100000);
	__atomic_store_n(stage, READS, __ATOMIC_RELEASE);
	recv_all(ep, buf, sizeof buf);
	meet(ep);
}

TEST(scif_58_60_ten_thousand_bytes_stall_until_they_are_read)
{
	static char buf[10000];
	pid_t pid;

	stage = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(stage != MAP_FAILED);
	int ep = with_peer(sleepy, &pid);

	meet(ep);
	EQ(scif_send(ep, buf, 4095, SCIF_SEND_BLOCK), 4095); /* fits without a reader */
	__atomic_store_n(stage, FITTED, __ATOMIC_RELEASE);
	EQ(scif_send(ep, buf, 5905, SCIF_SEND_BLOCK), 5905);
	EQ(__atomic_load_n(stage, __ATOMIC_ACQUIRE), READS);
	meet(ep);
	reap(pid);
}
