/* send and recv (SCIF-54..69, 73, 132, 134). */
#include "t.h"

static void echo(int ep)
{
	char buf[4096];
	int n;

	while ((n = scif_recv(ep, buf, sizeof buf, 0)) >= 0) {
		if (n == 0)
			CHECK(poll1(ep, SCIF_POLLIN, 10000));
		else
			send_all(ep, buf, n);
	}
	EQ(errno, ECONNRESET);
}

TEST(scif_60_a_mebibyte_arrives_intact)
{
	pid_t pid;
	int ep = with_peer(echo, &pid), n = 1 << 20;
	unsigned char *out = malloc((size_t)n), *in = malloc((size_t)n);

	for (int i = 0; i < n; i++)
		out[i] = (unsigned char)(i * 7 + (i >> 8) * 13);
	for (int done = 0; done < n;) { /* 64 KiB in flight at most, both directions at once */
		int k = 3000;

		if (k > n - done)
			k = n - done;
		send_all(ep, out + done, k);
		recv_all(ep, in + done, k);
		done += k;
	}
	CHECK(!memcmp(in, out, (size_t)n));
	CHECK(scif_close(ep) == 0);
	reap(pid);
}

static void sink_mib(int ep)
{
	unsigned char *in = malloc(1 << 20);

	recv_all(ep, in, 1 << 20);
	for (int i = 0; i < 1 << 20; i++)
		CHECK(in[i] == (unsigned char)(i * 3 + (i >> 9)));
	meet(ep);
}

TEST(scif_60_61_one_blocking_send_of_a_mebibyte)
{
	pid_t pid;
	int ep = with_peer(sink_mib, &pid);
	unsigned char *out = malloc(1 << 20);

	for (int i = 0; i < 1 << 20; i++)
		out[i] = (unsigned char)(i * 3 + (i >> 9));
	errno = 0;
	send_all(ep, out, 1 << 20);
	EQ(errno, 0);
	meet(ep);
	CHECK(scif_close(ep) == 0);
	reap(pid);
}

TEST(scif_54_length_zero_returns_zero_always)
{
	int e[2], fd = scif_open();

	pair(e);
	for (int state = 0; state < 5; state++) { /* unbound, bound, listening, connected, disconnected */
		int ep = state < 3 ? fd : e[0];

		if (state == 1)
			CHECK(scif_bind(fd, 0) > 0);
		if (state == 2)
			CHECK(scif_listen(fd, 1) == 0);
		if (state == 4) {
			scif_close(e[1]);
			EQ(poll1(ep, SCIF_POLLIN, 5000), SCIF_POLLHUP);
		}
		for (int flags = -2; flags < 5; flags++) { /* 2 is an error with any other length */
			OK(scif_send(ep, NULL, 0, flags));
			OK(scif_recv(ep, NULL, 0, flags));
			EQ(scif_send(ep, (void *)1, 0, flags), 0);
			EQ(scif_recv(ep, (void *)1, 0, flags), 0);
		}
	}
}

TEST(scif_55_56_bad_lengths_and_flags_come_before_the_state)
{
	int fd = scif_open(), e[2];
	char c = 0;

	FAILS(scif_send(fd, &c, -1, 0), EINVAL);
	FAILS(scif_recv(fd, &c, -5, 1), EINVAL);
	FAILS(scif_send(fd, &c, 1, 2), EINVAL);
	FAILS(scif_recv(fd, &c, 1, 2), EINVAL);
	FAILS(scif_send(fd, &c, 1, 0), ENOTCONN);
	FAILS(scif_recv(fd, &c, 1, 1), ENOTCONN);
	CHECK(scif_bind(fd, 0) > 0);
	FAILS(scif_send(fd, &c, 1, 3), ENOTCONN);
	pair(e);
	EQ(scif_send(e[0], &c, 1, 3), 1);
	EQ(scif_recv(e[1], &c, 1, 3), 1);
}

TEST(scif_57_nonblocking_recv_on_an_empty_connection_returns_zero)
{
	int e[2];
	char c;

	pair(e);
	errno = 0;
	EQ(scif_recv(e[0], &c, 1, 0), 0);
	EQ(errno, 0);
}

TEST(scif_58_59_exactly_4095_bytes_fit)
{
	int e[2], n, total = 0;
	static char buf[5000];

	pair(e);
	EQ(scif_send(e[0], buf, 5000, 0), 4095);
	EQ(scif_send(e[0], buf, 1, 0), 0);
	EQ(scif_recv(e[1], buf, 100, 0), 100);
	EQ(scif_send(e[0], buf, 1000, 0), 100);
	while ((n = scif_recv(e[1], buf, 1000, 0)) > 0)
		total += n;
	EQ(total, 4095);
	while (total > 0 && (n = scif_send(e[0], buf, 7, 0)) > 0)
		total -= n;
	EQ(total, 0);
	EQ(scif_send(e[0], buf, 1, 0), 0);
}

static void send3(int ep) { send_all(ep, "abc", 3); }

TEST(scif_61_62_blocking_recv_returns_what_came_before_the_close)
{
	char buf[10];
	pid_t pid;
	int ep = with_peer(send3, &pid);

	EQ(scif_recv(ep, buf, 10, SCIF_RECV_BLOCK), 3);
	CHECK(!memcmp(buf, "abc", 3));
	FAILS(scif_recv(ep, buf, 1, SCIF_RECV_BLOCK), ECONNRESET);
	reap(pid);
}

TEST(scif_63_64_73_132_unread_data_is_drained_then_reset)
{
	char buf[10];
	pid_t pid;
	int ep = with_peer(send3, &pid);

	reap(pid);
	EVENTUALLY(poll1(ep, SCIF_POLLIN | SCIF_POLLOUT, 0) & SCIF_POLLHUP);
	EQ(poll1(ep, SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLIN | SCIF_POLLOUT | SCIF_POLLHUP);
	EQ(scif_recv(ep, buf, 2, 0), 2);
	EQ(poll1(ep, SCIF_POLLIN | SCIF_POLLOUT, 0), SCIF_POLLIN | SCIF_POLLOUT | SCIF_POLLHUP);
	EQ(scif_recv(ep, buf, 2, 0), 1);
	FAILS(scif_recv(ep, buf, 2, 0), ECONNRESET);
	FAILS(scif_recv(ep, buf, 2, 0), ECONNRESET);
	FAILS(scif_send(ep, buf, 2, 0), ECONNRESET);
	EQ(poll1(ep, SCIF_POLLIN, 0), SCIF_POLLHUP);
	EVENTUALLY(native1(ep, POLLIN, 0) & POLLHUP);
	OK(scif_close(ep));
}

static void read1000_then_close(int ep)
{
	char buf[1000];

	recv_all(ep, buf, 1000);
	usleep(200000); /* the sender fills the ring meanwhile, also on a busy machine */
}

TEST(scif_65_blocked_send_returns_the_placed_bytes_when_the_peer_closes)
{
	static char big[100000];
	pid_t pid;
	int ep = with_peer(read1000_then_close, &pid);

	int placed = scif_send(ep, big, sizeof big, SCIF_SEND_BLOCK);

	CHECK(placed == 5095 || placed == 4095); /* the latter when its turn never came between read and close */
	FAILS(scif_send(ep, big, sizeof big, SCIF_SEND_BLOCK), ECONNRESET);
	reap(pid);
}

static void *blocked_send(void *arg)
{
	about_to_block();
	FAILS(scif_send(*(int *)arg, "x", 1, SCIF_SEND_BLOCK), ECONNRESET);
	return NULL;
}

/* Thread `t` is in a blocking send from `e[0]` that can place nothing. */
static void block_in_send(int e[2], pthread_t *t)
{
	static char buf[5000];

	pair(e);
	EQ(scif_send(e[0], buf, sizeof buf, 0), 4095);
	CHECK(!pthread_create(t, NULL, blocked_send, &e[0]));
	wait_until_blocked();
}

TEST(scif_65_134_blocked_send_that_placed_nothing_fails_when_the_peer_closes)
{
	pthread_t t;
	int e[2];

	block_in_send(e, &t);
	OK(scif_close(e[1]));
	pthread_join(t, NULL);
	OK(scif_close(e[0]));
}

TEST(scif_134_close_while_another_thread_sends)
{
	pthread_t t;
	int e[2];

	block_in_send(e, &t);
	OK(scif_close(e[0]));
	pthread_join(t, NULL);
}

static int signalled;

static void on_signal(int s) { (void)s; signalled++; }

static pthread_t main_thread;

static int poked_enough;

static void *poke_main(void *arg)
{
	do { /* again when the call had not begun */
		usleep(*(int *)arg);
		pthread_kill(main_thread, SIGUSR1);
	} while (!__atomic_load_n(&poked_enough, __ATOMIC_ACQUIRE));
	return NULL;
}

static void poke(int us, int flags, pthread_t *t)
{
	static int arg;
	struct sigaction sa = { .sa_handler = on_signal, .sa_flags = flags };

	arg = us;
	signalled = poked_enough = 0;
	sigaction(SIGUSR1, &sa, NULL);
	main_thread = pthread_self();
	CHECK(pthread_create(t, NULL, poke_main, &arg) == 0);
}

TEST(scif_66_a_signal_ends_recv_with_the_bytes_that_came)
{
	char buf[10];
	pthread_t t;
	int e[2];

	pair(e);
	send_all(e[0], "xyz", 3);
	poke(200000, 0, &t);
	EQ(scif_recv(e[1], buf, 10, SCIF_RECV_BLOCK), 3);
	__atomic_store_n(&poked_enough, 1, __ATOMIC_RELEASE);
	pthread_join(t, NULL);
	poke(200000, 0, &t);
	FAILS(scif_recv(e[1], buf, 10, SCIF_RECV_BLOCK), EINTR);
	__atomic_store_n(&poked_enough, 1, __ATOMIC_RELEASE);
	pthread_join(t, NULL);
	CHECK(signalled >= 1);
}

static int late_fd;

static void *late_send(void *arg)
{
	(void)arg;
	while (!signalled)
		usleep(1000);
	usleep(20000);
	send_all(late_fd, "0123456789", 10);
	return NULL;
}

TEST(scif_66_sa_restart_restarts_a_blocked_recv)
{
	char buf[10];
	pthread_t t, t2;
	int e[2];

	pair(e);
	late_fd = e[0];
	poke(30000, SA_RESTART, &t);
	CHECK(pthread_create(&t2, NULL, late_send, NULL) == 0);
	EQ(scif_recv(e[1], buf, 10, SCIF_RECV_BLOCK), 10);
	CHECK(signalled >= 1);
	__atomic_store_n(&poked_enough, 1, __ATOMIC_RELEASE);
	pthread_join(t, NULL);
	pthread_join(t2, NULL);
}

TEST(scif_67_bad_buffers_give_efault)
{
	int e[2];

	pair(e);
	meet_both(e); /* everything that the library maps is mapped */
	char *p = pages(1);
	munmap(p, PG);
	FAILS(scif_send(e[0], p, 4, 0), EFAULT);
	FAILS(scif_send(e[0], (void *)1, 4, 1), EFAULT);
	send_all(e[1], "abcd", 4);
	FAILS(scif_recv(e[0], p, 4, 0), EFAULT);
	FAILS(scif_recv(e[0], NULL, 4, 0), EFAULT);
	char *ro = mmap(NULL, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	FAILS(scif_recv(e[0], ro, 4, 0), EFAULT);
	EQ(scif_send(e[0], ro, 4, 0), 4);
}

static int shared_ep;

static void *block_sender(void *arg)
{
	static __thread char buf[10000];

	memset(buf, *(char *)arg, sizeof buf);
	for (int i = 0; i < 20; i++)
		send_all(shared_ep, buf, sizeof buf);
	return NULL;
}

static void check_blocks(int ep)
{
	static char buf[10000];

	for (int i = 0; i < 40; i++) {
		recv_all(ep, buf, sizeof buf);
		for (unsigned k = 1; k < sizeof buf; k++)
			CHECK(buf[k] == buf[0]);
	}
	meet(ep);
}

TEST(scif_68_concurrent_sends_are_never_interleaved)
{
	pthread_t a, b;
	pid_t pid;

	shared_ep = with_peer(check_blocks, &pid);
	pthread_create(&a, NULL, block_sender, "a");
	pthread_create(&b, NULL, block_sender, "b");
	pthread_join(a, NULL);
	pthread_join(b, NULL);
	meet(shared_ep);
	reap(pid);
}

static void *blocked_recv(void *arg)
{
	char c;

	about_to_block();
	FAILS(scif_recv(*(int *)arg, &c, 1, SCIF_RECV_BLOCK), ECONNRESET);
	return NULL;
}

TEST(scif_134_close_of_the_peer_ends_blocked_calls)
{
	pthread_t t;
	int e[2];

	pair(e);
	pthread_create(&t, NULL, blocked_recv, &e[0]);
	wait_until_blocked();
	OK(scif_close(e[1]));
	pthread_join(t, NULL);
	OK(scif_close(e[0]));
}

TEST(scif_134_close_while_another_thread_receives)
{
	pthread_t t;
	int e[2];

	pair(e);
	pthread_create(&t, NULL, blocked_recv, &e[0]);
	wait_until_blocked();
	OK(scif_close(e[0]));
	pthread_join(t, NULL);
}
